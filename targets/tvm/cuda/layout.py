"""How a packed weight lies in a GPU's memory. All of it is done when a model is compiled.

Rows go in fours, inputs in chunks of 32. A thread takes a chunk of four rows: the 32 codes of a row are as
many words as a code has bits, code i from bit i * bits on. Word j of each of the four rows is 16 bytes, one
load; the threads of a warp take neighbouring chunks, so that a load of the warp is 512 bytes without a gap.

    codes   i32 [fours, strips, words of a code, chunks of the strip, 4]    a strip is 32 chunks, the last
                                                                            has those that are left
    scales  f16 [fours, groups, 4]
    zeros   u8  [fours, groups, 4]      not for symmetric formats

Fours are filled up to whole blocks of threads: those rows, and inputs that fill up a chunk, have code 0, and
such rows scale 0.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gammac.diagnostics import CompileError
from gammac.formats import IntegerFormat, Quantized
from gammac.targets.tvm.cuda.grid import WARP
from gammac.targets.tvm.kernels import Packable

FOUR: Final = 4
CHUNK: Final = 32
WARPS: Final = 4  # of a block, each with four rows
BLOCK_ROWS: Final = WARPS * FOUR
SMALLEST_GROUP: Final = 16


@dataclass(frozen=True)
class Layout:
    """Sizes of a packed weight [rows, columns]."""

    format: IntegerFormat
    rows: int
    columns: int

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.format.bits

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
    def parts(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and element type of each array, by name."""
        scales = (self.fours, self.groups, FOUR)
        zeros = {} if self.format.symmetric else {"zeros": (scales, "uint8")}
        return {"codes": ((self.fours, self.words), "int32"), "scales": (scales, "float16"), **zeros}


def layout_of(format_: Packable, outputs: int, inputs: int) -> Layout:
    """Raises CompileError for a group size that has no kernel."""
    assert isinstance(format_, IntegerFormat), f"{format_.name} has no CUDA kernel"
    layout = Layout(format_, outputs, inputs)
    assert layout.segment  # raises
    return layout


def pack(quantized: Quantized) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a weight. Raises CompileError for a group size that has no kernel."""
    assert isinstance(quantized.format, IntegerFormat), f"{quantized.format.name} has no CUDA kernel"
    layout = layout_of(quantized.format, *quantized.codes.shape)
    packed = {
        "codes": _codes(quantized.codes.numpy(), layout),
        "scales": _by_fours(quantized.scales.numpy().astype(np.float16), layout),
    }
    if quantized.zeros is not None:
        packed["zeros"] = _by_fours(quantized.zeros.numpy(), layout)
    return packed


def _codes(codes: npt.NDArray[np.uint8], layout: Layout) -> npt.NDArray[np.int32]:
    """Codes [rows, columns] to words [fours, words]."""
    rows, bits = layout.fours * FOUR, layout.bits
    padded = np.zeros((rows, layout.chunks * CHUNK), np.uint8)
    padded[: layout.rows, : layout.columns] = codes
    # a chunk's bits in order, low first, are its words: [fours, 4, chunks, words of a code]
    stream = np.unpackbits(padded[..., None], axis=-1, count=bits, bitorder="little")
    words = np.packbits(stream.reshape(rows, layout.chunks, -1), axis=-1, bitorder="little").view("<i4")
    by_four = words.reshape(layout.fours, FOUR, layout.chunks, bits).transpose(0, 3, 2, 1)
    strips = [by_four[:, :, at : at + WARP].reshape(layout.fours, -1) for at in range(0, layout.chunks, WARP)]
    return np.concatenate(strips, axis=1)


def _by_fours(values: npt.NDArray[Any], layout: Layout) -> npt.NDArray[Any]:
    """[rows, groups] to [fours, groups, 4]."""
    padded = np.zeros((layout.fours * FOUR, layout.groups), values.dtype)
    padded[: layout.rows] = values
    return np.ascontiguousarray(padded.reshape(layout.fours, FOUR, layout.groups).transpose(0, 2, 1))
