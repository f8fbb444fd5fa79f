"""How far a module is from its full-precision self, and what each change of a format promises.

One forward and one backward pass of KL(full precision ‖ module), block by block: memory holds one
block's weights and their gradients, states lie on disk.
"""

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from gammac.calibration import LinearGradient, SegmentWeights, Stream, backward_segments, run_segment
from gammac.formats import load_float
from gammac.ir import Module
from gammac.ir.interpret import run_ops
from gammac.passes.quantize import stored_as
from gammac.passes.sensitivity.scores import candidate, candidates_of
from gammac.pipeline import Context

Formats = Mapping[str, str]
FULL: Final = ""  # stands for full precision where format names are keys
# weight name → format name (or FULL) → first-order change of the KL, nats a predicted position
Slopes = dict[str, dict[str, float]]


class KlGradient:
    """The full-precision module on tokens i64 [windows, length], to compare allocations with."""

    def __init__(self, module: Module, tokens: Tensor, ctx: Context) -> None:
        self.module, self.tokens, self.ctx = module, tokens, ctx
        self.positions = tokens[:, 1:].numel()
        self.reference = self._forward(module, "refining (full precision)", keep=False)
        self.head = SegmentWeights(module, ctx.store)

    def _forward(self, module: Module, title: str, *, keep: bool) -> Stream:
        """Run all segments but the last; `keep` leaves what each read, for a backward run."""
        stream = Stream(module.functions["forward"], self.tokens)
        stream.start()
        for index in self.ctx.progress(range(len(stream.segments) - 1), title):
            run_segment(module, stream, self.ctx.store, lambda *_: None, index, forget=not keep)
        return stream

    def _log_p(self, batch: int) -> Tensor:
        """The full-precision model's log-probabilities, f32 [windows, length, vocab]."""
        stream = self.reference
        last = len(stream.segments) - 1
        segment, env = stream.segments[last], stream.load(last, batch)
        with torch.no_grad():
            run_ops(segment.ops, env, stream.sizes[batch], self.head, keep=segment.live_out)
        return env[segment.live_out[-1]].float().log_softmax(-1)

    def measure(self, formats: Formats, title: str, below: float) -> tuple[float, Slopes]:
        """The KL of an allocation, in nats a predicted position, and slopes where it is `below` that.

        The slope of a weight's candidate b is ⟨∂KL/∂W, W_b − W⟩ at the allocated W.
        """
        allocated = self.module.with_weights(
            *(
                stored_as(self.module.weights[n], f, candidates_of(self.module.weights[n])[f], 0.0)
                for n, f in formats.items()
            )
        )
        stream = self._forward(allocated, f"{title}, forward", keep=True)
        lost: list[float] = []

        def loss(logits: Tensor, batch: int) -> Tensor:
            log_p, log_q = self._log_p(batch)[:, :-1], logits[:, :-1].float().log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum()
            lost.append(float(kl.detach()))
            return kl

        slopes: Slopes = {}
        for _, weights, gradients in backward_segments(
            allocated, stream, self.ctx.store, self.ctx.progress, f"{title}, backward", loss=loss
        ):
            at_weights = _summed(gradients, self.module)
            if sum(lost) / self.positions >= below:
                break
            for name, gradient in at_weights.items():
                self._add(slopes, name, gradient / self.positions, weights(name))
        return sum(lost) / self.positions, slopes

    def _add(self, slopes: Slopes, name: str, gradient: Tensor, now: Tensor) -> None:
        weight = self.module.weights[name]
        if "candidates" not in weight.attrs:
            return
        own = slopes.setdefault(name, dict.fromkeys((FULL, *candidates_of(weight)), 0.0))
        for format_ in own:  # a weight that two segments read adds up
            there = candidate(weight, format_, self.ctx) if format_ else load_float(weight, self.ctx.store)
            own[format_] += float((gradient * (there - now)).sum())


def _summed(gradients: Iterator[LinearGradient], module: Module) -> dict[str, Tensor]:
    """Weight name → the gradient at the weight, over all batches of a segment."""
    found: dict[str, Tensor] = {}
    for gradient in gradients:
        ref = gradient.op.weight()
        assert ref is not None
        rows = module.weights[ref.name].type.shape[0]
        assert isinstance(rows, int)
        at_weight = gradient.at_weight(rows)
        if ref.name in found:
            found[ref.name] += at_weight
        else:
            found[ref.name] = at_weight
    return found
