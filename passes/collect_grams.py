"""Run calibration text through the model and keep, for each linear, the Gram matrix of its inputs.

    weight @model.layers.0.mlp.up_proj.weight : f32[512,192] = sha256:… {role = "block"}
->
    weight @model.layers.0.mlp.up_proj.weight : f32[512,192] = sha256:… {role = "block", gram = "sha256:…"}

The matrix is the mean of x xᵀ over all calibration tokens, f32 [inputs, inputs], with the inputs of
the full-precision model. Linears that read the same value share one matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gammac.calibration import Segment, SegmentWeights
from gammac.diagnostics import Diagnostic
from gammac.ir import Module, Op, Operand, WeightRef
from gammac.passes.by_segment import collect_by_segment
from gammac.pipeline import Context, Invariant


def weights_have_grams(module: Module) -> Iterator[Diagnostic]:
    """Every weight with a role that a linear reads has a Gram matrix."""
    read = {op.weight() for f in module.functions.values() for op in f.ops if op.name == "linear"}
    for ref in read:
        weight = module.weights[ref.name] if ref else None
        if weight and "role" in weight.attrs and not weight.attrs.keys() & {"gram", "stored"}:
            yield Diagnostic("has no Gram matrix", weight.name, "run collect_grams first")


@dataclass(frozen=True)
class CollectGrams:
    """See the module's text."""

    name: ClassVar[str] = "collect_grams"
    reads: ClassVar[tuple[str, ...]] = ("calibration",)
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_grams,)

    def run(self, module: Module, ctx: Context) -> Module:
        """Each finished block is remembered: a killed run goes on behind it."""
        grams = collect_by_segment(module, ctx, self.name, "calibrating", lambda: GramSums(module))
        return module.with_weights(*(module.weights[n].with_attrs(gram=d) for n, d in grams.items()))


class GramSums:
    """Sums of x xᵀ for the linears of a segment, one for each distinct input."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.sums: dict[Operand, Tensor] = {}
        self.counts: dict[Operand, int] = {}
        self.readers: dict[str, Operand] = {}

    def visit(self, segment: Segment, weights: SegmentWeights, op: Op, tensors: list[Tensor]) -> None:
        """Add one batch of one linear's input."""
        self.add(op, tensors)

    def add(self, op: Op, tensors: list[Tensor]) -> None:
        """The same, of an op with its operands; other ops than linears with a role add nothing."""
        ref, value = op.weight(), op.operands[0]
        if (
            not isinstance(ref, WeightRef)
            or op.name != "linear"
            or "role" not in self.module.weights[ref.name].attrs
        ):
            return
        first = self.readers.setdefault(ref.name, value) is value and self._owner(value) == ref.name
        if not first:
            return
        x = tensors[0].flatten(0, -2).float()
        if value not in self.sums:
            self.sums[value] = torch.zeros(x.shape[1], x.shape[1])
            self.counts[value] = 0
        self.sums[value].addmm_(x.t(), x)
        self.counts[value] += len(x)

    def _owner(self, value: Operand) -> str:
        return next(name for name, v in self.readers.items() if v is value)

    def mean(self, weight: str) -> Tensor:
        """The Gram matrix of a weight's input."""
        value = self.readers[weight]
        return self.sums[value] / self.counts[value]

    def results(self, ctx: Context) -> dict[str, str]:
        """Store every matrix; weight name → digest."""
        digests = {value: ctx.store.put({"data": s / self.counts[value]}) for value, s in self.sums.items()}
        return {name: digests[value] for name, value in self.readers.items()}
