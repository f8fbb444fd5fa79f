"""How a weight lies in memory for the kernels. All of it is done when a model is compiled.

Rows go in panels of 16, inputs in steps of 4. The codes of a step, 16 rows by 4 inputs, are the 64 lanes of
a vector, so that a 32-bit lane holds a row's four codes. A code is cut into planes of 8, 4, 2 or 1 bits (3
bits are 2 + 1); a byte of a plane has its lane's codes of as many steps as fit, the first in the low bits.
The steps that fill whole vectors of every plane are a superstep: 4, 8, 16 or 32 inputs.

    codes   u8  [panels, bytes]          a panel's supersteps one after the other, in each the planes
    scales  f16 or f32 [panels, groups, 16]
    zeros   u8  [panels, groups, 16]     not for symmetric formats

Rows and inputs that fill up the last panel and superstep have code 0 and scale 0.
"""

from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import Any, Final, TypeGuard

import numpy as np
import numpy.typing as npt

from gammac.diagnostics import CompileError
from gammac.formats import DoubleNormalFloat, Format, NormalFloat, Quantized
from gammac.targets.tvm.kernels.codebook import MIDDLE, PackedFormat, levels_of
from gammac.targets.tvm.kernels.isa import Isa

PANEL: Final = 16
STEP: Final = 4
LANES: Final = PANEL * STEP
ALIGN: Final = 64
# inputs that activations are padded to: the largest superstep
PADDING: Final = 32
_UNROLLED: Final = 128
_PLANES: Final = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def has_layout(format_: Format) -> TypeGuard[PackedFormat]:
    """Whether there are kernels for a format."""
    return isinstance(format_, PackedFormat) and not isinstance(format_, DoubleNormalFloat)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Layout:
    """Sizes of a packed weight [rows, columns]."""

    format: PackedFormat
    rows: int
    columns: int

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of each plane, the low bits of a code first."""
        return _PLANES[self.format.bits]

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """What codes name, where they are no numbers."""
        return levels_of(self.format)

    @property
    def same_zero(self) -> int | None:
        """The zero point that all groups have; None where each has its own, in `zeros`."""
        if isinstance(self.format, NormalFloat):
            return MIDDLE
        return self.format.midpoint if self.format.symmetric else None

    @property
    def superstep(self) -> int:
        """Inputs in a superstep."""
        return STEP * (8 // min(self.planes))

    @property
    def superstep_bytes(self) -> int:
        """Bytes of a superstep of one panel."""
        return self.superstep * PANEL * self.format.bits // 8

    @property
    def panels(self) -> int:
        """Panels of 16 rows."""
        return ceil_div(self.rows, PANEL)

    @property
    def panel_bytes(self) -> int:
        """Bytes of the codes of a panel."""
        return ceil_div(self.columns, self.superstep) * self.superstep_bytes

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return min(self.format.inputs_per_scale(self.columns), self.columns)

    @property
    def groups(self) -> int:
        """Scales in a row."""
        return ceil_div(self.columns, self.group)

    @property
    def padded_columns(self) -> int:
        """Length of a row of quantized activations."""
        return self.padded(self.columns)

    @staticmethod
    def padded(columns: int) -> int:
        """A number of inputs, rounded up to the largest superstep."""
        return ceil_div(columns, PADDING) * PADDING

    @cached_property
    def segment(self) -> int:
        """Inputs that are summed before a scale comes in: the group, or a part of a large one.

        It is the size of a group of quantized activations too. Raises CompileError for a group that cannot
        be cut so that the parts fill supersteps.
        """
        if self.group <= _UNROLLED and self.group % STEP == 0:
            return self.group
        parts = [n for n in (128, 96, 64, 32) if self.group % n == 0 or self.groups == 1]
        if not parts:
            raise CompileError(
                f"there is no kernel for groups of {self.group} inputs",
                hint="a multiple of 4 up to 128, a multiple of 32 above, or channel",
            )
        return parts[0]

    @property
    def block(self) -> int:
        """Inputs of the unrolled inner part of a kernel: whole segments and whole supersteps."""
        return lcm(self.segment, self.superstep)


def activation_group(format_: PackedFormat, columns: int) -> int:
    """Inputs that share a scale when activations are quantized for a weight. Raises CompileError."""
    return Layout(format_, 1, columns).segment


def _cut(codes: npt.NDArray[np.uint8], layout: Layout) -> npt.NDArray[np.uint8]:
    """Padded codes [rows, columns] to [panels, supersteps, steps, 64]."""
    panels, inputs = layout.panels, layout.superstep
    shape = (panels, PANEL, codes.shape[1] // inputs, inputs // STEP, STEP)
    return codes.reshape(shape).transpose(0, 2, 3, 1, 4).reshape(panels, -1, inputs // STEP, LANES)


def _pack_codes(codes: npt.NDArray[np.uint8], layout: Layout) -> npt.NDArray[np.uint8]:
    rows, inputs = layout.panels * PANEL, ceil_div(layout.columns, layout.superstep) * layout.superstep
    padded = np.zeros((rows, inputs), dtype=np.uint8)
    padded[: layout.rows, : layout.columns] = codes
    steps = _cut(padded, layout)
    parts, low = [], 0
    for bits in layout.planes:
        plane = (steps >> low) & ((1 << bits) - 1)
        plane = plane.reshape(*steps.shape[:2], -1, 8 // bits, LANES)
        packed = np.zeros((*plane.shape[:3], LANES), dtype=np.uint8)
        for i in range(8 // bits):
            packed |= plane[:, :, :, i] << np.uint8(bits * i)
        parts.append(packed.reshape(*steps.shape[:2], -1))
        low += bits
    return np.concatenate(parts, axis=2).reshape(layout.panels, layout.panel_bytes)


def _by_panel(values: npt.NDArray[Any], layout: Layout) -> npt.NDArray[Any]:
    """[rows, groups] to [panels, groups, 16]."""
    padded = np.zeros((layout.panels * PANEL, layout.groups), dtype=values.dtype)
    padded[: layout.rows] = values
    return np.ascontiguousarray(padded.reshape(layout.panels, PANEL, layout.groups).transpose(0, 2, 1))


def pack(quantized: Quantized, isa: Isa) -> dict[str, npt.NDArray[Any]]:
    """The buffers of a weight by the names of a kernel's operands. See this file's head.

    Raises CompileError for a group size that has no kernel.
    """
    rows, columns = quantized.codes.shape
    assert has_layout(quantized.format), f"{quantized.format.name} has no TVM kernel"
    layout = Layout(quantized.format, rows, columns)
    assert layout.segment  # raises
    packed = {
        "codes": _pack_codes(quantized.codes.numpy(), layout),
        "scales": _by_panel(quantized.scales.numpy().astype(isa.scale_dtype), layout),
    }
    if quantized.zeros is not None:
        packed["zeros"] = _by_panel(quantized.zeros.numpy(), layout)
    return packed


def packed_bytes(format_: PackedFormat, rows: int, columns: int, isa: Isa) -> int:
    """Bytes of all that `pack` returns, each buffer rounded up to 64."""
    layout = Layout(format_, rows, columns)
    values = layout.panels * layout.groups * PANEL
    sizes = [layout.panels * layout.panel_bytes, values * np.dtype(isa.scale_dtype).itemsize]
    if layout.same_zero is None:
        sizes.append(values)
    return sum(ceil_div(size, ALIGN) * ALIGN for size in sizes)
