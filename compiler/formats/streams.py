"""Bit streams of trellis codes, compiled by numba: columns don't interact, so they run in parallel.

The first bit of a code is its highest, and the first of a byte, too.
"""

from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

_BYTE: Final = 8
_STATE: Final = 16  # bits, at most


def _compiled(function: Any) -> Any:
    return numba.njit(parallel=True, cache=True)(function)


@_compiled
def write_codes(codes: Bytes, bits: int, packed: Bytes) -> None:
    """codes [columns, rows] of so many bits, 8 at most, to packed [columns, bytes], which is zero."""
    for c in numba.prange(len(codes)):
        for t in range(codes.shape[1]):
            at = t * bits
            # the code's place in two bytes
            pair = np.int64(codes[c, t]) << (2 * _BYTE - bits - at % _BYTE)
            packed[c, at // _BYTE] |= np.uint8(pair >> _BYTE)
            if at % _BYTE + bits > _BYTE:
                packed[c, at // _BYTE + 1] |= np.uint8(pair & 255)


@_compiled
def read_codes(packed: Bytes, bits: int, codes: Bytes) -> None:
    """The inverse of write_codes."""
    mask = (1 << bits) - 1
    for c in numba.prange(len(codes)):
        for t in range(codes.shape[1]):
            at = t * bits
            pair = np.int64(packed[c, at // _BYTE]) << _BYTE
            if at % _BYTE + bits > _BYTE:
                pair |= packed[c, at // _BYTE + 1]
            codes[c, t] = (pair >> (2 * _BYTE - bits - at % _BYTE)) & mask


@_compiled
def read_values(codes: Bytes, bits: int, table: Floats, bounds: Integers, values: Floats) -> None:
    """values [columns, rows]: table [2ᴸ] at the state of each code, the last L bits of its tile up to it.

    bounds [tiles + 1]: where in the rows a tile begins; the bits before its first code are its last ones.
    """
    mask = len(table) - 1
    for c in numba.prange(len(codes)):
        for tile in range(len(bounds) - 1):
            state = 0
            for t in range(max(bounds[tile], bounds[tile + 1] - _STATE // bits), bounds[tile + 1]):
                state = (state << bits | codes[c, t]) & mask
            for t in range(bounds[tile], bounds[tile + 1]):
                state = (state << bits | codes[c, t]) & mask
                values[c, t] = table[state]
