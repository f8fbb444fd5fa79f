"""Trellis codes: the value of a weight depends on its own bits and on those before it in its tile.

After trellis-coded quantization (Marcellin and Fischer 1990) on the bitshift trellis of QTIP (Tseng et al.
2024, arXiv 2406.11235). A state is the last L bits of the stream, s' = (s·2ᵏ + bits) mod 2ᴸ, and stands for
one of 2ᴸ values, so k bits a weight choose among far more than 2ᵏ values.

A tile is up to 256 weights of one column, one below the other, so that error feedback can go on from column
to column; rows are cut into tiles of nearly equal length. Its stream bites its tail: the bits before the
first weight are those of the last ones, and T weights take exactly k·T bits.

A decoder needs a shift and a look-up for each weight: weight t of a tile has the L bits that end at bit
k·(t + 1) of the tile's stream as its index into a table of 2ᴸ f16 values (8 KiB at L = 12, within a
first-level cache). No weight waits for another one's value, so that lanes may run down the rows.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gammac.formats.base import CHANNEL, SCALE_BITS, Format, Parts, Quantized, group_name, spread

TRELLIS: Final = "trellis"
TILE: Final = 256  # weights, at most
STATE_BITS: Final = 12
# odd factors (of the golden ratio, and of MurmurHash3's and Prospector's finalizers), for mixing bits
_MIXERS: Final = ((0x9E3779B1, 0), (0x85EBCA6B, 1), (0xC2B2AE35, 2))
_STEP: Final = 0x27D4EB2F
_TURN: Final = (0x2545F491, 0x3C6EF372, 15, 0x846CA68B, 13, 0x9E3779B1)
_WORD: Final = 0xFFFFFFFF
Words = npt.NDArray[np.uint64]


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
        scales = parts["scales"].float()
        rows, columns = len(scales), len(parts["packed"])
        states = self.states(unpack(parts["packed"], self.bits, rows))
        return code_values(self.bits, self.state_bits)[states].T * spread(
            scales, self.inputs_per_scale(columns), columns
        )

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
    """Where the tiles of a column begin, and at last the number of rows; lengths differ by one at most."""
    tiles = -(-rows // TILE)
    return [rows * i // tiles for i in range(tiles + 1)]


@lru_cache
def code_values(bits: int, state_bits: int) -> Tensor:
    """The value of each state, f32 (each representable in f16) [2ᴸ], of mean square 1.

    They are the quantiles of a Gaussian in a fixed pseudo-random order. As in Ungerboeck's set
    partitioning (1982), the 2ᵏ states that can follow a state lie 2ᴸ⁻ᵏ ranks apart from each other, so that
    one of them is near whatever comes: worth as much as four times the states.
    """
    states = np.arange(1 << state_bits, dtype=np.uint64)
    before, code = states >> np.uint64(bits), states & np.uint64((1 << bits) - 1)
    stratum = (code + _turn(before, bits)) & np.uint64((1 << bits) - 1)
    ranks = (stratum << np.uint64(state_bits - bits)) | _shuffled(before, state_bits - bits)
    gaussian = NormalDist()
    quantiles = np.array([gaussian.inv_cdf((i + 0.5) / len(states)) for i in range(len(states))])
    quantiles /= np.sqrt(np.square(quantiles).mean())
    return torch.from_numpy(quantiles[ranks]).half().float()


def _shuffled(numbers: Words, width: int) -> Words:
    """A permutation of the numbers of so many bits: odd products and shifted sums can be undone."""
    mask, half = np.uint64((1 << width) - 1), np.uint64((width + 1) // 2)
    for factor, steps in _MIXERS:
        numbers = (numbers * np.uint64(factor) + np.uint64(_STEP * steps)) & mask
        numbers = numbers ^ (numbers >> half)
    return numbers


def _turn(numbers: Words, bits: int) -> Words:
    """A pseudo-random number of so many bits for each number."""
    factor, start, first, second, shift, last = (np.uint64(n) for n in _TURN)
    word = np.uint64(_WORD)
    mixed = (numbers * factor + start) & word
    mixed = ((mixed ^ (mixed >> first)) * second) & word
    mixed = ((mixed ^ (mixed >> shift)) * last) & word
    return mixed >> np.uint64(32 - bits)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes u8 [columns, rows] as bit streams u8 [columns, bytes], the highest bit of a code first."""
    columns, rows = codes.shape
    shifts = torch.arange(bits - 1, -1, -1)
    stream = (codes[:, :, None] >> shifts) & 1
    return torch.from_numpy(
        np.packbits(stream.reshape(columns, rows * bits).numpy().astype(np.uint8), axis=1)
    )


def unpack(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of pack."""
    stream = np.unpackbits(packed.numpy(), axis=1, count=rows * bits).reshape(len(packed), rows, bits)
    weights = (1 << np.arange(bits - 1, -1, -1)).astype(np.uint8)
    return torch.from_numpy((stream * weights).sum(2, dtype=np.uint8))
