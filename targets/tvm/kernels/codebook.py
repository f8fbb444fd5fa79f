"""Formats whose codes name levels (NormalFloat): what is looked up between unpacking a code and its product.

With int8 inputs a level is a byte, 128 + round(127 level), and the scale is a 127th of the weight's; that
moves a weight by at most a 254th of its scale. In floats the level is exact.
"""

import struct
from collections.abc import Sequence
from typing import Any, Final

from gammac.diagnostics import CompileError
from gammac.formats import Format, NormalFloat
from gammac.formats.normal_float import normal_levels
from gammac.targets.tvm.kernels.leaves import split_vector
from gammac.targets.tvm.tir.vectors import LANES, T, splat_int, tirx

Expr = Any

LARGEST: Final = 127
MIDDLE: Final = 128
_ENTRIES: Final = 16  # of a table in one instruction
# the instruction of each leaf's instruction set that looks bytes up, and the bytes that it takes
_SHUFFLES: Final = {
    "vnni512": ("llvm.x86.avx512.pshuf.b.512", 64),
    "vnni256": ("llvm.x86.avx2.pshuf.b", 32),
    "maddubs": ("llvm.x86.avx2.pshuf.b", 32),
    "sdot": ("llvm.aarch64.neon.tbl1.v16i8", 16),
    "usdot": ("llvm.aarch64.neon.tbl1.v16i8", 16),
}


def levels_of(format_: Format) -> tuple[float, ...]:
    """The levels that codes name, ascending; none for formats whose codes are numbers."""
    return tuple(normal_levels(format_.bits).tolist()) if isinstance(format_, NormalFloat) else ()


def byte_levels(levels: Sequence[float]) -> tuple[int, ...]:
    """Levels as bytes."""
    return tuple(MIDDLE + round(LARGEST * level) for level in levels)


def as_bytes(word: Expr, levels: Sequence[float], leaf: str) -> Expr:
    """The byte of each code in i32x16, four codes a lane."""
    table = byte_levels(levels)
    if leaf not in _SHUFFLES:
        raise CompileError(
            "formats of levels have no kernel with int8 inputs here: the instruction set looks no bytes up",
            hint="--product-inputs float",
        )
    name, size = _SHUFFLES[leaf]
    entries = [*table, *[0] * (_ENTRIES - len(table))]
    words = [int.from_bytes(bytes(entries[i : i + 4]), "little", signed=True) for i in range(0, _ENTRIES, 4)]
    lanes = size // 4
    vector = tirx.Shuffle([T.int32(w) for w in words * (lanes // 4)], list(range(lanes)))
    entries_vector = T.Bind(T.reinterpret(f"int8x{size}", vector))

    def look_up(codes: Expr) -> Expr:
        indices = T.reinterpret(f"int8x{size}", codes)
        found = tirx.call_llvm_pure_intrin(f"int8x{size}", name, entries_vector, indices)
        return T.reinterpret(f"int32x{lanes}", found)

    return T.Bind(split_vector(look_up, lanes, word))


def as_floats(codes: Expr, levels: Sequence[float]) -> Expr:
    """The level of each code in i32x16, f32x16: by a tree of choices, the low bit of a code first."""
    codes, which = T.Bind(codes), 0
    left: list[Expr] = [splat_int(_bits_of(level), LANES) for level in levels]
    while len(left) > 1:
        mask = T.Bind(splat_int(0, LANES) - ((codes >> splat_int(which, LANES)) & splat_int(1, LANES)))
        left = [low ^ ((low ^ high) & mask) for low, high in zip(left[::2], left[1::2], strict=True)]
        which += 1
    return T.Bind(T.reinterpret("float32x16", left[0]))


def _bits_of(number: float) -> int:
    return int.from_bytes(struct.pack("<f", number), "little", signed=True)
