"""What a kernel takes and writes, as data, and the declaration of its parameters."""

from dataclasses import dataclass
from typing import Any

from gammac.targets.tvm.kernels.isa import Isa
from gammac.targets.tvm.kernels.layout import PANEL, Layout, ceil_div
from gammac.targets.tvm.tir.vectors import T

Expr = Any
TOKENS = "m"


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel takes or writes. A size that is not known is `m`, the number of tokens."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class Kernel:
    """A PrimFunc of `inputs` that writes `outputs`: its parameters in this order."""

    name: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    func: Any

    @property
    def operands(self) -> tuple[Operand, ...]:
        """All of them."""
        return (*self.inputs, *self.outputs)


def weight_operands(layout: Layout, isa: Isa, suffix: str = "") -> tuple[Operand, ...]:
    """The buffers that `pack` makes. `suffix` tells several weights of one kernel apart."""
    per_group = (layout.panels, layout.groups, PANEL)
    zeros = () if layout.same_zero is not None else (Operand(f"zeros{suffix}", per_group, "uint8"),)
    offsets = (Operand(f"offsets{suffix}", per_group, isa.scale_dtype),) if layout.around else ()
    return (
        Operand(f"codes{suffix}", (layout.panels, layout.panel_bytes), "uint8"),
        Operand(f"scales{suffix}", per_group, isa.scale_dtype),
        *zeros,
        *offsets,
    )


def activation_operands(layout: Layout, integer: bool, tokens: int | str) -> tuple[Operand, ...]:
    """x, or what `quantize_activations` makes of it."""
    if not integer:
        return (Operand("x", (tokens, layout.columns), "float32"),)
    return quantized_operands(layout.columns, layout.segment, tokens)


def quantized_operands(columns: int, group: int, tokens: int | str) -> tuple[Operand, ...]:
    """int8 activations: padded with zeros, a scale for each group of inputs, and the group's sum."""
    groups = (tokens, ceil_div(columns, group))
    return (
        Operand("x_codes", (tokens, Layout.padded(columns)), "int8"),
        Operand("x_scales", groups, "float32"),
        Operand("x_sums", groups, "int32"),
    )


def declare(operands: tuple[Operand, ...], tokens: Expr) -> dict[str, Any]:
    """The parameters of the function under construction."""
    return {
        o.name: T.arg(o.name, T.buffer(tuple(tokens if s == TOKENS else s for s in o.shape), o.dtype))
        for o in operands
    }


def flat(buffer: Any) -> Any:
    """The same memory with one index: a row's place is worked out once, not at each use."""
    size = buffer.shape[0] * buffer.shape[1]
    return T.decl_buffer((size,), buffer.dtype, data=buffer.data, align=64)
