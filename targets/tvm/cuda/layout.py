"""How a packed weight lies in a GPU's memory. All of it is done when a model is compiled.

Rows go in fours, inputs in chunks of 32. A thread takes a chunk of four rows: the 32 codes of a row are as
many words as a code has bits, code i from bit i * bits on. Word j of each of the four rows is 16 bytes, one
load; the threads of a warp take neighbouring chunks, so that a load of the warp is 512 bytes without a gap.

    codes   i32 [fours, strips, words of a code, chunks of the strip, 4]    a strip is 32 chunks, the last
                                                                            has those that are left
    scales  f16 [fours, groups, 4]
    zeros   u8  [fours, groups, 4]      not for symmetric formats
    offsets f16 [fours, groups, 4]      only of formats around offsets

Of each four inputs of a 2:4 weight two are kept: their codes, then their positions, two bits each as the
hardware counts them, take the place of codes; a code has w / 2 + 1 bits then, a whole number for even w.

Of trellis codes the four codes of a column, the first row's on top, are one number, and number i of a chunk
lies from bit i * 4 * bits on; such words are as many, and lie in the same order, one after the other.

Fours are filled up to whole blocks of threads: those rows, and inputs that fill up a chunk, have code 0, and
such rows scale 0.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any, Final, TypeGuard

import numpy as np
import numpy.typing as npt

from gammac.diagnostics import CompileError
from gammac.formats import (
    Format,
    IntegerFormat,
    OffsetNormalFloat,
    Quantized,
    TrellisFormat,
    TwoFourFormat,
    tile_bounds,
)
from gammac.formats.trellis import unpack
from gammac.formats.two_four import PATTERNS, POSITION_BITS
from gammac.targets.tvm.cuda.grid import WARP
from gammac.targets.tvm.kernels import Packable, has_layout

FOUR: Final = 4
CHUNK: Final = 32
WARPS: Final = 4  # of a block, each with four rows
BLOCK_ROWS: Final = WARPS * FOUR
SMALLEST_GROUP: Final = 16


def runs(format_: Format) -> TypeGuard[Packable]:
    """Whether there are kernels for a format."""
    fills_words = not isinstance(format_, TwoFourFormat) or (format_.hardware and format_.width % 2 == 0)
    return fills_words and has_layout(format_)


@dataclass(frozen=True)
class Layout:
    """Sizes of a packed weight [rows, columns]."""

    format: Packable
    rows: int
    columns: int

    @property
    def bits(self) -> int:
        """Of a code."""
        return int(self.format.bits)

    @property
    def blocks(self) -> int:
        """Blocks of 16 rows."""
        return -(-self.rows // BLOCK_ROWS)

    @property
    def fours(self) -> int:
        """Fours of rows, filled up to whole blocks."""
        return self.blocks * WARPS

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return -(-self.columns // CHUNK)

    @property
    def words(self) -> int:
        """Words of a four."""
        return self.chunks * self.bits * FOUR

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return min(self.format.inputs_per_scale(self.columns), self.columns)

    @property
    def groups(self) -> int:
        """Scales in a row."""
        return -(-self.columns // self.group)

    @property
    def segment(self) -> int:
        """Inputs of a chunk that share a scale. Raises CompileError for a group that cuts it finer."""
        if self.groups == 1:
            return CHUNK
        segment = gcd(self.group, CHUNK)
        if segment < SMALLEST_GROUP:
            raise CompileError(
                f"there is no CUDA kernel for groups of {self.group} inputs",
                hint=f"a multiple of {SMALLEST_GROUP}, or channel",
            )
        return segment

    @property
    def tiles(self) -> int:
        """Parts of a trellis' column that have a stream each."""
        return len(tile_bounds(self.rows)) - 1

    @property
    def parts(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and element type of each array, by name."""
        of_groups = (self.fours, self.groups, FOUR)
        parts = {"codes": ((self.fours, self.words), "int32"), "scales": (of_groups, "float16")}
        if isinstance(self.format, IntegerFormat) and not self.format.symmetric:
            parts["zeros"] = (of_groups, "uint8")
        if isinstance(self.format, OffsetNormalFloat):
            parts["offsets"] = (of_groups, "float16")
        return parts


def layout_of(format_: Format, outputs: int, inputs: int) -> Layout:
    """Raises CompileError for a group size, or a number of rows, that has no kernel."""
    assert runs(format_), f"{format_.name} has no CUDA kernel"
    layout = Layout(format_, outputs, inputs)
    assert layout.segment  # raises
    if isinstance(format_, TrellisFormat) and outputs % BLOCK_ROWS:
        raise CompileError(
            f"{format_.name} has a CUDA kernel for multiples of {BLOCK_ROWS} rows, not for {outputs}",
            hint="leave such a weight to an integer format",
        )
    return layout


def pack(quantized: Quantized) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a weight. Raises CompileError for a shape that has no kernel."""
    format_, rows = quantized.format, len(quantized.scales)
    if isinstance(format_, TrellisFormat):
        packed = quantized.parts["packed"]
        layout = layout_of(format_, rows, len(packed))
        codes = _of_columns(unpack(packed, format_.bits, rows).numpy(), layout)
    elif isinstance(format_, TwoFourFormat):
        patterns = quantized.parts["patterns"].numpy()
        layout = layout_of(format_, rows, FOUR * patterns.shape[1])
        codes = _of_rows(_sparse_bits(quantized.codes.numpy(), patterns, format_.width), layout)
    else:
        layout = layout_of(format_, *quantized.codes.shape)
        codes = _of_rows(_bits(quantized.codes.numpy(), layout.bits), layout)
    found = {"codes": codes, "scales": _by_fours(quantized.scales.numpy().astype(np.float16), layout)}
    if quantized.zeros is not None:
        found["zeros"] = _by_fours(quantized.zeros.numpy(), layout)
    if isinstance(format_, OffsetNormalFloat):
        found["offsets"] = _by_fours(format_.offsets_of(quantized.parts).numpy().astype(np.float16), layout)
    return found


def _bits(codes: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.uint8]:
    """The bits of codes [rows, columns], low first: [rows, columns * count]."""
    return np.unpackbits(codes[..., None], axis=-1, count=count, bitorder="little").reshape(len(codes), -1)


def _sparse_bits(
    codes: npt.NDArray[np.uint8], patterns: npt.NDArray[np.uint8], width: int
) -> npt.NDArray[np.uint8]:
    """The bits of a 2:4 weight: of each group of four inputs two codes, then two positions."""
    places = np.array(PATTERNS, np.uint8)[patterns].reshape(codes.shape)
    shape = (*patterns.shape, -1)
    parts = [_bits(codes, width).reshape(shape), _bits(places, POSITION_BITS).reshape(shape)]
    return np.concatenate(parts, axis=2).reshape(len(codes), -1)


def _of_rows(stream: npt.NDArray[np.uint8], layout: Layout) -> npt.NDArray[np.int32]:
    """Bits [rows, columns * bits of a code] to words [fours, words]."""
    rows, bits = layout.fours * FOUR, layout.bits
    padded = np.zeros((rows, layout.chunks * CHUNK * bits), np.uint8)
    padded[: layout.rows, : stream.shape[1]] = stream
    # a chunk's bits in order, low first, are its words: [fours, 4, chunks, words of a code]
    chunks = padded.reshape(rows, layout.chunks, -1)
    words = np.packbits(chunks, axis=-1, bitorder="little").view("<i4")
    return _in_strips(words.reshape(layout.fours, FOUR, layout.chunks, bits).transpose(0, 3, 2, 1), layout)


def _of_columns(codes: npt.NDArray[np.uint8], layout: Layout) -> npt.NDArray[np.int32]:
    """Codes [columns, rows] of a trellis to words [fours, words]."""
    bits, shape = layout.bits, (layout.chunks * CHUNK, layout.fours, FOUR)
    padded = np.zeros(shape, np.uint8)
    padded[: layout.columns] = codes.reshape(-1, *shape[1:])
    # the last row's code is lowest: [fours, columns, 4, bits]
    upwards = padded.transpose(1, 0, 2)[:, :, ::-1, None]
    stream = np.unpackbits(upwards, axis=-1, count=bits, bitorder="little")
    words = np.packbits(stream.reshape(layout.fours, layout.chunks, -1), axis=-1, bitorder="little")
    by_load = words.view("<i4").reshape(layout.fours, layout.chunks, bits, FOUR)
    return _in_strips(by_load.transpose(0, 2, 1, 3), layout)


def _in_strips(words: npt.NDArray[np.int32], layout: Layout) -> npt.NDArray[np.int32]:
    """Words [fours, words of a code, chunks, 4], those of each 32 chunks together."""
    strips = [words[:, :, at : at + WARP].reshape(layout.fours, -1) for at in range(0, layout.chunks, WARP)]
    return np.concatenate(strips, axis=1)


def _by_fours(values: npt.NDArray[Any], layout: Layout) -> npt.NDArray[Any]:
    """[rows, groups] to [fours, groups, 4]."""
    padded = np.zeros((layout.fours * FOUR, layout.groups), values.dtype)
    padded[: layout.rows] = values
    return np.ascontiguousarray(padded.reshape(layout.fours, FOUR, layout.groups).transpose(0, 2, 1))
