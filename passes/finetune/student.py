"""An allocated model whose scales and norms can be learnt, run in memory a few windows at a time.

Memory holds one segment's weights, and of each window what every segment reads.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from gammac.calibration import Segment, inputs_of, segments
from gammac.formats import Quantized, load_chosen, load_float
from gammac.ir import Module, Op, Value, WeightRef
from gammac.ir.interpret import Env, bind, run_ops
from gammac.passes.finetune.scales import at_logs, scaled
from gammac.weights import WeightStore

READ_BY: Final = ("rms_norm", "layer_norm", "linear")  # ops whose vectors, gains and biases, are learnt
Loss = Callable[[Tensor], Tensor]  # logits f32 [n, length, vocab] to a scalar


@dataclass
class Learnt:
    """What is learnt: by weight name, the logarithm of what its scales are multiplied by,
    shaped as they are, and what is added to a norm's gain or a bias, in units of its root mean square."""

    scales: dict[str, Tensor] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, as the store keeps it."""
        return {f"{kind}:{n}": t for kind in ("scales", "vectors") for n, t in getattr(self, kind).items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Learnt":
        """The inverse of `tensors`."""
        found = cls()
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            getattr(found, kind)[name] = tensor
        return found


class Student:
    """A module whose weights are codes in their formats, with scales and vectors that move."""

    def __init__(self, module: Module, store: WeightStore, *, vectors: bool = True) -> None:
        self.module, self.store = module, store
        self.function = module.functions["forward"]
        self.segments = segments(self.function)
        self.learnt = Learnt()
        for op in self.function.ops:
            self._admit(op, vectors)

    def _admit(self, op: Op, vectors: bool) -> None:
        for ref in (o for o in op.operands if isinstance(o, WeightRef)):
            weight = self.module.weights[ref.name]
            if weight.attrs.get("role") == "block" and "format" in weight.attrs:
                self.learnt.scales[ref.name] = torch.zeros_like(self.codes(ref.name).scales.float())
            elif vectors and weight.type.rank == 1 and op.name in READ_BY:
                self.learnt.vectors[ref.name] = torch.zeros(weight.type.numel())

    def codes(self, name: str) -> Quantized:
        """A weight in the format that it was given."""
        return load_chosen(self.module.weights[name], self.store)

    def scaled(self, name: str) -> Quantized:
        """A weight with the scales that were learnt, rounded as they are stored."""
        return scaled(self.codes(name), self.learnt.scales[name])

    def vector(self, name: str) -> Tensor:
        """A norm's gain or a bias as learnt."""
        start = load_float(self.module.weights[name], self.store)
        return start + _size(start) * self.learnt.vectors[name]

    def weight(self, name: str) -> Tensor:
        """Any weight as f32."""
        if name in self.learnt.scales:
            return self.scaled(name).dequantize()
        if name in self.learnt.vectors:
            return self.vector(name)
        if "format" in self.module.weights[name].attrs:
            return self.codes(name).dequantize()
        return load_float(self.module.weights[name], self.store)

    # ---- forwards and backwards -----------------------------------------------------------------

    def forward(self, windows: Tensor) -> "Run":
        """Run windows i64 [n, length] up to the last segment."""
        env, sizes = bind(self.function, inputs_of(self.function, windows))
        states: list[Env] = []
        for index, segment in enumerate(self.segments):
            states.append({v: env[v] for v in segment.live_in})
            if index + 1 < len(self.segments):
                with torch.no_grad():
                    run_ops(segment.ops, env, sizes, self.weight, keep=self.segments[index + 1].live_in)
        return Run(self, states, sizes)


@dataclass
class Run:
    """Some windows behind their forward run."""

    student: Student
    states: list[Env]
    sizes: dict[str, int]

    def logits(self) -> Tensor:
        """f32 [n, length, vocab]."""
        segment, env = self.student.segments[-1], dict(self.states[-1])
        with torch.no_grad():
            run_ops(segment.ops, env, self.sizes, self.student.weight, keep=segment.live_out)
        return env[segment.live_out[-1]]

    def backward(self, loss: Loss) -> tuple[float, Iterator[tuple[str, Tensor]]]:
        """The loss of the logits, and, as they come, gradients at what is learnt, by weight name.

        The gradients of a name that two segments read come in two parts.
        """
        segment, env, leaves = self._prepared(len(self.states) - 1)
        value = loss(env[segment.live_out[-1]])
        return float(value.detach()), self._gradients(segment, env, leaves, value)

    def _prepared(self, index: int) -> tuple[Segment, Env, dict[str, Tensor]]:
        """A segment run again with autograd; its learnt weights and float inputs are leaves."""
        segment, leaves = self.student.segments[index], {}
        learnt = self.student.learnt

        def weight(name: str) -> Tensor:
            if name not in leaves:
                found = self.student.weight(name)
                leaves[name] = found.requires_grad_(name in learnt.scales or name in learnt.vectors)
            return leaves[name]

        env = {v: _leaf(t) for v, t in self.states[index].items()}
        run_ops(segment.ops, env, self.sizes, weight, [*segment.live_in, *segment.live_out])
        return segment, env, leaves

    def _gradients(
        self, segment: Segment, env: Env, leaves: dict[str, Tensor], value: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        roots: list[Tensor] = [value]
        at_roots: list[Tensor | None] = [None]
        flowing: dict[Value, Tensor] = {}
        for index in range(len(self.states) - 1, -1, -1):
            if index < len(self.states) - 1:
                segment, env, leaves = self._prepared(index)
                reached = [v for v in segment.live_out if v in flowing and env[v].requires_grad]
                roots, at_roots = [env[v] for v in reached], [flowing.pop(v) for v in reached]
            inputs = [v for v in segment.live_in if env[v].requires_grad]
            names = [n for n, t in leaves.items() if t.requires_grad]
            if not roots or not (inputs or names):
                continue
            wanted = [leaves[n] for n in names] + [env[v] for v in inputs]
            found = torch.autograd.grad(roots, wanted, at_roots, allow_unused=True)
            for v, gradient in zip(inputs, found[len(names) :], strict=True):
                if gradient is not None:
                    flowing[v] = flowing[v] + gradient if v in flowing else gradient
            self.states[index] = {}
            for name, gradient in zip(names, found, strict=False):
                if gradient is not None:
                    yield name, self._at_learnt(name, gradient)

    def _at_learnt(self, name: str, gradient: Tensor) -> Tensor:
        """From the gradient at a weight to the one at what is learnt of it."""
        learnt = self.student.learnt
        if name in learnt.vectors:
            return gradient * _size(load_float(self.student.module.weights[name], self.student.store))
        return at_logs(self.student.scaled(name), gradient)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def _size(vector: Tensor) -> Tensor:
    return vector.square().mean().sqrt().clamp(min=1e-12)
