"""Check an allocation end to end, and move bits to where the whole model says that they are missed.

    weight @up : f32[64,64] = sha256:… {role = "block", format = "w2g64", …}
    weight @down : f32[64,64] = sha256:… {role = "block", format = "w4g64", …}
->
    weight @up : f32[64,64] = sha256:… {role = "block", format = "w3g64", …}
    weight @down : f32[64,64] = sha256:… {role = "block", format = "w3g64", …}
    and the module's attribute `refinement` = {kl_before = 0.71, kl_after = 0.64, changed = 2}

Scores know a module alone; this pass knows what the modules do to each other. Each round takes one
gradient of KL(full precision ‖ allocated) at the allocated model, predicts from it what every change of
a format would do, and solves the integer program once more for the best few changes within the same
budgets. Proposals of several sizes are tried on other windows than the gradient's, for a gradient of a
few windows promises what holds for these alone; the best is kept if the KL falls there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.ir import Module
from gammac.passes.allocate import Row, formats_of, problem, with_formats
from gammac.passes.allocation_limits import Limit
from gammac.passes.allocation_search import Infeasible, choose, upgraded
from gammac.passes.candidates import weights_have_candidates
from gammac.passes.kl_gradient import Formats, KlGradient, Slopes
from gammac.passes.quantize import weights_have_formats
from gammac.passes.sensitivity.scores import check_range, rounded, scoring_tokens, weights_have_scores
from gammac.pipeline import Context, Invariant
from gammac.trials import run_trials

TRIES: Final = 4  # proposals from one gradient
TRUST: Final = 0.5  # in slopes that follow from the scores, beside those that a few windows show
SWAP: Final = 2  # decisions: with a single one nothing gets wider where a budget is used up


@dataclass(frozen=True)
class Refine:
    """At most `share` of the decisions change in a round, in the other proposals half of that and so on.
    A gradient is of `windows` of the calibration text, and proposals are judged on as many others, all
    evenly spaced; where the text has only one window, on that one. `rounds` bounds the time.

    `budget`, `tie` and `extra_bytes` must be those of the allocation.
    """

    name: ClassVar[str] = "refine"
    reads: ClassVar[tuple[str, ...]] = ("budget", "calibration", "target")
    requires: ClassVar[tuple[Invariant, ...]] = (
        weights_have_candidates,
        weights_have_scores,
        weights_have_formats,
    )
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_formats,)
    rounds: int = 2
    windows: int = 6
    share: float = 0.1
    budget: str = ""
    tie: bool | None = None
    extra_bytes: int = 0  # of the artifact's graph and tokenizer, for a budget in bytes

    def __post_init__(self) -> None:
        """Raises CompileError for options that make no sense."""
        check_range(self.name, "rounds", self.rounds, 1)
        check_range(self.name, "windows", self.windows, 1)
        check_range(self.name, "share", self.share, 0, 1)

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError without calibration text, or for an encoder, which has no next token."""
        if not self.budget and not ctx.budgets:
            raise CompileError("refine needs the allocation's budget", hint="write refine{budget=3}")
        learnt, judging = split(scoring_tokens(self.name, 2 * self.windows, module, ctx))
        gradient = KlGradient(module, learnt, ctx)
        limits, rows = problem(module, ctx, self.budget, self.tie, self.extra_bytes)
        formats = {name: str(module.weights[name].attrs["format"]) for names, _ in rows for name in names}
        most = max(SWAP, round(self.share * len(rows)))
        best, first, kl = formats, math.nan, math.nan
        for round_ in range(1, self.rounds + 1):
            title = f"refining, round {round_} of {self.rounds}"
            predicted = _predicted(module, best, *gradient.measure(best, title))
            proposals = [_proposal(best, predicted, rows, limits, moves) for moves in _fewer(most)]
            unmoved = [formats] if round_ == 1 else []
            tried = [p for i, p in enumerate(proposals) if p != best and p not in proposals[:i]]
            trials = run_trials(module, ctx.store, judging, unmoved + tried, ctx.progress, f"{title}, trials")
            if unmoved:
                first = kl = trials.pop(0).kl
            found = min(((trial.kl, i) for i, trial in enumerate(trials)), default=(kl, 0))
            if not found[0] < kl:
                break
            kl, best = found[0], tried[found[1]]
        refined = with_formats(module, best, ctx.target, self.extra_bytes)
        changed = sum(best[name] != formats[name] for name in formats)
        found_out = {"kl_before": rounded(first), "kl_after": rounded(kl), "changed": changed}
        return refined.with_attrs(refinement=found_out)


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Windows for the gradients and windows to judge by, in turn; the same where there is only one."""
    return (tokens[::2], tokens[1::2]) if len(tokens) > 1 else (tokens, tokens)


def _fewer(moves: int) -> list[int]:
    """So many changes, then half and so on: the fewer, the truer is what a gradient says of them."""
    return list(dict.fromkeys(max(SWAP, moves >> halvings) for halvings in range(TRIES)))


def _predicted(module: Module, formats: Formats, kl: float, slopes: Slopes) -> Slopes:
    """Weight name → format name → predicted change of the KL if this one weight gets that format.

    The slope, and what the step adds by itself: errors of two formats have little to do with each other,
    so it is the sum of both losses, in units such that the losses of the allocation sum up to its KL. What
    the others do to a weight is in the slope already: where scores have it in them, `losses_alone` is taken.
    """
    alone = {name: _attribute(module, name, "losses_alone") for name in formats}
    unit = kl / max(math.fsum(alone[name][format_] for name, format_ in formats.items()), 1e-30)
    expected = _expected(module, formats, alone, slopes)
    found: Slopes = {}
    for name, now in formats.items():
        own, slope, prior = alone[name], slopes.get(name, {}), expected.get(name, {})
        found[name] = dict.fromkeys(own, 0.0)
        for b in own.keys() - {now}:
            measured = slope.get(b, 0.0)
            towards = (1 - TRUST) * measured + TRUST * prior.get(b, measured)
            found[name][b] = towards + unit * (own[b] + own[now])
    return found


def _expected(
    module: Module, formats: Formats, alone: Mapping[str, Mapping[str, float]], slopes: Slopes
) -> Slopes:
    """The slopes that the scores let expect, scaled to those that were measured (least squares).

    A step away from a format takes its own loss back twice, and changes what the others add to it: both
    are known from more text than the slopes are measured on. Empty for scores without `losses_alone`.
    """
    steps = [
        (name, b)
        for name, now in formats.items()
        if name in slopes and "losses_alone" in module.weights[name].attrs
        for b in alone[name].keys() - {now}
    ]
    if not steps:
        return {}
    among = {name: _attribute(module, name, "scores") for name, _ in steps}

    def added(name: str, format_: str) -> float:
        return among[name][format_] - alone[name][format_]

    steps.sort()
    rows = [(alone[n][formats[n]], added(n, b) - added(n, formats[n])) for n, b in steps]
    known = torch.tensor(rows, dtype=torch.float64)
    measured = torch.tensor([slopes[n][b] for n, b in steps], dtype=torch.float64)
    fitted = known @ torch.linalg.lstsq(known, measured[:, None], driver="gelsd").solution
    found: Slopes = {}
    for (name, b), slope in zip(steps, fitted.flatten().tolist(), strict=True):
        found.setdefault(name, {})[b] = slope
    return found


def _attribute(module: Module, name: str, attribute: str) -> dict[str, float]:
    """Format name → number; the scores where the attribute is not there."""
    attrs = module.weights[name].attrs
    found = attrs.get(attribute, attrs["scores"])
    assert isinstance(found, Mapping)
    return {str(format_): float(str(loss)) for format_, loss in found.items()}


def _proposal(
    formats: Formats, predicted: Slopes, rows: Sequence[Row], limits: Sequence[Limit], moves: int
) -> dict[str, str]:
    """The formats with the least predicted KL, at most so many decisions away, within the limits.

    What that leaves of the limits is used up by the scores: no upgrade that still fits is left.
    Raises CompileError where `formats` are not within them, and can't be with so few changes.
    """
    capacities = tuple(limit.capacity for limit in limits)
    groups = []
    for names, group in rows:
        now = formats[names[0]]
        groups.append(
            tuple(
                replace(
                    choice,
                    score=math.fsum(predicted[name][choice.name] for name in names),
                    costs=(*choice.costs, int(choice.name != now)),
                )
                for choice in group
            )
        )
    try:
        picks = choose(groups, (*capacities, moves))
    except Infeasible as error:
        raise CompileError(
            "refine: the allocation is not within the budgets",
            hint="give refine the budget, tie and extra_bytes of allocate",
        ) from error
    return formats_of(rows, upgraded([group for _, group in rows], picks, capacities))
