"""How far allocations are from the full-precision module, and what each change of a format promises.

One forward and one backward pass of KL(full precision ‖ allocated) for each allocation, all of them
together block by block: memory holds one block's weights in each format, states lie on disk.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from gammac.calibration import LinearGradient, SegmentWeights, Stream, backward, run_segment
from gammac.formats import candidates_of
from gammac.ir import Module, Value
from gammac.ir.interpret import run_ops
from gammac.pipeline import Context
from gammac.trials import FormatWeights

Formats = Mapping[str, str]
ROWS: Final = 128  # positions whose probabilities are worked out at a time
FULL: Final = ""  # stands for full precision where format names are keys
# weight name → format name (or FULL) → first-order change of the KL, nats a predicted position
Slopes = dict[str, dict[str, float]]


class KlGradient:
    """The full-precision module on tokens i64 [windows, length], to compare allocations with."""

    def __init__(self, module: Module, tokens: Tensor, ctx: Context) -> None:
        self.module, self.tokens, self.ctx = module, tokens, ctx
        self.reference = Stream(module.functions["forward"], tokens)
        self.reference.start()
        for index in ctx.progress(range(len(self.reference.segments) - 1), "full precision"):
            run_segment(module, self.reference, ctx.store, lambda *_: None, index)
        self.head = SegmentWeights(module, ctx.store)

    @property
    def batches(self) -> int:
        """Into how many batches the tokens are split."""
        return len(self.reference.batches)

    def measure(self, formats: Formats, title: str) -> tuple[float, Slopes]:
        """The KL of an allocation, in nats a predicted position, and slopes.

        The slope of a weight's candidate b is ⟨∂KL/∂W, W_b − W⟩ at the allocated W.
        """
        found = self.measure_each([formats] * self.batches, title)
        counts = [batch[:, 1:].numel() for batch in self.reference.batches]
        shares = [count / sum(counts) for count in counts]
        kl = math.fsum(share * kl for share, (kl, _) in zip(shares, found, strict=True))
        slopes: Slopes = {}
        for name, own in found[0][1].items():
            slopes[name] = {
                f: math.fsum(share * s[name][f] for share, (_, s) in zip(shares, found, strict=True))
                for f in own
            }
        return kl, slopes

    def measure_each(self, allocations: Sequence[Formats], title: str) -> list[tuple[float, Slopes]]:
        """The same for an allocation of each batch's own."""
        run = _Run(self, allocations)
        for index in self.ctx.progress(range(len(run.stream.segments) - 1), f"{title}, forward"):
            run.forward(index)
        for index in self.ctx.progress(range(len(run.stream.segments) - 1, -1, -1), f"{title}, backward"):
            run.backward(index)
        return list(zip(run.kl, run.slopes, strict=True))

    def log_p(self, batch: int) -> Tensor:
        """The full-precision model's log-probabilities, f32 [windows, length - 1, vocab]."""
        stream = self.reference
        last = len(stream.segments) - 1
        segment, env = stream.segments[last], stream.load(last, batch)
        with torch.no_grad():
            run_ops(segment.ops, env, stream.sizes[batch], self.head, keep=segment.live_out)
        return env[segment.live_out[-1]][:, :-1].float().log_softmax(-1)


class MeanKl(torch.autograd.Function):
    """The mean over positions of KL(p ‖ q), nats, for logits of q and log p, f32 [windows, length, vocab].

    By hand, because the gradient at the logits is (q − p) / positions: autograd keeps five times as much.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_p: Tensor) -> Tensor:
        """A scalar; some positions at a time."""
        total, gradient = 0.0, torch.empty_like(log_p)
        positions = log_p[..., 0].numel()
        flat = (torch.split(t.flatten(0, -2), ROWS) for t in (logits, log_p, gradient))
        for z, p, g in zip(*flat, strict=True):
            log_q, chance = z.float().log_softmax(-1), p.exp()
            total += float(torch.dot(chance.flatten(), (p - log_q).flatten()))
            g.copy_(log_q.exp_().sub_(chance).div_(positions))
        ctx.save_for_backward(gradient)
        return torch.tensor(total / positions)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        """At the logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None


class _Run:
    """One allocation a batch, forwards and then backwards through the segments."""

    def __init__(self, full: KlGradient, allocations: Sequence[Formats]) -> None:
        self.full, self.allocations = full, allocations
        self.stream = Stream(full.module.functions["forward"], full.tokens)
        self.stream.start()
        self.kl = [0.0 for _ in allocations]
        self.slopes: list[Slopes] = [{} for _ in allocations]
        self.flowing: list[dict[Value, Tensor] | None] = [None for _ in allocations]

    def _weights(self) -> FormatWeights:
        return FormatWeights(self.full.module, self.full.ctx.store)

    def forward(self, index: int) -> None:
        """Run a segment but the last over all batches; what it read stays for the way back."""
        segment, weights = self.stream.segments[index], self._weights()
        for batch, formats in enumerate(self.allocations):
            env = self.stream.load(index, batch)
            with torch.no_grad():
                run_ops(
                    segment.ops, env, self.stream.sizes[batch], weights.allocated(formats),
                    keep=self.stream.segments[index + 1].live_in,
                )  # fmt: skip
            self.stream.save(index + 1, batch, env)

    def backward(self, index: int) -> None:
        """Run a segment again, and gradients back through it."""
        segment, weights = self.stream.segments[index], self._weights()
        for batch, formats in enumerate(self.allocations):
            gradients, self.flowing[batch] = backward(
                segment, self.stream.load(index, batch), self.stream, batch, self._loss,
                weights.allocated(formats), self.flowing[batch],
            )  # fmt: skip
            for gradient in gradients:
                self._add(batch, gradient, formats, weights)
        self.stream.forget(index)

    def _loss(self, logits: Tensor, batch: int) -> Tensor:
        """The mean KL over a batch's predicted positions."""
        kl: Any = MeanKl.apply(logits[:, :-1], self.full.log_p(batch))  # type: ignore[no-untyped-call]
        assert isinstance(kl, Tensor)
        self.kl[batch] = float(kl.detach())
        return kl

    def _add(self, batch: int, gradient: LinearGradient, formats: Formats, weights: FormatWeights) -> None:
        ref = gradient.op.weight()
        assert ref is not None
        weight = self.full.module.weights[ref.name]
        if "candidates" not in weight.attrs:
            return
        now = weights.get(ref.name, formats.get(ref.name, FULL))
        at_weight = gradient.at_weight(now.shape[0]).flatten()
        here = torch.dot(at_weight, now.flatten())
        own = self.slopes[batch].setdefault(ref.name, dict.fromkeys((FULL, *candidates_of(weight)), 0.0))
        for format_ in own:  # a weight that two segments read adds up
            own[format_] += float(torch.dot(at_weight, weights.get(ref.name, format_).flatten()) - here)
