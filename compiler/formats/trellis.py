"""Trellis codes: the value of a weight depends on its own bits and on those before it in its tile.

After trellis-coded quantization (Marcellin and Fischer 1990) on the bitshift trellis of QTIP (Tseng et al.
2024, arXiv 2406.11235). A state is the last L bits of the stream, s' = (s·2ᵏ + bits) mod 2ᴸ, and stands for
one of 2ᴸ values, so k bits a weight choose among far more than 2ᵏ values.

A tile is up to 256 weights of one column, one below the other, so that error feedback can go on from column
to column; rows are cut into tiles of nearly equal length. Its stream bites its tail: the bits before the
first weight are those of the last ones, and T weights take exactly k·T bits.

Weight t of a tile has the L bits that end at bit k·(t + 1) of the tile's stream as its state. The value of a
state is computed: the four bytes of a product with a constant, added up, are nearly Gaussian (after QTIP's
1MAD code); a quarter of that is a byte. So a decoder needs a shift, a product and a sum, and no table, and no
weight waits for another one's value: lanes may run down the rows.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats.base import CHANNEL, SCALE_BITS, Format, Parts, Quantized, group_name, spread

TRELLIS: Final = "trellis"
TILE: Final = 256  # weights, at most
STATE_BITS: Final = 12
ALIGN: Final = 16  # rows: tiles are multiples of it, but for the last one's end
DROPPED_BITS: Final = 2  # of the sum of four bytes, which is a byte then
MIDDLE: Final = 127  # of what is left
STEP_BITS: Final = 5  # a value is a whole number of 32nds
MULTIPLIERS: Final = {
    8: 2293427321, 9: 3786658019, 10: 2712705339, 11: 2446842253, 12: 2488982903, 13: 2538014817,
    14: 3404929718, 15: 3392046942, 16: 2805620389,
}  # fmt: skip
"""By L: of hundreds that were drawn those whose codes of 2, 3 and 4 bits lose least of a Gaussian."""


@dataclass(frozen=True)
class TrellisFormat(Format):
    """`bits` k a weight, `state_bits` L a state, a scale for each `group` inputs of a row (0: the whole row).

    Parts: packed u8 [columns, ⌈k·rows / 8⌉], the streams of a column's tiles one behind the other, the first
    bit highest; scales f16 [rows, groups].
    """

    kind: ClassVar[str] = TRELLIS
    by_rows: ClassVar[bool] = False
    bits: int
    group: int = CHANNEL
    state_bits: int = STATE_BITS

    @property
    def name(self) -> str:
        """For example tcq2, tcq3g128, tcq2-l10."""
        group = group_name(self.group) if self.group else ""
        return f"tcq{self.bits}{group}{'' if self.state_bits == STATE_BITS else f'-l{self.state_bits}'}"

    def storage_bits(self, rows: int, columns: int) -> int:
        """The streams, each column's filled up to a byte, and f16 scales."""
        return 8 * columns * self.column_bytes(rows) + SCALE_BITS * rows * self.groups(columns)

    def column_bytes(self, rows: int) -> int:
        """Bytes of a column's streams."""
        return -(-self.bits * rows // 8)

    def quantized(self, codes: Tensor, scales: Tensor) -> Quantized:
        """A weight from codes u8 [columns, rows] of k bits and scales f16 [rows, groups]."""
        return Quantized(self, {"packed": pack(codes, self.bits), "scales": scales})

    def dequantize(self, parts: Parts) -> Tensor:
        """scale · value of the state, f32 [rows, columns]."""
        from gammac.formats.streams import read_values

        scales = parts["scales"].float()
        rows, columns = len(scales), len(parts["packed"])
        codes, values = unpack(parts["packed"], self.bits, rows), torch.empty(columns, rows)
        table, bounds = code_values(self.state_bits).numpy(), np.array(tile_bounds(rows))
        read_values(codes.numpy(), self.bits, table, bounds, values.numpy())
        return values.T * spread(scales, self.inputs_per_scale(columns), columns)

    def states(self, codes: Tensor) -> Tensor:
        """The state of each weight, i32 [columns, rows], from codes u8 [columns, rows] of k bits."""
        bounds = tile_bounds(codes.shape[1])
        tiles = [codes[:, a:b].int() for a, b in pairwise(bounds)]
        return torch.cat([self._windows(tile) for tile in tiles], 1)

    def _windows(self, tile: Tensor) -> Tensor:
        """The last L bits at each place of a stream that goes round, i32 [columns, T]."""
        codes = 1
        while codes * self.bits < self.state_bits:
            # what a place has seen, behind what the place so many codes before it has seen
            tile = tile.roll(codes, 1) << (codes * self.bits) | tile
            codes *= 2
        return tile & ((1 << self.state_bits) - 1)


def tile_bounds(rows: int) -> list[int]:
    """Where the tiles of a column begin, and at last the number of rows. Lengths are multiples of 16 and
    differ by 16 at most; the last tile ends where the rows do."""
    strips = -(-rows // ALIGN)
    tiles = -(-strips * ALIGN // TILE)
    return [*(ALIGN * (strips * i // tiles) for i in range(tiles)), rows]


@lru_cache
def code_values(state_bits: int) -> Tensor:
    """The value of each state, f32 [2ᴸ]: (⌊sum of the bytes of state · multiplier / 4⌋ − 127) / 32.

    Of a product only the low 32 bits count. Each value is exact in f16; their root mean square is about 1.15.
    """
    products = np.arange(1 << state_bits, dtype=np.uint32) * np.uint32(MULTIPLIERS[state_bits])
    sums = products.view(np.uint8).reshape(-1, 4).sum(1, dtype=np.int32)
    return torch.from_numpy(((sums >> DROPPED_BITS) - MIDDLE).astype(np.float32)) * 2.0**-STEP_BITS


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes u8 [columns, rows] as bit streams u8 [columns, bytes], the highest bit of a code first."""
    from gammac.formats.streams import write_codes

    columns, rows = codes.shape
    packed = torch.zeros(columns, -(-rows * bits // 8), dtype=torch.uint8)
    write_codes(codes.contiguous().numpy(), bits, packed.numpy())
    return packed


def unpack(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of pack. Raises CompileError for streams that are too short: compiled loops don't check."""
    from gammac.formats.streams import read_codes

    if packed.shape[1] * 8 < rows * bits:
        raise CompileError(
            f"a column of {packed.shape[1]} bytes holds no {rows} codes of {bits} bits",
            hint="the weight is damaged: compile again, with another --cache",
        )
    codes = torch.empty(len(packed), rows, dtype=torch.uint8)
    read_codes(packed.contiguous().numpy(), bits, codes.numpy())
    return codes
