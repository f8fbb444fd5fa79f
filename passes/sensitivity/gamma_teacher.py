"""The full-precision model as GAMMA's teacher: what each block reads and puts out, and how much that matters.

States and gradients of all segments lie on disk, one file a segment and batch; memory holds one batch.
"""

from collections.abc import Mapping

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gammac.calibration import LinearGradient, Segment, Stream, backward_segments, run_up_to_last
from gammac.ir import Module, Value
from gammac.ir.interpret import Env, Weights, run_ops
from gammac.passes.sensitivity.scores import differences
from gammac.pipeline import Context


class Teacher:
    """A module on calibration tokens i64 [windows, length], from which its segments learn one by one.

    The gradients are those of the negative log-likelihood, in nats, of tokens that the model itself
    draws: their outer products are its Fisher information, the curvature of the KL divergence.
    `curvatures`: by weight and format, what a candidate in a block would lose by that, all others in full
    precision: the mean over all tokens of ½ (g · (y_b − y))², in nats, g the gradient at the linear's
    output y. They take a product for each candidate; without `curvatures` they are left out.
    """

    def __init__(self, module: Module, tokens: Tensor, ctx: Context, curvatures: bool = True) -> None:
        self.stream = Stream(module.functions["forward"], tokens)
        self.segments = self.stream.segments
        self.tokens, self.batches = tokens, len(self.stream.batches)
        run_up_to_last(module, self.stream, ctx.store, ctx.progress, "gamma (teacher, forward)")
        generator = torch.Generator().manual_seed(ctx.seed)

        def loss(logits: Tensor, batch: int) -> Tensor:
            log_p = logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            return -log_p.gather(1, drawn).sum()

        runs = backward_segments(
            module, self.stream, ctx.store, ctx.progress, "gamma (teacher, backward)",
            loss=loss, arriving=self._keep,
        )  # fmt: skip
        self.curvatures: dict[str, dict[str, float]] = {}
        for segment, weights, gradients in runs:
            read = [module.weights[name] for name in _read(segment)] if curvatures else []
            deltas = {
                w.name: differences(w, weights(w.name).detach(), ctx)
                for w in read
                if w.attrs.get("role") == "block" and "candidates" in w.attrs
            }
            for gradient in gradients:
                self._add(gradient, deltas)

    def _add(self, found: LinearGradient, deltas: Mapping[str, Mapping[str, Tensor]]) -> None:
        ref = found.op.weight()
        assert ref is not None
        for format_, delta in deltas.get(ref.name, {}).items():
            by_token = found.output_change(delta).mul_(found.gradient).sum(-1)
            own = self.curvatures.setdefault(ref.name, {})
            own[format_] = own.get(format_, 0.0) + 0.5 * float(by_token.square().sum()) / self.tokens.numel()

    def _keep(self, index: int, batch: int, gradients: Mapping[Value, Tensor]) -> None:
        live_out = self.segments[index].live_out
        arrays = {str(live_out.index(v)): g.contiguous() for v, g in gradients.items() if v in live_out}
        save_file(arrays, self._path(index, batch))

    def _path(self, index: int, batch: int) -> str:
        return str(self.stream.folder / f"gradient-{index}-{batch}.safetensors")

    def reads(self, index: int, batch: int) -> Env:
        """What a segment reads."""
        return self.stream.load(index, batch)

    def puts_out(self, index: int, batch: int) -> Env:
        """What a segment but the last puts out."""
        following = self.stream.load(index + 1, batch)
        return {v: following[v] for v in self.segments[index].live_out if v in following}

    def gradients(self, index: int, batch: int) -> Env:
        """∂(negative log-likelihood) / ∂ what a segment but the last puts out, where it reaches."""
        arrays = load_file(self._path(index, batch))
        return {v: arrays[str(i)] for i, v in enumerate(self.segments[index].live_out) if str(i) in arrays}

    def weights_of(self, index: int) -> list[str]:
        """The names of the weights that a segment's linears and embeddings read."""
        return _read(self.segments[index])

    def fresh_stream(self) -> Stream:
        """A stream over the same tokens, at its start: for a student that reads its own states."""
        stream = Stream(self.stream.function, self.tokens)
        stream.start()
        return stream

    def run(self, index: int, batch: int, stream: Stream, weights: Weights) -> Env:
        """What a segment puts out with these weights on the states of `stream`; gradients flow to them."""
        segment, env = self.segments[index], stream.load(index, batch)
        run_ops(segment.ops, env, stream.sizes[batch], weights, keep=segment.live_out)
        return {v: env[v] for v in segment.live_out}

    def advance(self, index: int, stream: Stream, weights: Weights) -> None:
        """Run a student's segment over all batches, for the next segment to read."""
        segment, following = self.segments[index], self.segments[index + 1].live_in
        for batch in range(self.batches):
            env = stream.load(index, batch)
            with torch.no_grad():
                run_ops(segment.ops, env, stream.sizes[batch], weights, keep=following)
            stream.save(index + 1, batch, env)
        stream.forget(index)

    def log_p(self, batch: int, weights: Weights) -> Tensor:
        """Log-probabilities behind the last segment with these weights, f32 [windows, length - 1, vocab]."""
        last = len(self.segments) - 1
        out = self.run(last, batch, self.stream, weights)
        return out[self.segments[last].live_out[-1]][:, :-1].float().log_softmax(-1)


def _read(segment: Segment) -> list[str]:
    refs = (op.weight() for op in segment.linears())
    return list(dict.fromkeys(ref.name for ref in refs if ref is not None))
