"""Trellis codes in the kernels: how they lie in memory, and what unpacks 16 rows of a column at a time.

    codes   u8  [tiles][columns][panels of the tile][2k]     k bits a weight
    scales  f16 or f32 [panels, groups, 16]

A column's stream is turned around, so that the first row's code is on top: the state of a row are the L bits
from its own code upwards, and a panel's 16 rows are 2k bytes in a row. The bits above the first row are those
of the last one. One load, one choice of bytes and one shift by lanes make 16 states; a product and the sum
of its bytes make their values, so that nothing is looked up. Those are bytes again: four columns share the
lanes of a vector, as four codes of a step do in other formats, and what multiplies is the same.

Columns are filled up to whole steps with codes of 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gammac.diagnostics import CompileError
from gammac.formats import Quantized, TrellisFormat, tile_bounds
from gammac.formats.trellis import DROPPED_BITS, MIDDLE, MULTIPLIERS, STEP_BITS, unpack
from gammac.targets.tvm.kernels.isa import Isa
from gammac.targets.tvm.kernels.layout import PANEL, STEP, Layout, ceil_div
from gammac.targets.tvm.kernels.operands import flat
from gammac.targets.tvm.kernels.panel import Panel
from gammac.targets.tvm.tir.vectors import T, splat, splat_int, tirx

Expr = Any

_LANE_BYTES: Final = 4
_WORD: Final = 8  # bytes that are repeated over a vector
_WIDE: Final = 16  # the same where 2k bytes and those above them are more
_EACH_SECOND_BYTE: Final = 0x00FF00FF
_SUM_BITS: Final = 0x7FF
_OF_STEP: Final = (0xFF, 0xFF00, 0xFF0000, -0x1000000)  # the byte of each column of a step


@dataclass(frozen=True)
class TrellisLayout(Layout):
    """Sizes of a packed weight [rows, columns]. Raises CompileError where panels don't fill the tiles."""

    format: TrellisFormat

    def __post_init__(self) -> None:
        if self.rows % PANEL:
            raise CompileError(
                f"{self.format.name} has a TVM kernel for multiples of {PANEL} rows, not for {self.rows}",
                hint="leave such a weight to an integer format",
            )

    planes = index_planes = levels = ()
    same_zero = MIDDLE
    around = False
    computed = True
    superstep = STEP
    value_bits = 8

    @property
    def row_bytes(self) -> int:
        """Of a panel in a column."""
        return PANEL * self.format.bits // 8

    @property
    def panel_bytes(self) -> int:
        """Bytes of the codes of a panel."""
        return ceil_div(self.columns, STEP) * STEP * self.row_bytes

    @property
    def tiles(self) -> int:
        """Parts of a column that have a stream each."""
        return len(tile_bounds(self.rows)) - 1


def pack_streams(quantized: Quantized, layout: TrellisLayout) -> npt.NDArray[np.uint8]:
    """Codes u8 [panels, panel bytes]; see this file's head."""
    bits = layout.format.bits
    codes = unpack(quantized.parts["packed"], bits, layout.rows).numpy()
    parts = []
    for first, last in pairwise(tile_bounds(layout.rows)):
        upwards = codes[:, first:last][:, ::-1, None] >> np.arange(bits, dtype=np.uint8) & 1
        stream = np.packbits(upwards.reshape(len(codes), -1), axis=1, bitorder="little")
        parts.append(np.pad(stream, ((0, -len(codes) % STEP), (0, 0))).reshape(-1))
    return np.concatenate(parts).reshape(layout.panels, layout.panel_bytes)


