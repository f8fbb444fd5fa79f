"""What stored bits mean. A quantizer chooses codes; a Format says which numbers they stand for.

    w3g64          3-bit codes, one f16 scale and one 3-bit zero point for each 64 inputs of a row
    w4g32-sym      4-bit codes, one f16 scale for each 32 inputs; the zero point is the midpoint, 8
    w4channel      one scale and zero point a row
    tcq2           2 bits a weight, read through a trellis of 2¹² states; one f16 scale a row

`dequantize` and the count of stored bits stand here and nowhere else.
"""

from gammac.formats.base import (
    CHANNEL,
    FALLBACK_GROUPS,
    SCALE_BITS,
    Format,
    Quantized,
    concat_rows,
    spread,
)
from gammac.formats.integer import INTEGER, IntegerFormat
from gammac.formats.names import parse_format, parse_formats
from gammac.formats.stored import load_float, load_quantized, stored_format
from gammac.formats.trellis import TRELLIS, TrellisFormat, code_values, tile_bounds

__all__ = [
    "CHANNEL",
    "FALLBACK_GROUPS",
    "INTEGER",
    "SCALE_BITS",
    "TRELLIS",
    "Format",
    "IntegerFormat",
    "Quantized",
    "TrellisFormat",
    "code_values",
    "concat_rows",
    "load_float",
    "load_quantized",
    "parse_format",
    "parse_formats",
    "spread",
    "stored_format",
    "tile_bounds",
]
