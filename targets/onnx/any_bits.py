"""`gammac::MatMulAnyBits`: weights of 1 to 8 bits for ONNX Runtime, read packed from the mapped file.

Three things that must agree live here and in `custom_op/`: the packed layout, the model-local function that
spells the operator out in standard ONNX (so that any runtime can run and check the file), and the C++ kernel
that takes over where its library is registered. `custom_op/any_bits.h` states the layout.
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from os import environ
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import onnx.parser
from onnx import FunctionProto

T = TypeVar("T", bound=np.generic)
Bytes = npt.NDArray[np.uint8]

DOMAIN: Final = "gammac"
OP: Final = "MatMulAnyBits"
OP_ZEROS: Final = "MatMulAnyBitsZeros"
OPSET: Final = 21
STRIP: Final = 4
CHUNK: Final = 64


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def groups_of(K: int, group: int) -> int:
    """How many scales a row of `K` inputs has; the last group may be ragged."""
    return 1 if group >= K else _ceil(K, group)


def packed_bytes(N: int, K: int, bits: int, group: int, asymmetric: bool) -> int:
    """Bytes that `pack` makes of an [N, K] weight: codes, scales and zeros, padding included."""
    strips, groups = _ceil(N, STRIP), groups_of(K, group)
    codes = strips * _ceil(K, CHUNK) * STRIP * 8 * bits
    zeros = strips * _ceil(groups, 2) * bits if asymmetric else 0
    return codes + strips * groups * STRIP * 2 + zeros


@dataclass(frozen=True, eq=False)
class PackedAnyBits:
    """A weight as the operator takes it: three initializers and the node's attributes.

    codes uint8 [strips, chunks, 4, 8 * bits]; scales float16 [strips, groups, 4];
    zeros uint8 [strips, ceil(groups / 2), bits], or None if symmetric.
    """

    codes: Bytes
    scales: npt.NDArray[np.float16]
    zeros: Bytes | None
    attributes: Mapping[str, int]

    @property
    def op(self) -> str:
        """The operator's name: with zeros it is another one, since a function has fixed inputs."""
        return OP if self.zeros is None else OP_ZEROS

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


def _to_octets(values: Bytes, bits: int) -> Bytes:
    """[..., 8] values to [..., bits] bytes, little-endian."""
    words = np.zeros(values.shape[:-1], dtype="<u8")
    for i in range(8):
        words |= values[..., i].astype(np.uint64) << np.uint64(i * bits)
    octets: Bytes = words[..., None].view(np.uint8)[..., :bits]
    return octets.copy()


def _from_octets(octets: Bytes, bits: int) -> Bytes:
    """[..., bits] bytes to the [..., 8] values they hold."""
    padded = np.zeros((*octets.shape[:-1], 8), dtype=np.uint8)
    padded[..., :bits] = octets
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    values: npt.NDArray[np.uint64] = (padded.view("<u8") >> shifts) & np.uint64(2**bits - 1)
    return values.astype(np.uint8)


def _strips(rows: npt.NDArray[T], width: int) -> npt.NDArray[T]:
    """[N, columns] to [strips, 4, width], zeros where there is nothing."""
    N, columns = rows.shape
    padded = np.zeros((_ceil(N, STRIP) * STRIP, width), dtype=rows.dtype)
    padded[:N, :columns] = rows
    return padded.reshape(-1, STRIP, width)


