"""Bytes of packed weights as kernels read them: padded to whole panels, vectors and alignments."""

import math
from typing import Final

from gammac.formats import IntegerFormat, NormalFloat, OffsetNormalFloat, TrellisFormat, TwoFourFormat

Packed = IntegerFormat | TwoFourFormat | TrellisFormat
OnWarps = IntegerFormat | NormalFloat | TwoFourFormat | TrellisFormat

STRIP_ROWS, CHUNK_COLUMNS = 4, 64  # MatMulAnyBits pads to these
STEP: Final = 4  # columns of PackedLinear that share lanes
PANEL_ROWS: Final = 16  # PackedLinear pads rows to this
# and columns to what fills vectors of each plane that a code is cut into: 3 bits are 2 + 1
SUPERSTEPS: Final = {1: 32, 2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 7: 32, 8: 4}
ALIGNMENT: Final = 64
# WarpLinear pads rows to what a block of threads takes, and inputs to what a thread takes
WARP_ROWS, WARP_COLUMNS = 16, 32


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def any_bits_bytes(rows: int, columns: int, format_: IntegerFormat, groups: int, scale_bytes: int) -> int:
    """Bytes in MatMulAnyBits: strips of rows, chunks of columns."""
    strips = ceil_div(rows, STRIP_ROWS)
    codes = strips * STRIP_ROWS * ceil_div(columns, CHUNK_COLUMNS) * CHUNK_COLUMNS * format_.bits // 8
    # zeros of two groups by four rows are eight codes: `bits` bytes
    zeros = 0 if format_.symmetric else strips * ceil_div(groups, 2) * format_.bits
    return codes + strips * STRIP_ROWS * groups * scale_bytes + zeros


def packed_bytes(rows: int, columns: int, format_: Packed, scale_bytes: int) -> int:
    """Bytes in PackedLinear: panels of codes, scales and zeros, each rounded up."""
    if isinstance(format_, TrellisFormat):
        step = STEP
    elif isinstance(format_, TwoFourFormat):
        # codes are those of half the inputs, positions those of a quarter of them
        step = math.lcm(2 * SUPERSTEPS[format_.width], 4 * SUPERSTEPS[format_.index_bits])
    else:
        step = SUPERSTEPS[format_.bits]
    padded = ceil_div(rows, PANEL_ROWS) * PANEL_ROWS
    return _padded_bytes(
        padded, ceil_div(columns, step) * step, format_, format_.groups(columns), scale_bytes
    )


def warp_bytes(rows: int, columns: int, format_: OnWarps, scale_bytes: int) -> int:
    """The same in WarpLinear, on a GPU."""
    padded, wide = ceil_div(rows, WARP_ROWS) * WARP_ROWS, ceil_div(columns, WARP_COLUMNS) * WARP_COLUMNS
    return _padded_bytes(padded, wide, format_, format_.groups(columns), scale_bytes)


def _padded_bytes(rows: int, columns: int, format_: OnWarps, groups: int, scale_bytes: int) -> int:
    """Codes, scales, and zeros of a byte or offsets, each rounded up to the alignment."""
    symmetric = not isinstance(format_, IntegerFormat) or format_.symmetric
    zeros, scales = 0 if symmetric else rows * groups, rows * groups * scale_bytes
    offsets = scales if isinstance(format_, OffsetNormalFloat) else 0
    parts = (int(rows * columns * format_.bits) // 8, scales, zeros, offsets)
    return sum(ceil_div(part, ALIGNMENT) * ALIGNMENT for part in parts)
