"""`gammac::MatMulAnyBits`: weights of 1 to 8 bits for ONNX Runtime, read packed from the mapped file.

Three things that must agree live here and in `custom_op/`: the packed layout, the model-local function that
spells the operator out in standard ONNX (so that any runtime can run and check the file), and the C++ kernel
that takes over where its library is registered. `custom_op/any_bits.h` states the layout.
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count, environ
from pathlib import Path
from tempfile import TemporaryDirectory
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
STRIP: Final = 4
CHUNK: Final = 64
SOURCES: Final = Path(__file__).parent / "custom_op"


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


def to_octets(values: Bytes, bits: int) -> Bytes:
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
    packed = to_octets(by_strip, bits).reshape(-1, chunks, STRIP, 8 * bits)
    packed_zeros = None
    if zeros is not None:
        pairs = _strips(zeros, _ceil(groups, 2) * 2).transpose(0, 2, 1).reshape(-1, _ceil(groups, 2), 8)
        packed_zeros = to_octets(pairs, bits)
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


def function_proto(asymmetric: bool = False) -> FunctionProto:
    """The operator as a model-local function of opset 21; a model carries one for each name it uses."""
    name = OP_ZEROS if asymmetric else OP
    lines = (SOURCES / f"{name}.onnxtxt").read_text(encoding="utf-8").splitlines()
    return onnx.parser.parse_function("\n".join(line for line in lines if not line.startswith("#")))


class CompilerMissing(Exception):
    """No C++ compiler was found."""


class CompileFailed(Exception):
    """The compiler refused the operator's sources; the message is what it said."""


COMPILERS: Final = ("c++", "g++", "clang++")
# No -march: each source picks its instruction set itself, and the processor is asked at run time.
# -ffp-contract=off keeps the portable path the same on processors that would fuse its arithmetic.
FLAGS: Final = (
    *("-std=c++17", "-O3", "-w", "-fPIC"),
    *("-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-ffp-contract=off"),
)
# Without these the linker would add a dependency on libstdc++ and an identifier; symbols name nothing of use.
LINK_FLAGS: Final = {"linux": ("-Wl,--as-needed", "-Wl,--build-id=none", "-s")}


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
    with TemporaryDirectory() as name:
        objects = [str(Path(name) / f"{path.stem}.o") for path in sorted(SOURCES.glob("*.cc"))]
        # NOTE run among the sources, so that no path of this machine can enter the library.
        compiles = [[compiler, *FLAGS, "-c", f"{Path(made).stem}.cc", "-o", made] for made in objects]
        with ThreadPoolExecutor(max_workers=cpu_count()) as pool:
            list(pool.map(_run, compiles))
        _run([compiler, "-shared", *objects, *LINK_FLAGS.get(sys.platform, ()), "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    """Run a compiler command in the folder of the sources; CompileFailed if it fails."""
    result = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise CompileFailed(result.stderr)
