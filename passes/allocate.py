"""Give each weight a format: the least predicted loss within the budgets, exactly.

    weight @up : f32[64,64] = sha256:… {role = "block", scores = {w2g64 = 3.0, w4g64 = 0.5}}
    weight @down : f32[64,64] = sha256:… {role = "block", scores = {w2g64 = 1.0, w4g64 = 0.25}}
-> with the budget 3
    weight @up : f32[64,64] = sha256:… {role = "block", scores = {…}, format = "w4g64"}
    weight @down : f32[64,64] = sha256:… {role = "block", scores = {…}, format = "w2g64"}

Budgets of every kind hold together. Where the target fuses linears that read the same value, these get
one format. What was reached stands in the module's attribute `allocation`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from gammac.budget import ENERGY, KINDS, LATENCY, LOSS, PAYLOAD, Budget, parse_budgets, spelled
from gammac.diagnostics import CompileError
from gammac.formats import parse_format
from gammac.ir import Module, Op, Value, Weight
from gammac.passes.allocation_limits import Candidate, Limit, cost_in, limit_of, weights_with_roles
from gammac.passes.allocation_problem import Choice, Group, Picks, used
from gammac.passes.allocation_search import Infeasible, choose
from gammac.passes.quantize import weights_have_formats
from gammac.passes.sensitivity.scores import weights_have_scores
from gammac.pipeline import Context, Invariant
from gammac.targets import cost
from gammac.targets.target import BLOCK, Target

QUALITY: Final = "quality"
# what else may be made as small as possible, and the budget that counts it; the amount has no meaning
OBJECTIVES: Final = {LATENCY: Budget(LATENCY, 1.0, "1s/token"), ENERGY: Budget(ENERGY, 1.0, "1J/token")}


@dataclass(frozen=True)
class Allocate:
    """`budget` (joined by `+`) takes the place of the compile's own. `tie`: as the target says if None.

    `objective` is quality (the least predicted loss), latency or energy; these want a limit of the loss.
    """

    name: ClassVar[str] = "allocate"
    reads: ClassVar[tuple[str, ...]] = ("budget", "target")
    requires: ClassVar[tuple[Invariant, ...]] = (weights_have_scores,)
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_formats,)
    budget: str = ""
    tie: bool | None = None
    extra_bytes: int = 0  # of the artifact's graph and tokenizer, for a budget in bytes
    objective: str = QUALITY

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError when the budgets can't be met: the tightest, and what would be enough."""
        limits, rows = problem(module, ctx, self.budget, self.tie, self.extra_bytes)
        check_objective(self.objective, [limit.budget for limit in limits])
        if self.objective != QUALITY:
            limits = [*limits, self._least(module, ctx, limits)]
            rows = rows_of(module, ctx, limits, self.tie)
        picks = _choose([group for _, group in rows], limits)
        return with_formats(module, formats_of(rows, picks), ctx.target, self.extra_bytes)

    def _least(self, module: Module, ctx: Context, limits: Sequence[Limit]) -> Limit:
        """The least of the objective within the limits, as one: of what is as fast, the best is wanted."""
        wanted = limit_of(OBJECTIVES[self.objective], module, ctx.target)
        groups = [group for _, group in rows_of(module, ctx, [*limits, wanted], self.tie)]
        picks = _choose([_aiming(group) for group in groups], limits)
        taken = used(groups, picks, len(limits) + 1)[-1]
        return replace(wanted, total=taken + wanted.fixed)


def _choose(groups: Sequence[Group], limits: Sequence[Limit]) -> Picks:
    """Raises CompileError where the limits can't be met: the tightest, and what would be enough."""
    try:
        return choose(groups, tuple(limit.capacity for limit in limits))
    except Infeasible as error:
        raise _refusal(error, limits, groups) from error


# weights that are decided together, and their choices
Row = tuple[tuple[str, ...], Group]


def problem(
    module: Module, ctx: Context, budget: str, tie: bool | None, extra_bytes: int
) -> tuple[list[Limit], list[Row]]:
    """The limits, and who may get what. The arguments are Allocate's options."""
    # in an order of their own, so that the user's decides nothing
    budgets = sorted(
        parse_budgets(budget) if budget else ctx.budgets, key=lambda b: (b.kind, b.tokens, b.value)
    )
    limits = [limit_of(b, module, ctx.target, extra_bytes) for b in budgets]
    return limits, rows_of(module, ctx, limits, tie)


def rows_of(module: Module, ctx: Context, limits: Sequence[Limit], tie: bool | None) -> list[Row]:
    """Who may get what, with what it takes of each limit."""
    return _rows(module, ctx.target, limits, ctx.target.tie if tie is None else tie)


def check_objective(objective: str, budgets: Sequence[Budget]) -> None:
    """Raises CompileError for an unknown objective, and for one that nothing holds back."""
    if objective != QUALITY and objective not in OBJECTIVES:
        known = " or ".join((QUALITY, *OBJECTIVES))
        raise CompileError(f"the objective is {known}, not {objective!r}")
    if objective != QUALITY and LOSS not in {budget.kind for budget in budgets}:
        raise CompileError(
            f"the objective {objective} alone takes the cheapest format everywhere",
            hint="limit the predicted loss, as in --max-loss 0.5; a compile says what it came to",
        )


def _aiming(group: Group) -> Group:
    """Choices scored by their last cost, which bounds nothing then."""
    return tuple(replace(c, score=float(c.costs[-1]), costs=c.costs[:-1]) for c in group)