class TrellisPanel(Panel):
    """One panel of a packed weight whose buffers are `buffers`."""

    layout: TrellisLayout

    def __init__(self, layout: TrellisLayout, buffers: Mapping[str, Any], number: Expr, isa: Isa) -> None:
        super().__init__(layout, buffers, number, prefetch=False)
        self.isa, self._stream = isa, flat(buffers["codes"])
        tiles, panels, size = layout.tiles, layout.panels, layout.row_bytes
        # tiles begin where `tile_bounds` says: at panel tile * panels // tiles
        tile = T.Bind(((number + 1) * tiles - 1) // panels)
        first = T.Bind(tile * panels // tiles)
        many = panels // tiles if panels % tiles == 0 else T.Bind((tile + 1) * panels // tiles - first)
        start = T.cast(first * layout.panel_bytes, "int64")
        self._stride = T.cast(many, "int64") * size if panels % tiles else T.int64(many * size)
        # the choice, which chooses nothing, keeps LLVM from a sum of its own for each column's place
        below = T.Bind(T.if_then_else(number > first, first + many - 1 - number, many - 1))
        self._own = T.Bind(start + T.cast(below * size, "int64"))
        self._above = T.Bind(T.if_then_else(number > first, self._own + size, start))
        self._places: tuple[Expr, Expr] = (self._own, self._above)

    def seek(self, superstep: Expr) -> None:
        """Columns are counted from this superstep on."""
        ahead = T.Bind(T.cast(superstep * STEP, "int64") * self._stride)
        self._places = (T.Bind(self._own + ahead), T.Bind(self._above + ahead))

    def scale(self, group: Expr) -> Expr:
        """f32x16, of values that are whole numbers."""
        return T.Bind(super().scale(group) * splat(2.0**-STEP_BITS, PANEL))

    def codes(self, k: int) -> Expr:
        """Values of the step `k` columns behind the place sought, i32x16: a row's four, a byte each."""
        word = self._sum(k) >> splat_int(DROPPED_BITS, PANEL)
        for j in range(1, STEP):
            moved = self._sum(k + j) << splat_int(8 * j - DROPPED_BITS, PANEL)
            word = word | moved & splat_int(_OF_STEP[j], PANEL)
        return T.Bind(word)

    def _sum(self, k: int) -> Expr:
        """The sum of the bytes of each row's product in a column, i32x16."""
        multiplier = T.broadcast(T.uint64(MULTIPLIERS[self.layout.format.state_bits]), PANEL)
        # in 32 bits the product would overflow, which no compiler allows; LLVM narrows it again
        product = T.cast(T.cast(self._states(k), f"uint64x{PANEL}") * multiplier, f"uint32x{PANEL}")
        return T.Bind(_sum_of_bytes(T.Bind(T.reinterpret("int32x16", product)), self.isa))

    def _states(self, k: int) -> Expr:
        """i32x16."""
        bits = self.layout.format.bits
        repeated = self._bytes(*(place + k * self._stride for place in self._places))
        size = _WORD if 2 * bits + 2 <= _WORD else _WIDE
        shifts = [bits * (PANEL - 1 - lane) for lane in range(PANEL)]  # of a lane's state in the bytes
        chosen = [
            d // _WIDE * _WIDE + min(shifts[d // _LANE_BYTES] // 8 + d % _LANE_BYTES, size - 1)
            for d in range(PANEL * _LANE_BYTES)
        ]
        words = T.reinterpret("int32x16", tirx.Shuffle([repeated], chosen))
        rest = tirx.Shuffle([T.int32(shift % 8) for shift in shifts], list(range(PANEL)))
        return T.Bind((words >> rest) & splat_int((1 << self.layout.format.state_bits) - 1, PANEL))

    def _bytes(self, own: Expr, above: Expr) -> Expr:
        """A panel's bytes and two of those above them, again and again, int8x64."""
        size = self.layout.row_bytes
        last = T.cast(self._number(above, 2), "int64")
        if size == _WORD:
            pair = [self._number(own, _WORD), last]
            return T.Bind(T.reinterpret("int8x64", tirx.Shuffle(pair * 4, list(range(8)))))
        word, at = last << T.int64(8 * size), 0
        for part in (n for n in (4, 2) if size & n):
            word, at = word | T.cast(self._number(own + at, part), "int64") << T.int64(8 * at), at + part
        return T.Bind(T.reinterpret("int8x64", T.broadcast(word, PANEL * _LANE_BYTES // _WORD)))

    def _number(self, place: Expr, size: int) -> Expr:
        """So many bytes as a number without a sign; eight are an i64."""
        kind = "int64" if size == _WORD else f"uint{8 * size}"
        return T.reinterpret(kind, self._stream[T.ramp(place, 1, size)])


def _sum_of_bytes(words: Expr, isa: Isa) -> Expr:
    """Of the four bytes of each lane, i32x16."""
    if isa.leaf == "vnni512":
        bytes_, ones = T.reinterpret("int8x64", words), T.reinterpret("int8x64", splat_int(0x01010101, PANEL))
        name = "llvm.x86.avx512.vpdpbusd.512"
        return tirx.call_llvm_pure_intrin("int32x16", name, splat_int(0, PANEL), bytes_, ones)
    mask = splat_int(_EACH_SECOND_BYTE, PANEL)
    pairs = T.Bind((words & mask) + ((words >> splat_int(8, PANEL)) & mask))
    return (pairs + (pairs >> splat_int(16, PANEL))) & splat_int(_SUM_BITS, PANEL)
