"""Score a format by the squared change of the output, weighted by the gradient of the loss there.

    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {w2g64 = "sha256:…"}}
->
    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {…}, scores = {w2g64 = 0.0125}}

The score of nvidia-modelopt's auto_quantize: a second-order expansion of the loss with the empirical
Fisher information in place of the Hessian. One forward and one backward pass serve every weight and
format; both run block by block.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gammac.calibration import (
    LinearGradient,
    SegmentWeights,
    Stream,
    backward_segments,
    run_up_to_last,
)
from gammac.ir import Module, Op, Weight
from gammac.passes.candidates import weights_have_candidates
from gammac.passes.sensitivity.scores import (
    check_range,
    differences,
    rounded,
    scoring_tokens,
    weights_have_scores,
)
from gammac.pipeline import Context, Invariant

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Fisher:
    """score(b) = ½ Σ_tokens Σ_outputs (∂L/∂y · (y_b − y))² / tokens, nats per token.

    `windows` of the calibration text are used.
    """

    name: ClassVar[str] = "fisher"
    reads: ClassVar[tuple[str, ...]] = ("calibration",)
    requires: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates,)
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_scores,)
    windows: int = 16

    def __post_init__(self) -> None:
        """Raises CompileError for less than one window."""
        check_range(self.name, "windows", self.windows, 1)

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError without calibration text, or for an encoder, which has no next token."""
        tokens = scoring_tokens(self.name, self.windows, module, ctx)
        stream = Stream(module.functions["forward"], tokens)
        run_up_to_last(module, stream, ctx.store, ctx.progress, "scoring (fisher, forward)")
        scores: Scores = {}
        for segment, weights, gradients in backward_segments(
            module, stream, ctx.store, ctx.progress, "scoring (fisher, backward)"
        ):
            deltas = {op: _deltas(module, op, weights, ctx) for op in segment.linears()}
            for gradient in gradients:
                _add(scores, module, gradient, deltas[gradient.op])
        return module.with_weights(*_scored(module, scores, tokens.numel()))


def _deltas(module: Module, op: Op, weights: SegmentWeights, ctx: Context) -> dict[str, Tensor]:
    """Format name → W_b − W of the op's weight."""
    ref = op.weight()
    assert ref is not None
    weight = module.weights[ref.name]
    if "candidates" not in weight.attrs:
        return {}
    return differences(weight, weights(ref.name).detach(), ctx)


def _add(scores: Scores, module: Module, gradient: LinearGradient, deltas: dict[str, Tensor]) -> None:
    ref = gradient.op.weight()
    assert ref is not None
    own = scores.setdefault(ref.name, {})
    for name, delta in deltas.items():
        change = gradient.output_change(delta)
        own[name] = own.get(name, 0.0) + 0.5 * float(change.mul_(gradient.gradient).square_().sum())


def _scored(module: Module, scores: Scores, tokens: int) -> list[Weight]:
    return [
        module.weights[name].with_attrs(scores={f: rounded(s / tokens) for f, s in by_format.items()})
        for name, by_format in scores.items()
        if by_format
    ]
