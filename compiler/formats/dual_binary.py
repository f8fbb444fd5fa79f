"""Two binary planes: each weight is one of 0, α₁, α₂ and α₁ + α₂.

DB-LLM (Chen et al. 2024, arXiv 2402.11960), section 3.2, "Flexible Dual Binarization": 2-bit codes whose
two bits have a scale each. A product with such a weight is the sum of two products with binary ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from gammac.formats.base import SCALE_BITS, Format, Parts, Quantized, group_name, spread
from gammac.formats.integer import IntegerFormat

DUAL_BINARY: Final = "dual_binary"
PLANES: Final = ("first", "second")
# which planes a level has, from α₂, the lowest, over 0 and α₁ + α₂ to α₁, where α₁ > 0
FIRST_OF_LEVEL: Final = (0, 0, 1, 1)
SECOND_OF_LEVEL: Final = (1, 0, 1, 0)


@dataclass(frozen=True)
class DualBinaryFormat(Format):
    """Parts: first and second u8 [rows, columns], 0 or 1; scales f16 [rows, groups, 2], α₁ and α₂.

    α₁ and α₂ have opposite signs and α₁ is the larger, so that the levels lie in the order
    α₂ < 0 < α₁ + α₂ < α₁, or in its mirror image.
    """

    kind: ClassVar[str] = DUAL_BINARY
    group: int
    bits: int = 2

    @property
    def name(self) -> str:
        """For example fdb2g64."""
        return f"fdb2{group_name(self.group)}"

    @property
    def plane(self) -> IntegerFormat:
        """What one plane is stored as: code 1 - b, scale -α, so that -α · (1 - b - 1) = α · b."""
        return IntegerFormat(1, self.group, symmetric=True)

    def storage_bits(self, rows: int, columns: int) -> int:
        """Two bits a weight, two f16 scales a group."""
        return self.payload_bits(rows, columns) + 2 * SCALE_BITS * rows * self.groups(columns)

    def part_bits(self) -> Mapping[str, int]:
        """Stored bits of an element of each part."""
        return {"first": 1, "second": 1, "scales": SCALE_BITS}

    def dequantize(self, parts: Parts) -> Tensor:
        """α₁ · first + α₂ · second, f32 [rows, columns]."""
        first, second = (p.dequantize() for p in self.planes(parts))
        return first + second

    def planes(self, parts: Parts) -> tuple[Quantized, Quantized]:
        """Two binary weights whose sum it is."""
        scales = parts["scales"]
        first, second = (
            self.plane.quantized(1 - parts[name], -scales[..., i].contiguous())
            for i, name in enumerate(PLANES)
        )
        return first, second

    def quantized(self, codes: Tensor, scales: Tensor) -> Quantized:
        """A weight from the indices of its levels u8 [rows, columns], ascending as `levels` has them, and
        α₁, α₂ [rows, groups, 2]."""
        size, columns = self.inputs_per_scale(codes.shape[1]), codes.shape[1]
        mirrored = spread((scales[..., 0] < 0).to(torch.uint8), size, columns).bool()
        index = torch.where(mirrored, 3 - codes.long(), codes.long())
        first = torch.tensor(FIRST_OF_LEVEL, dtype=torch.uint8)[index]
        second = torch.tensor(SECOND_OF_LEVEL, dtype=torch.uint8)[index]
        return Quantized(self, {"first": first, "second": second, "scales": scales.half()})

    def codes_of(self, parts: Parts) -> Tensor:
        """u8 [rows, columns]: which of the ascending levels each weight is on."""
        columns = parts["first"].shape[1]
        # level = 2 · first - second + 1, counted from the other end where the order is mirrored
        level = 2 * parts["first"] + 1 - parts["second"]
        mirrored = (parts["scales"][..., 0] < 0).to(torch.uint8)
        return torch.where(spread(mirrored, self.inputs_per_scale(columns), columns).bool(), 3 - level, level)


def levels_of(scales: Tensor) -> Tensor:
    """The four levels f32 [..., 4], ascending, of α₁ and α₂ [..., 2] in order."""
    first, second = scales.float().unbind(-1)
    return torch.stack([second, torch.zeros_like(first), first + second, first], -1).sort(-1).values


def in_order(scales: Tensor, least: float) -> Tensor:
    """α₁ and α₂ f32 [..., 2], changed where they break the order, as f16 holds them.

    α₂ gets the sign that α₁ has not and a size of `least` or more, α₁ a larger size than that. Only in this
    order is DB-LLM's closed form of the assignment that of the nearest level.
    """
    first, second = scales.float().unbind(-1)
    sign = torch.where(first < 0, -1.0, 1.0)
    size = (-sign * second).clamp(min=least).half().float()
    long = torch.maximum(first.abs(), size * (1 + 2.0**-9) + least)
    return torch.stack([sign * long, -sign * size], -1).half().float()
