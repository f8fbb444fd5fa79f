"""Binary weights with a second bit each: BiLLM (Huang et al. 2024, arXiv 2402.04291), section 3.

In a salient column the second bit is the sign of a binary residual; elsewhere it says which of two scales
a weight has. The headline counts the second bit of salient columns only, and neither scales nor means:
what is stored is 2.75 bits a weight and more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from gammac.formats.base import SCALE_BITS, Format, Parts, group_name, spread

BINARY_RESIDUAL: Final = "binary_residual"
# f16 numbers of a group in a row: a mean and two scales for plain weights, the same for salient ones
PLAIN_MEAN, CONCENTRATED, SPARSE, SALIENT_MEAN, ORDER_1, ORDER_2 = range(6)
NUMBERS: Final = 6


@dataclass(frozen=True)
class BinaryResidualFormat(Format):
    """`bits` of 1.1 allow a tenth of the columns of each group to be salient.

    Parts: signs and second u8 [rows, columns], 0 or 1 (1 is +, and the sparse group of larger weights);
    salient u8 [1, columns]; numbers f16 [rows, groups, 6].
    """

    kind: ClassVar[str] = BINARY_RESIDUAL
    by_rows: ClassVar[bool] = False  # a column is salient in all rows or in none
    bits: float
    group: int

    @property
    def name(self) -> str:
        """For example bi1.1g128."""
        return f"bi{self.bits:g}{group_name(self.group)}"

    def most_salient(self, width: int) -> int:
        """How many of a group's columns may be salient, one at least."""
        return max(1, int((self.bits - 1) * width + 1e-6))

    def storage_bits(self, rows: int, columns: int) -> int:
        """Two bits a weight, one a column, six f16 numbers a group of a row."""
        return 2 * rows * columns + columns + NUMBERS * SCALE_BITS * rows * self.groups(columns)

    def part_bits(self) -> Mapping[str, int]:
        """Stored bits of an element of each part."""
        return {"signs": 1, "second": 1, "salient": 1, "numbers": SCALE_BITS}

    def dequantize(self, parts: Parts) -> Tensor:
        """mean ± scale, in salient columns ± the residual's scale, f32 [rows, columns]."""
        signs, second = (2 * parts[name].float() - 1 for name in ("signs", "second"))
        columns = signs.shape[1]
        size = self.inputs_per_scale(columns)
        n = [spread(numbers, size, columns) for numbers in parts["numbers"].float().unbind(-1)]
        plain = n[PLAIN_MEAN] + signs * torch.where(second > 0, n[SPARSE], n[CONCENTRATED])
        salient = n[SALIENT_MEAN] + signs * n[ORDER_1] + second * n[ORDER_2]
        return torch.where(parts["salient"].bool(), salient, plain)
