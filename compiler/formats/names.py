"""Reading the names of formats."""

import re
from collections.abc import Callable, Sequence
from typing import Final

from gammac.diagnostics import CompileError
from gammac.formats.base import CHANNEL, Format
from gammac.formats.binary_residual import BinaryResidualFormat
from gammac.formats.calibrated import CalibratedNormalFloat, OffsetNormalFloat
from gammac.formats.densities import NOfEightFormat, UnstructuredFormat
from gammac.formats.dual_binary import DualBinaryFormat
from gammac.formats.integer import IntegerFormat
from gammac.formats.kept import FLOAT_WIDTH
from gammac.formats.normal_float import DoubleNormalFloat, NormalFloat
from gammac.formats.partly_binary import PartlyBinaryFormat
from gammac.formats.trellis import STATE_BITS, TrellisFormat
from gammac.formats.two_four import TwoFourFormat

# pattern → format; what `(?P<group>…)` matched is read as a group size
GROUP: Final = r"(?:g(?P<group>\d+)|channel)"
Found = re.Match[str]
SPELLINGS: Final[Sequence[tuple[str, Callable[[Found, int], Format]]]] = (
    (rf"w([1-8]){GROUP}(-sym)?", lambda m, group: IntegerFormat(int(m[1]), group, bool(m[3]))),
    (rf"nf([234]){GROUP}", lambda m, group: NormalFloat(int(m[1]), group)),
    (rf"nf([234]){GROUP}-dq", lambda m, group: DoubleNormalFloat(int(m[1]), group)),
    (rf"nf([234]){GROUP}-offset", lambda m, group: OffsetNormalFloat(int(m[1]), group)),
    (rf"nf([234]){GROUP}-icq", lambda m, group: CalibratedNormalFloat(int(m[1]), group)),
    (rf"fdb2{GROUP}", lambda m, group: DualBinaryFormat(group)),
    (rf"pb([1-7](?:\.\d+)?){GROUP}", lambda m, group: PartlyBinaryFormat(float(m[1]), group)),
    (rf"bi(1\.\d+){GROUP}", lambda m, group: BinaryResidualFormat(float(m[1]), group)),
    (
        r"tcq([1-4])(?:g(?P<group>\d+))?(?:-l([89]|1[0-6]))?",
        lambda m, group: TrellisFormat(int(m[1]), group, int(m[3] or STATE_BITS)),
    ),
    (rf"s24w([2-8]){GROUP}(-hw)?", lambda m, group: TwoFourFormat(int(m[1]), group, bool(m[3]))),
    (
        r"s24f16(?P<group>)(-hw)?",
        lambda m, group: TwoFourFormat(FLOAT_WIDTH, group, bool(m[2])),
    ),
    (rf"s([1-7])8w([2-8]){GROUP}", lambda m, group: NOfEightFormat(int(m[2]), group, int(m[1]))),
    (r"s([1-7])8f16(?P<group>)", lambda m, group: NOfEightFormat(FLOAT_WIDTH, group, int(m[1]))),
    (rf"u([1-9]\d?)w([2-8]){GROUP}", lambda m, group: UnstructuredFormat(int(m[2]), group, int(m[1]))),
    (r"u([1-9]\d?)f16(?P<group>)", lambda m, group: UnstructuredFormat(FLOAT_WIDTH, group, int(m[1]))),
)
EXAMPLES: Final = (
    "w4g64, w3g128-sym or w8channel (bits 1 to 8); "
    "or nf4g64, nf4g64-dq, nf4g64-icq or nf4g64-offset (bits 2 to 4), fdb2g64, pb1.7g128, "
    "bi1.1g128, "
    "tcq2 or tcq3-l10 (bits 1 to 4), s24w4g64, s24f16, s48w4g64, "
    "u50w4g64"
)


def parse_format(text: str) -> Format:
    """Read a format's name. Raises CompileError that shows the spelling."""
    for pattern, make in SPELLINGS:
        match = re.fullmatch(pattern, text.strip())
        if match and match["group"] != "0":
            return make(match, int(match["group"] or CHANNEL))
    raise CompileError(f"{text!r} is no weight format", hint=f"write {EXAMPLES}")


def parse_formats(text: str) -> tuple[Format, ...]:
    """Read a list of formats, joined by commas or, inside a pass's options, by `+`."""
    return tuple(parse_format(part) for part in text.replace("+", ",").split(",") if part.strip())