def _check(
    codes: Bytes, scales: npt.NDArray[np.floating], zeros: Bytes | None, bits: int, group: int
) -> None:
    """Raise ValueError for operands that do not belong together."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}, allowed: 1 to 8")
    if codes.ndim != 2 or codes.size == 0:
        raise ValueError(f"codes have shape {codes.shape}, expected [N, K]")
    N, K = codes.shape
    if group != K and (group <= 0 or group % 32):
        raise ValueError(f"group is {group}, allowed: a multiple of 32, or K = {K}")
    expected = (N, groups_of(K, group))
    if scales.shape != expected or (zeros is not None and zeros.shape != expected):
        raise ValueError(f"scales and zeros must have shape {expected}")
    for values in (codes, zeros):
        if values is not None and (values.dtype != np.uint8 or int(values.max()) >= 2**bits):
            raise ValueError(f"codes and zeros must be uint8 and below {2**bits}")


def pack(
    codes: Bytes, scales: npt.NDArray[np.floating], zeros: Bytes | None, bits: int, group: int
) -> PackedAnyBits:
    """Lay out a weight for the operator.

    codes uint8 [N, K] below 2**bits; scales [N, groups], rounded to float16 here; zeros uint8 [N, groups]
    below 2**bits, or None for 2**(bits - 1) throughout. Raises ValueError if they do not fit together or a
    scale overflows float16.
    """
    _check(codes, scales, zeros, bits, group)
    (N, K), groups = codes.shape, scales.shape[1]
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("a scale is not finite in float16")
    chunks = _ceil(K, CHUNK)
    by_strip = _strips(codes, chunks * CHUNK).reshape(-1, STRIP, chunks, 8, 8).transpose(0, 2, 1, 3, 4)
    packed = _to_octets(by_strip, bits).reshape(-1, chunks, STRIP, 8 * bits)
    packed_zeros = None
    if zeros is not None:
        pairs = _strips(zeros, _ceil(groups, 2) * 2).transpose(0, 2, 1).reshape(-1, _ceil(groups, 2), 8)
        packed_zeros = _to_octets(pairs, bits)
    packed_scales = np.ascontiguousarray(_strips(half, groups).transpose(0, 2, 1))
    attributes = {"N": N, "K": K, "bits": bits, "group": group}
    return PackedAnyBits(packed, packed_scales, packed_zeros, attributes)


def unpack(packed: PackedAnyBits) -> tuple[Bytes, npt.NDArray[np.float16], Bytes | None]:
    """The codes [N, K], scales [N, groups] and zeros [N, groups] that `pack` was given."""
    N, K, bits = (packed.attributes[name] for name in ("N", "K", "bits"))
    strips, groups, _ = packed.scales.shape
    octets = packed.codes.reshape(strips, -1, STRIP, 8, bits)
    codes = _from_octets(octets, bits).transpose(0, 2, 1, 3, 4).reshape(strips * STRIP, -1)[:N, :K]
    scales = packed.scales.transpose(0, 2, 1).reshape(-1, groups)[:N]
    if packed.zeros is None:
        return codes, scales, None
    pairs = _from_octets(packed.zeros, bits).reshape(strips, -1, STRIP)
    return codes, scales, pairs.transpose(0, 2, 1).reshape(strips * STRIP, -1)[:N, :groups]


# The operator in standard ONNX, in onnx's own text form. Code i of 8 starts in byte `byte` of its octet, at
# bit `shift`; the byte after holds the rest of it, and is clamped where it would be past the end, for then
# there is no rest. Arithmetic is in uint32 (12), since ONNX Runtime shifts no 16-bit integers.
_FUNCTION: Final = """
<opset_import: ["" : 21], domain: "gammac">
NAME <N, K, bits, group> (x, codes, scales INPUT) => (y)
{
    n = Constant <value_int: int = @N> ()
    k = Constant <value_int: int = @K> ()
    b = Constant <value_int: int = @bits> ()
    wide = Constant <value_int: int = @group> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    eight = Constant <value_int = 8> ()
    rest = Constant <value_ints = [-1]> ()
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    axis2 = Constant <value_ints = [2]> ()
    four = Constant <value_ints = [4]> ()
    chunk = Constant <value_ints = [64]> ()
    origin = Constant <value_ints = [0, 0]> ()
    two = Constant <value_float = 2.0> ()

    octet = Range (zero, eight, one)
    start = Mul (octet, b)
    byte = Div (start, eight)
    bit = Mod (start, eight)
    shift = Cast <to = 12> (bit)
    following = Add (byte, one)
    last = Sub (b, one)
    next = Min (following, last)
    byte_bits = Cast <to = 12> (eight)
    b_float = Cast <to = 1> (b)
    levels = Pow (two, b_float)
    levels_int = Cast <to = 7> (levels)
    mask_int = Sub (levels_int, one)
    mask = Cast <to = 12> (mask_int)
    b_axis = Unsqueeze (b, axis0)
    octets = Concat <axis = 0> (rest, b_axis)
CODES
    dims = Shape (scales)
    strips = Slice (dims, axis0, axis1)
    groups = Slice (dims, axis1, axis2)
    rows = Mul (strips, four)
    by_row = Concat <axis = 0> (rows, rest)
    n_axis = Unsqueeze (n, axis0)
    k_axis = Unsqueeze (k, axis0)
    size = Concat <axis = 0> (n_axis, k_axis)
    chunked = Concat <axis = 0> (strips, rest, four, chunk)
    codes_chunks = Reshape (codes_values, chunked)
    codes_strips = Transpose <perm = [0, 2, 1, 3]> (codes_chunks)
    codes_padded = Reshape (codes_strips, by_row)
    code = Slice (codes_padded, origin, size)

    narrow = Min (wide, k)
    narrow_axis = Unsqueeze (narrow, axis0)
    spread = Concat <axis = 0> (axis1, axis1, narrow_axis)
    scales_strips = Transpose <perm = [0, 2, 1]> (scales)
    scales_half = Reshape (scales_strips, by_row)
    scales_rows = Cast <to = 1> (scales_half)
SCALE
ZERO
    offset = Sub (code, zero_point)
    weight = Mul (offset, scale)
    transposed = Transpose <perm = [1, 0]> (weight)
    y = MatMul (x, transposed)
}
"""

_OCTETS: Final = """
    {0}_octets = Reshape ({0}, octets)
    {0}_wide = Cast <to = 12> ({0}_octets)
    {0}_low = Gather <axis = 1> ({0}_wide, byte)
    {0}_high = Gather <axis = 1> ({0}_wide, next)
    {0}_raised = BitShift <direction = "LEFT"> ({0}_high, byte_bits)
    {0}_both = BitwiseOr ({0}_low, {0}_raised)
    {0}_lowered = BitShift <direction = "RIGHT"> ({0}_both, shift)
    {0}_kept = BitwiseAnd ({0}_lowered, mask)
    {0}_values = Cast <to = 1> ({0}_kept)
