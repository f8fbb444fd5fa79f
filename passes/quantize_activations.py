"""Round what the blocks' linears read to few bits.

    %1 = rms_norm %0, @norm                       one for q, k and v
    %2 = linear %1, @q
->
    %1 = rms_norm %0, @norm
    %2 = fake_quantize %1 {bits = 8}              a8tensor: {bits = 8, scale = 0.0213}
    %3 = linear %2, @q

`a8token`, or `a8` for short: a step for each token, from its largest magnitude. `a8tensor`: one step for the
whole value, from the largest magnitude in the calibration text, so what stands out further is cut off
(SmoothQuant, arXiv 2211.10438, section 2, dynamic and static). With weights that have one scale a row, such
as w8channel-sym, a linear is then integers times integers. Norms, softmax, residuals, embedding and head
stay as they are; scores and codes were chosen before, for activations in full precision.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from torch import Tensor

from gammac.calibration import Segment, SegmentWeights
from gammac.diagnostics import CompileError
from gammac.ir import Builder, Function, Module, Op, Operand, Value, rewrite
from gammac.passes.by_segment import collect_by_segment
from gammac.pipeline import Context, Invariant, full_options_text

SMALLEST: Final = 1e-5
"""Magnitude of a value that was zero all along."""


@dataclass(frozen=True)
class ActivationFormat:
    """Symmetric integers; `static` has one step for a whole value, found on calibration text."""

    bits: int
    static: bool

    @property
    def weights(self) -> str:
        """The weight format that goes with it: one scale a row, no zero point."""
        return f"w{self.bits}channel-sym"


def parse_activations(text: str) -> ActivationFormat:
    """Read a8, a8token or a8tensor. Raises CompileError that shows the spelling."""
    match = re.fullmatch(r"a([2-8])(token|tensor)?", text.strip())
    if not match:
        raise CompileError(
            f"{text!r} is no activation format", hint="write a8token (or a8) or a8tensor (bits 2 to 8)"
        )
    return ActivationFormat(int(match[1]), match[2] == "tensor")


@dataclass(frozen=True)
class QuantizeActivations:
    """See the module's text."""

    name: ClassVar[str] = "quantize_activations"
    reads: ClassVar[tuple[str, ...]] = ("calibration",)
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()
    format: str = "a8token"

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError for an unknown format, or a static one without calibration text."""
        format_ = parse_activations(self.format)
        largest: Mapping[str, float] = {}
        if format_.static:
            largest = collect_by_segment(
                module, ctx, full_options_text(self), "calibrating activations", lambda: _Largest(module)
            )
        return round_inputs(module, format_, largest)


def _is_of_block(op: Op, module: Module) -> bool:
    ref = op.weight()
    return op.name == "linear" and ref is not None and module.weights[ref.name].attrs.get("role") == "block"


@dataclass
class _Largest:
    """The largest magnitude that each linear of a segment reads."""

    module: Module
    found: dict[str, float] = field(default_factory=dict)

    def visit(self, segment: Segment, weights: SegmentWeights, op: Op, tensors: list[Tensor]) -> None:
        ref = op.weight()
        if ref is not None and _is_of_block(op, self.module):
            self.found[ref.name] = max(self.found.get(ref.name, SMALLEST), float(tensors[0].abs().max()))

    def results(self, ctx: Context) -> dict[str, Any]:
        return dict(self.found)


@dataclass(frozen=True)
class Rounding:
    """How what a linear reads is rounded; without a `scale` each token has its own step."""

    bits: int
    scale: float | None = None


def round_inputs(module: Module, format_: ActivationFormat, largest: Mapping[str, float]) -> Module:
    """The module with rounded inputs; `largest` magnitudes by weight name where the format is static."""
    top = 2 ** (format_.bits - 1) - 1
    names = (name for name, w in module.weights.items() if w.attrs.get("role") == "block")
    steps = {n: float(f"{largest[n] / top:.6g}") if format_.static else None for n in names}
    return round_each(module, {n: Rounding(format_.bits, step) for n, step in steps.items()})


def round_each(module: Module, rounded: Mapping[str, Rounding]) -> Module:
    """The module with the inputs of these block weights rounded; linears that read one value share the
    first one's. Raises CompileError for an input that is rounded already."""
    return module.with_functions(*(_rounded(f, module, rounded) for f in module.functions.values()))


def _rounded(function: Function, module: Module, rounded: Mapping[str, Rounding]) -> Function:
    made: dict[Operand, Value] = {}
    producers = function.producers()

    def rule(b: Builder, op: Op, operands: tuple[Operand, ...]) -> Sequence[Operand] | None:
        ref, x = op.weight(), op.operands[0] if op.operands else None
        if ref is None or not _is_of_block(op, module) or not isinstance(x, Value) or ref.name not in rounded:
            return None
        if x in producers and producers[x].name == "fake_quantize":
            raise CompileError("its input is quantized already", loc=op.loc, hint="quantize activations once")
        if x not in made:
            how = rounded[ref.name]
            step = {} if how.scale is None else {"scale": how.scale}
            made[x] = b.emit("fake_quantize", operands[0], loc=op.loc, bits=how.bits, **step)
        return b.emit_all(op.name, made[x], *operands[1:], loc=op.loc, **op.attrs)

    return rewrite(function, rule)
