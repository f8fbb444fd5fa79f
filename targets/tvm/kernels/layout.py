"""How a weight lies in memory for the kernels. All of it is done when a model is compiled.

Rows go in panels of 16, inputs in steps of 4. The codes of a step, 16 rows by 4 inputs, are the 64 lanes of
a vector, so that a 32-bit lane holds a row's four codes. A code is cut into planes of 8, 4, 2 or 1 bits (3
bits are 2 + 1); a byte of a plane has its lane's codes of as many steps as fit, the first in the low bits.
The steps that fill whole vectors of every plane are a superstep: 4, 8, 16 or 32 inputs.

    codes   u8  [panels, bytes]          a panel's supersteps one after the other, in each the planes
    scales  f16 or f32 [panels, groups, 16]
    offsets f16 or f32 [panels, groups, 16]  only of formats around offsets
    zeros   u8  [panels, groups, 16]     not for symmetric formats

Rows and inputs that fill up the last panel and superstep have code 0 and scale 0.

Of a 2:4 weight a row keeps two codes a step, so that those of two steps share a lane; behind a superstep's
planes of codes come those of positions, a lane's bytes being those of four steps: the first position in the
low two bits, the second above it (3 bits: the number of the pattern).
"""

from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import Final, TypeGuard

import numpy as np
import numpy.typing as npt

from gammac.diagnostics import CompileError
from gammac.formats import (
    DoubleNormalFloat,
    Format,
    IntegerFormat,
    NormalFloat,
    OffsetNormalFloat,
    Quantized,
    TrellisFormat,
    TwoFourFormat,
)
from gammac.formats.two_four import KEPT, PATTERN_BITS, PATTERNS
from gammac.targets.tvm import panels
from gammac.targets.tvm.kernels.codebook import MIDDLE, levels_of

PANEL: Final = panels.PANEL  # second factors of branches lie in those, and are read beside these
STEP: Final = 4
LANES: Final = PANEL * STEP
ALIGN: Final = 64
# inputs that activations are padded to: the largest superstep
PADDING: Final = 32
_UNROLLED: Final = 128
_PLANES: Final = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}

Packable = IntegerFormat | NormalFloat | TwoFourFormat | TrellisFormat


def has_layout(format_: Format) -> TypeGuard[Packable]:
    """Whether there are kernels for a format."""
    if isinstance(format_, TwoFourFormat):
        return not format_.is_float
    return isinstance(format_, Packable) and not isinstance(format_, DoubleNormalFloat)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Layout:
    """Sizes of a packed weight [rows, columns]."""

    format: Packable
    rows: int
    columns: int

    @property
    def grid(self) -> IntegerFormat | NormalFloat:
        """What codes stand for."""
        assert not isinstance(self.format, TrellisFormat), "its codes stand for nothing alone"
        return self.format.grid if isinstance(self.format, TwoFourFormat) else self.format

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of each plane, the low bits of a code first."""
        return _PLANES[self.grid.bits]

    @property
    def index_planes(self) -> tuple[int, ...]:
        """The same for positions, which only 2:4 weights have."""
        return _PLANES[self.format.index_bits] if isinstance(self.format, TwoFourFormat) else ()

    @property
    def per_lane(self) -> int:
        """Steps whose codes share a lane."""
        return STEP // KEPT if self.index_planes else 1

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """What codes name, where they are no numbers."""
        return levels_of(self.format)

    @property
    def computed(self) -> bool:
        """Whether values are computed from codes, which takes longer than multiplying them by one token."""
        return False

    @property
    def value_bits(self) -> int:
        """Of the bytes that are multiplied by int8 inputs."""
        return 8 if self.levels else self.grid.bits

    @property
    def same_zero(self) -> int | None:
        """The zero point that all groups have; None where each has its own, in `zeros`."""
        grid = self.grid
        if isinstance(grid, NormalFloat):
            return MIDDLE
        return grid.midpoint if grid.symmetric else None

    @property
    def around(self) -> bool:
        """Whether each group has an offset, which is added to what its codes stand for."""
        return isinstance(self.format, OffsetNormalFloat)

    @property
    def superstep(self) -> int:
        """Inputs in a superstep."""
        steps = lcm(self.per_lane * 8 // min(self.planes), *(STEP * 8 // n for n in self.index_planes[-1:]))
        return STEP * steps

    @property
    def code_bytes(self) -> int:
        """Bytes of a superstep's codes of one panel; its positions lie behind them."""
        return self.superstep // self.per_lane * PANEL * self.grid.bits // 8

    @property
    def superstep_bytes(self) -> int:
        """Bytes of a superstep of one panel."""
        return self.code_bytes + self.superstep // STEP * PANEL * sum(self.index_planes) // 8

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

    @staticmethod
    def padded(columns: int) -> int:
        """Length of a row of quantized activations: its inputs, rounded up to the largest superstep."""
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


def activation_group(format_: Packable, columns: int) -> int:
    """Inputs that share a scale when activations are quantized for a weight. Raises CompileError."""
    return Layout(format_, 1, columns).segment


def _cut(codes: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.uint8]:
    """Padded codes [rows, columns], `width` a superstep, to [panels, supersteps, lanes of steps, 64]."""
    panels = len(codes) // PANEL
    shape = (panels, PANEL, codes.shape[1] // width, width // STEP, STEP)
    return codes.reshape(shape).transpose(0, 2, 3, 1, 4).reshape(panels, -1, width // STEP, LANES)


def _pack_codes(
    codes: npt.NDArray[np.uint8], layout: Layout, planes: tuple[int, ...], width: int
) -> npt.NDArray[np.uint8]:
    """Codes [rows, columns], `width` a superstep, in planes: [panels, supersteps, bytes]."""
    supersteps = ceil_div(layout.columns, layout.superstep)
    padded = np.zeros((layout.panels * PANEL, supersteps * width), dtype=np.uint8)
    padded[: layout.rows, : codes.shape[1]] = codes
    steps = _cut(padded, width)
    parts, low = [], 0
    for bits in planes:
        plane = (steps >> low) & ((1 << bits) - 1)
        plane = plane.reshape(*steps.shape[:2], -1, 8 // bits, LANES)
        packed = np.zeros((*plane.shape[:3], LANES), dtype=np.uint8)
        for i in range(8 // bits):
            packed |= plane[:, :, :, i] << np.uint8(bits * i)
        parts.append(packed.reshape(*steps.shape[:2], -1))
        low += bits
    return np.concatenate(parts, axis=2)


def _positions(patterns: npt.NDArray[np.uint8], layout: Layout) -> npt.NDArray[np.uint8]:
    """Patterns as they are packed: two positions, or their number."""
    if layout.format.index_bits == PATTERN_BITS:  # type: ignore[union-attr]
        return patterns
    return np.array([first | second << 2 for first, second in PATTERNS], np.uint8)[patterns]


def pack_codes(quantized: Quantized, layout: Layout) -> npt.NDArray[np.uint8]:
    """Codes u8 [panels, panel bytes], with the positions of a 2:4 weight. See this file's head."""
    codes = quantized.codes.numpy()
    parts = [_pack_codes(codes, layout, layout.planes, layout.superstep // layout.per_lane)]
    if layout.index_planes:
        positions = _positions(quantized.parts["patterns"].numpy(), layout)
        parts.append(_pack_codes(positions, layout, layout.index_planes, layout.superstep // STEP))
    return np.concatenate(parts, axis=2).reshape(layout.panels, layout.panel_bytes)