"""

# [rows, groups] to [N, K]
_PER_INPUT: Final = """
    {0}_column = Unsqueeze ({0}_rows, axis2)
    {0}_spread = Expand ({0}_column, spread)
    {0}_padded = Reshape ({0}_spread, by_row)
    {1} = Slice ({0}_padded, origin, size)
"""

_ZEROS: Final = f"""
{_OCTETS.format("zeros")}
    paired = Concat <axis = 0> (strips, rest, four)
    zeros_pairs = Reshape (zeros_values, paired)
    zeros_strips = Transpose <perm = [0, 2, 1]> (zeros_pairs)
    zeros_even = Reshape (zeros_strips, by_row)
    row_groups = Concat <axis = 0> (rows, groups)
    zeros_rows = Slice (zeros_even, origin, row_groups)
{_PER_INPUT.format("zeros", "zero_point")}
"""

_MIDPOINT: Final = "    zero_point = Div (levels, two)"


def function_proto(asymmetric: bool = False) -> FunctionProto:
    """The operator as a model-local function of opset 21; a model carries one for each name it uses."""
    parts = {
        "NAME": OP_ZEROS if asymmetric else OP,
        "INPUT": ", zeros" if asymmetric else "",
        "CODES": _OCTETS.format("codes"),
        "SCALE": _PER_INPUT.format("scales", "scale"),
        "ZERO": _ZEROS if asymmetric else _MIDPOINT,
    }
    text = _FUNCTION
    for name, part in parts.items():
        text = text.replace(name, part)
    return onnx.parser.parse_function(text)


class CompilerMissing(Exception):
    """No C++ compiler was found."""


class CompileFailed(Exception):
    """The compiler refused the operator's sources; the message is what it said."""


SOURCES: Final = Path(__file__).parent / "custom_op"
COMPILERS: Final = ("c++", "g++", "clang++")
# No -march: each source picks its instruction set itself, and the processor is asked at run time.
# -ffp-contract=off keeps the portable path the same on processors that would fuse its arithmetic.
FLAGS: Final = (
    *("-std=c++17", "-O3", "-w", "-fPIC", "-shared"),
    *("-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-ffp-contract=off"),
)
# Without these the linker would add a dependency on libstdc++ and an identifier; symbols name nothing of use.
LINUX_FLAGS: Final = ("-Wl,--as-needed", "-Wl,--build-id=none", "-s")


def library_name() -> str:
    """What the operator library is called on this platform."""
    return {"darwin": "libgammac_op.dylib", "win32": "gammac_op.dll"}.get(sys.platform, "libgammac_op.so")


def find_compiler() -> str | None:
    """The C++ compiler that `build_library` would use: $CXX if set, else the first known name on the path."""
    names = (environ["CXX"],) if environ.get("CXX") else COMPILERS
    return next((found for name in names if (found := shutil.which(name))), None)


def build_library(folder: Path) -> Path:
    """Compile the operator library into `folder` and return its path; the same bytes every time.

    Raises CompilerMissing or CompileFailed. Takes a few seconds; nothing is cached.
    """
    compiler = find_compiler()
    if compiler is None:
        raise CompilerMissing("no C++ compiler: set CXX, or install one of " + ", ".join(COMPILERS))
    library = folder.resolve() / library_name()
    sources = sorted(path.name for path in SOURCES.glob("*.cc"))
    platform_flags = LINUX_FLAGS if sys.platform == "linux" else ()
    command = [compiler, *FLAGS, *platform_flags, *sources, "-o", str(library)]
    # NOTE run among the sources, so that no path of this machine can enter the library.
    result = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise CompileFailed(result.stderr)
    return library