def formats_of(rows: Sequence[Row], picks: Picks) -> dict[str, str]:
    """Weight name → format."""
    return {
        name: group[pick].name for (names, group), pick in zip(rows, picks, strict=True) for name in names
    }


def tie_groups(module: Module) -> list[tuple[str, ...]]:
    """Names of weights that get one format: block linears that read the same value and are one `part`.

    In the order of the module; a weight that nothing ties stands alone.
    """
    leader = {name: name for name in weights_with_roles(module)}

    def first_of(name: str) -> str:
        return name if leader[name] == name else first_of(leader[name])

    for function in module.functions.values():
        met: dict[tuple[Value, object], str] = {}
        for op in function.ops:
            name, source = _block_linear(op, module), op.operands[0] if op.operands else None
            if name and isinstance(source, Value):
                part = module.weights[name].attrs.get("part", 0)
                leader[first_of(name)] = first_of(met.setdefault((source, part), name))
    found: dict[str, list[str]] = {}
    for name in leader:
        found.setdefault(first_of(name), []).append(name)
    return [tuple(names) for names in found.values()]


def _block_linear(op: Op, module: Module) -> str:
    ref = op.weight() if op.name == "linear" else None
    return ref.name if ref and module.weights[ref.name].attrs.get("role") == BLOCK else ""


# ---- the module as an integer program -----------------------------------------------------------


def _rows(module: Module, target: Target, limits: Sequence[Limit], tie: bool) -> list[Row]:
    """Weights that are decided together, and their choices; a tie without a common format is undone."""
    readers = cost.readers(module)
    rows: list[Row] = []
    for names in tie_groups(module) if tie else [(name,) for name in weights_with_roles(module)]:
        tables = {n: _choices(module.weights[n], readers[n], module, target, limits) for n in names}
        common = [f for f in tables[names[0]] if all(f in table for table in tables.values())]
        if common:
            rows.append((names, tuple(_sum([tables[n][f] for n in names]) for f in common)))
        else:
            rows += [((n,), tuple(tables[n].values())) for n in names]
    return rows


def _choices(
    weight: Weight, readers: Sequence[Op], module: Module, target: Target, limits: Sequence[Limit]
) -> dict[str, Choice]:
    """Format name → choice, narrow formats first. Raises CompileError if the target runs none."""
    scores, role = weight.attrs["scores"], str(weight.attrs["role"])
    assert isinstance(scores, Mapping)
    found: dict[str, Choice] = {}
    for name in sorted(scores, key=parse_format):
        columns, score = weight.type.shape[-1], scores[name]
        assert isinstance(columns, int) and isinstance(score, int | float)
        if target.kernel_for(parse_format(name), role, columns) is None:
            continue
        if not math.isfinite(score):
            raise CompileError(f"the score of {name} is {score}", loc=weight.name)
        row = cost.weight_cost(weight, readers, module, target, {weight.name: name})
        candidate = Candidate(weight, readers, module, target, row, float(score))
        costs = tuple(cost_in(limit, candidate) for limit in limits)
        found[name] = Choice(name, float(score), costs, (row.payload_bits, row.bytes))
    if not found:
        raise CompileError(
            f"{target.name} runs none of its formats: {', '.join(scores) or 'it has none'}",
            loc=weight.name,
            hint="choose other candidates",
        )
    return found


def _sum(parts: Sequence[Choice]) -> Choice:
    """The same format for several weights."""
    costs = tuple(map(sum, zip(*(p.costs for p in parts), strict=True)))
    size = tuple(map(sum, zip(*(p.size for p in parts), strict=True)))
    return Choice(parts[0].name, math.fsum(p.score for p in parts), costs, size)


# ---- what comes of it ---------------------------------------------------------------------------


def _refusal(error: Infeasible, limits: Sequence[Limit], groups: Sequence[Group]) -> CompileError:
    """Which budget is too tight, and the smallest that would do."""
    limit = limits[error.limit]
    kind = limit.budget.kind
    enough = spelled(kind, (error.needed + limit.fixed) / limit.per, limit.budget.tokens)
    unit = f" {KINDS[kind]}" if kind == PAYLOAD else ""
    formats = sorted({choice.name for group in groups for choice in group}, key=parse_format)
    others = [str(other.budget) for other in limits if other is not limit]
    beside = f" beside {' and '.join(others)}" if others else ""
    return CompileError(
        f"budget {limit.budget}: the smallest possible is {enough}{unit}{beside} "
        f"with formats {', '.join(formats)}",
        hint=f"grant {enough} or allow narrower formats",
    )


def with_formats(module: Module, formats: Mapping[str, str], target: Target, extra_bytes: int) -> Module:
    """The module with its formats, and what they come to."""
    weights = [module.weights[name].with_attrs(format=formats[name]) for name in formats]
    found = cost.module_cost(module, target, formats, extra_bytes)
    objective = 0.0
    for weight in weights:
        scores = weight.attrs["scores"]
        assert isinstance(scores, Mapping)
        score = scores[formats[weight.name]]
        assert isinstance(score, int | float)
        objective += score
    reached = {
        "objective": float(f"{objective:.9g}"),
        "payload_bits": round(found.payload_bits, 6),
        "true_bits": round(found.true_bits, 6),
        "bytes": found.bytes,
        "latency": round(found.decode_seconds, 9),
    }
    return module.with_weights(*weights).with_attrs(allocation=reached)
