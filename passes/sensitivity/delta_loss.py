"""Score a format by gradient times change of weight, the gradient taken where everything has that format.

    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {w2g64 = "sha256:…"}}
->
    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {…}, scores = {w2g64 = 0.031}}

DeltaLoss of AutoScheme (SignRoundV2, arXiv 2512.04746; auto-round's auto_scheme/delta_loss.py): the loss
changes by g · (W − W_b) to first order, and the sum of magnitudes bounds that. The quantized model's
gradient sees what all errors do together, which that of the original, near its minimum, does not.
One forward and one backward pass a format, block by block.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gammac.calibration import Stream, backward_segments, run_up_to_last
from gammac.formats import Format, IntegerFormat, candidates_of, load_float, parse_format
from gammac.ir import Function, Module, Weight
from gammac.passes.candidates import weights_have_candidates
from gammac.passes.quantize import stored_as
from gammac.passes.sensitivity.scores import (
    candidate,
    check_range,
    rounded,
    scoring_tokens,
    weights_have_scores,
)
from gammac.pipeline import Context, Invariant


@dataclass(frozen=True)
class DeltaLoss:
    """score(b) = Σ |g ∘ (W − W_b)| / tokens, g = ∂L/∂W of all windows at the model in format b.

    In nats per token, over `windows` of the calibration text. auto-round sums the magnitudes batch by
    batch; here they are those of the whole gradient. A weight without the format b has its nearest one.
    """

    name: ClassVar[str] = "delta_loss"
    reads: ClassVar[tuple[str, ...]] = ("calibration",)
    requires: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates,)
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_scores,)
    windows: int = 8

    def __post_init__(self) -> None:
        """Raises CompileError for less than one window."""
        check_range(self.name, "windows", self.windows, 1)

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError without calibration text, or for an encoder, which has no next token."""
        tokens = scoring_tokens(self.name, self.windows, module, ctx)
        weights = [w for w in module.weights.values() if "candidates" in w.attrs]
        scores: dict[str, dict[str, float]] = {w.name: {} for w in weights}
        for chosen, names in _rounds(weights).items():
            quantized = module.with_weights(*(_stored(w, f) for w, f in zip(weights, chosen, strict=True)))
            for name, gradient in _gradients(quantized, tokens, ctx, f"delta_loss {'+'.join(names)}"):
                weight = module.weights[name]
                for format_ in candidates_of(weight).keys() & set(names):
                    delta = candidate(weight, format_, ctx) - load_float(weight, ctx.store)
                    scores[name][format_] = rounded(float(delta.mul_(gradient).abs_().sum()) / tokens.numel())
        return module.with_weights(
            *(w.with_attrs(scores={f: scores[w.name].get(f, 0.0) for f in candidates_of(w)}) for w in weights)
        )


def _rounds(weights: list[Weight]) -> dict[tuple[str, ...], list[str]]:
    """A format for each weight → the formats of which that is the model quantized everywhere."""
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in sorted({n for w in weights for n in candidates_of(w)}, key=parse_format):
        found[tuple(_nearest(w, name) for w in weights)].append(name)
    return found


def _nearest(weight: Weight, name: str) -> str:
    """The candidate of the nearest width, then of the nearest group size."""
    wished = parse_format(name)

    def distance(found: Format) -> tuple[float, int, bool, Format]:
        bits, group = abs(found.bits - wished.bits), abs(found.group - wished.group)
        return bits, group, _variant(found) != _variant(wished), found

    return min(map(parse_format, candidates_of(weight)), key=distance).name


def _variant(format_: Format) -> tuple[str, bool]:
    return format_.kind, isinstance(format_, IntegerFormat) and format_.symmetric


def _stored(weight: Weight, format_: str) -> Weight:
    return stored_as(weight, format_, candidates_of(weight)[format_], 0.0)


def _gradients(module: Module, tokens: Tensor, ctx: Context, title: str) -> Iterator[tuple[str, Tensor]]:
    """Each quantized weight that the loss depends on, and the summed loss's gradient there."""
    function = module.functions["forward"]
    stream = Stream(function, tokens)
    run_up_to_last(module, stream, ctx.store, ctx.progress, f"scoring ({title}, forward)")
    sums: dict[str, Tensor] = {}
    waiting = _reads(function)
    for segment, _, gradients in backward_segments(
        module, stream, ctx.store, ctx.progress, f"scoring ({title}, backward)"
    ):
        for gradient in gradients:
            ref = gradient.op.weight()
            assert ref is not None
            if "stored" in module.weights[ref.name].attrs:
                found = gradient.at_weight(int(str(module.weights[ref.name].type.shape[0])))
                sums[ref.name] = sums[ref.name].add_(found) if ref.name in sums else found
        # a head that is the embedding too is complete only in the first segment
        waiting -= Counter(ref.name for op in segment.linears() if (ref := op.weight()))
        for name in [n for n in sums if n not in waiting]:
            yield name, sums.pop(name)


def _reads(function: Function) -> Counter[str]:
    """How many linears and embeddings read each weight."""
    refs = (op.weight() for op in function.ops if op.name in ("linear", "embedding"))
    return Counter(ref.name for ref in refs if ref is not None)
