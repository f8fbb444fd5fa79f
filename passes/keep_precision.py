"""Say where 32-bit floats stay, whatever a backend computes the rest in.

    %1 = rms_norm %0, @norm {eps = 1e-05} : f32[batch,seq,64]
    %2 = residual_add %0, %1 : f32[batch,seq,64]
->
    %1 = rms_norm %0, @norm {eps = 1e-05, compute = "f32"} : f32[batch,seq,64]
    %2 = residual_add %0, %1 {compute = "f32"} : f32[batch,seq,64]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from gammac.diagnostics import Diagnostic
from gammac.ir import Builder, Module, Op, Operand, rewrite
from gammac.pipeline import Context, Invariant

HIGH_PRECISION: Final = ("softmax", "attention", "rms_norm", "layer_norm", "residual_add")
"""Ops that lose accuracy when they are computed in fewer than 32 bits: sums of many terms, and the
stream that every layer adds to."""


def softmax_and_residuals_are_high_precision(module: Module) -> Iterator[Diagnostic]:
    """Invariant: softmax, attention, norms and residual sums are computed, and kept, in f32."""
    for function in module.functions.values():
        for op in function.ops:
            if op.name not in HIGH_PRECISION:
                continue
            if op.attrs.get("compute") != "f32":
                yield Diagnostic(f"{op.name} has no compute = f32", op.loc, "run keep_precision first")
            elif op.name == "residual_add" and op.result.type.dtype != "f32":
                yield Diagnostic(f"the residual stream is {op.result.type.dtype}, not f32", op.loc)


@dataclass(frozen=True)
class KeepPrecision:
    """Pin what must be computed in 32 bits."""

    name: ClassVar[str] = "keep_precision"
    reads: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()
    keeps: ClassVar[tuple[Invariant, ...]] = (softmax_and_residuals_are_high_precision,)

    def run(self, module: Module, ctx: Context) -> Module:
        """The module with `compute` on those ops."""
        return module.with_functions(*(rewrite(f, _pin) for f in module.functions.values()))


def _pin(b: Builder, op: Op, operands: tuple[Operand, ...]) -> Sequence[Operand] | None:
    if op.name not in HIGH_PRECISION:
        return None
    return b.emit_all(op.name, *operands, loc=op.loc, **{**op.attrs, "compute": "f32"})
