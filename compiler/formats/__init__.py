"""What stored bits mean. A quantizer chooses codes; a Format says which numbers they stand for.

    w3g64          3-bit codes, one f16 scale and one 3-bit zero point for each 64 inputs of a row
    w4g32-sym      4-bit codes, one f16 scale for each 32 inputs; the zero point is the midpoint, 8
    w4channel      one scale and zero point a row
    nf4g64         codes that name quantiles of a normal distribution, one f16 scale for each 64 inputs
    nf4g64-dq      the same with quantized scales
    nf4g64-icq     the same around an offset for each 64 inputs, in 8 bits
    nf4g64-offset  that with scales and offsets as f16
    fdb2g64        two binary planes, an f16 scale for each of them and for each 64 inputs
    pb1.7g128      a tenth of the weights in 8 bits, the others binary; a bitmap says which
    bi1.1g128      binary with a second bit: a residual's sign in salient columns, elsewhere one of two scales
    tcq2           2 bits a weight, read through a trellis of 2¹² states; one f16 scale a row
    s24w4g64       two of each four inputs of a row in 4 bits, the others zero; 3 bits say which two are kept
    s24w4g64-hw    the same with 4 bits for their positions, as the hardware has them
    s24f16         two of each four as f16 numbers
    s38w4g64       three of each eight in 4 bits; 6 bits say which
    u50w4g64       half of each row in 4 bits, wherever it stands; a bit for each weight says where

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
from gammac.formats.binary_residual import BINARY_RESIDUAL, BinaryResidualFormat
from gammac.formats.calibrated import (
    CALIBRATED_NORMAL_FLOAT,
    OFFSET_NORMAL_FLOAT,
    CalibratedNormalFloat,
    OffsetNormalFloat,
    in_plain_scales,
    with_plain_scales,
)
from gammac.formats.densities import N_OF_EIGHT, UNSTRUCTURED, NOfEightFormat, UnstructuredFormat
from gammac.formats.dual_binary import DUAL_BINARY, DualBinaryFormat
from gammac.formats.integer import INTEGER, IntegerFormat
from gammac.formats.kept import KeptFormat
from gammac.formats.names import parse_format, parse_formats
from gammac.formats.normal_float import DOUBLE_NORMAL_FLOAT, NORMAL_FLOAT, DoubleNormalFloat, NormalFloat
from gammac.formats.partly_binary import PARTLY_BINARY, PartlyBinaryFormat
from gammac.formats.stored import (
    candidates_of,
    load_candidate,
    load_chosen,
    load_float,
    load_quantized,
    stored_format,
)
from gammac.formats.trellis import TRELLIS, TrellisFormat, code_values, tile_bounds
from gammac.formats.two_four import (
    TWO_FOUR,
    TwoFourFormat,
    is_two_four,
    keep_two,
    mask_of,
    patterns_of,
)

__all__ = [
    "BINARY_RESIDUAL",
    "CALIBRATED_NORMAL_FLOAT",
    "CHANNEL",
    "DOUBLE_NORMAL_FLOAT",
    "DUAL_BINARY",
    "FALLBACK_GROUPS",
    "INTEGER",
    "NORMAL_FLOAT",
    "N_OF_EIGHT",
    "OFFSET_NORMAL_FLOAT",
    "PARTLY_BINARY",
    "SCALE_BITS",
    "TRELLIS",
    "TWO_FOUR",
    "UNSTRUCTURED",
    "BinaryResidualFormat",
    "CalibratedNormalFloat",
    "DoubleNormalFloat",
    "DualBinaryFormat",
    "Format",
    "IntegerFormat",
    "KeptFormat",
    "NOfEightFormat",
    "NormalFloat",
    "OffsetNormalFloat",
    "PartlyBinaryFormat",
    "Quantized",
    "TrellisFormat",
    "TwoFourFormat",
    "UnstructuredFormat",
    "candidates_of",
    "code_values",
    "concat_rows",
    "in_plain_scales",
    "is_two_four",
    "keep_two",
    "load_candidate",
    "load_chosen",
    "load_float",
    "load_quantized",
    "mask_of",
    "parse_format",
    "parse_formats",
    "patterns_of",
    "spread",
    "stored_format",
    "tile_bounds",
    "with_plain_scales",
]
