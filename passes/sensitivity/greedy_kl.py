"""Score a format by what it does to the model's output, measured: one weight at a time, end to end.

    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {w2g64 = "sha256:…"}}
->
    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {…}, scores = {w2g64 = 0.00861}}

The measured allocation of exllamav3 (conversion/measure_model.py and optimize_model.py: the change of KL for
each group of weights, then a greedy fill by ΔKL/Δbits). `allocate` solves exactly what is filled greedily
there. Costs about half a forward pass for each weight and format.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gammac.formats import candidates_of
from gammac.ir import Module, Weight
from gammac.passes.candidates import weights_have_candidates
from gammac.passes.sensitivity.measured import measured_kl
from gammac.passes.sensitivity.scores import check_range, rounded, scoring_tokens, weights_have_scores
from gammac.pipeline import Context, Invariant
from gammac.trials import Assignment


@dataclass(frozen=True)
class GreedyKl:
    """score(b) = KL(full precision ‖ this weight alone in b), mean over positions, nats.

    `windows` of the calibration text are used.
    """

    name: ClassVar[str] = "greedy_kl"
    reads: ClassVar[tuple[str, ...]] = ("calibration",)
    requires: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates,)
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_scores,)
    windows: int = 2

    def __post_init__(self) -> None:
        """Raises CompileError for options that make no sense."""
        check_range(self.name, "windows", self.windows, 1)

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError without calibration text, or for an encoder, which has no next token."""
        tokens = scoring_tokens(self.name, self.windows, module, ctx)
        weights = [weight for weight in module.weights.values() if "candidates" in weight.attrs]
        return module.with_weights(*scored_alone(weights, module, ctx, tokens, f"scoring ({self.name})"))


def scored_alone(
    weights: Sequence[Weight], module: Module, ctx: Context, tokens: Tensor, title: str
) -> list[Weight]:
    """The weights with scores, each measured alone on tokens i64 [windows, length], all else as it is."""
    tried: list[Assignment] = [{w.name: format_} for w in weights for format_ in candidates_of(w)]
    found = iter(measured_kl(module, ctx, tokens, tried, ctx.progress, title))
    # rounding may leave a divergence of nothing below zero
    return [
        w.with_attrs(scores={format_: rounded(max(next(found), 0.0)) for format_ in candidates_of(w)})
        for w in weights
    ]
