"""Most weights binary, some in 8 bits: PB-LLM (Shang et al. 2023, arXiv 2310.00034), section 3.

The headline counts a bit for a binary weight and eight for a salient one; which is which takes another bit
a weight, and that is counted here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from gammac.formats.base import SCALE_BITS, Format, Parts, group_name, spread

PARTLY_BINARY: Final = "partly_binary"
SALIENT_BITS: Final = 8


@dataclass(frozen=True)
class PartlyBinaryFormat(Format):
    """Of `bits` between 1 and 8 follows the share of salient weights, (bits - 1) / 7.

    Parts: salient u8 [rows, columns], 1 for a salient weight; signs u8 [binary weights], 1 for +, and codes
    u8 [salient weights], both row after row; means and scales f16 [rows, groups] of the binary weights;
    salient_scales f16 [rows, 1] and salient_zeros u8 [rows, 1] of the others. Of each group of columns
    `salient_in` weights are salient, so that what is stored depends on the shape alone.
    """

    kind: ClassVar[str] = PARTLY_BINARY
    by_rows: ClassVar[bool] = False  # how many of a row's weights are salient is left open
    bits: float
    group: int

    @property
    def name(self) -> str:
        """For example pb1.7g128."""
        return f"pb{self.bits:g}{group_name(self.group)}"

    def salient_in(self, rows: int, width: int) -> int:
        """How many of rows · width weights are salient."""
        return round((self.bits - 1) / (SALIENT_BITS - 1) * rows * width)

    def salient_total(self, rows: int, columns: int) -> int:
        """How many weights are salient in all groups of columns together."""
        size = self.inputs_per_scale(columns)
        return sum(self.salient_in(rows, min(size, columns - at)) for at in range(0, columns, size))

    def storage_bits(self, rows: int, columns: int) -> int:
        """Signs, 8-bit codes, the bitmap, two f16 numbers a group, an f16 and eight bits a row."""
        salient, weights = self.salient_total(rows, columns), rows * columns
        binary = weights - salient + 2 * SCALE_BITS * rows * self.groups(columns)
        return weights + binary + SALIENT_BITS * salient + (SCALE_BITS + SALIENT_BITS) * rows

    def part_bits(self) -> Mapping[str, int]:
        """Stored bits of an element of each part."""
        return {
            "salient": 1, "signs": 1, "codes": SALIENT_BITS, "means": SCALE_BITS, "scales": SCALE_BITS,
            "salient_scales": SCALE_BITS, "salient_zeros": SALIENT_BITS,
        }  # fmt: skip

    def dequantize(self, parts: Parts) -> Tensor:
        """mean ± scale, or salient scale · (code - zero point), f32 [rows, columns]."""
        salient = parts["salient"].bool()
        rows, columns = salient.shape
        size = self.inputs_per_scale(columns)
        signs = torch.zeros(rows, columns).masked_scatter_(~salient, 2 * parts["signs"].float() - 1)
        codes = torch.zeros(rows, columns).masked_scatter_(salient, parts["codes"].float())
        binary = spread(parts["means"].float(), size, columns) + signs * spread(
            parts["scales"].float(), size, columns
        )
        return torch.where(
            salient, (codes - parts["salient_zeros"].float()) * parts["salient_scales"].float(), binary
        )
