"""Budgets along a front: evenly spaced between the cheapest and the widest allocation of a model."""

from fractions import Fraction
from typing import Final

from gammac.budget import ENERGY, LATENCY, MEMORY, PREFILL, SIZE, Budget, spelled
from gammac.diagnostics import CompileError
from gammac.driver import Plan, context_of
from gammac.driver import extra_bytes as bytes_besides
from gammac.dryrun import guess_scores
from gammac.ir import Module
from gammac.passes.allocate import rows_of
from gammac.passes.allocation_limits import limit_of
from gammac.pipeline import Context
from gammac.targets.cost import CONTEXT

QUALITY: Final = "quality"
# what quality is traded for, and for how many tokens it is counted
TRADED: Final = {LATENCY: 0, ENERGY: 0, SIZE: 0, MEMORY: CONTEXT, PREFILL: CONTEXT}


def parse_front(text: str) -> str:
    """The kind of budget in `quality,latency`. Raises CompileError for anything else."""
    wanted = [part.strip() for part in text.split(",")]
    kinds = [kind for kind in wanted if kind in TRADED]
    if len(wanted) != 2 or len(kinds) != 1 or QUALITY not in wanted:
        raise CompileError(
            f"{text!r} is no front", hint=f"write quality and one of {', '.join(TRADED)}: quality,latency"
        )
    return kinds[0]


def front(plan: Plan, kind: str, points: int) -> tuple[str, ...]:
    """Budgets for a model, as text. The formats decide their range, not the scores."""
    ctx = context_of(plan)
    extra = bytes_besides(plan, plan.module)
    return spread(guess_scores(plan, ctx), ctx, kind, points, plan.request.choices.tie, extra)


def spread(
    module: Module, ctx: Context, kind: str, points: int, tie: bool | None = None, extra_bytes: int = 0
) -> tuple[str, ...]:
    """From what the cheapest formats take to what the widest do, both included, each enough for its point."""
    tokens = TRADED[kind]
    limit = limit_of(Budget(kind, 1.0, "", tokens), module, ctx.target, extra_bytes)
    groups = [group for _, group in rows_of(module, ctx, [limit], tie)]
    least, most = (sum(pick(c.costs[0] for c in group) for group in groups) for pick in (min, max))
    taken = [limit.fixed + least + Fraction(i * (most - least), max(1, points - 1)) for i in range(points)]
    return tuple(dict.fromkeys(spelled(kind, amount / limit.per, tokens) for amount in taken))
