"""NormalFloat: codes that name quantiles of a normal distribution, one absmax scale a group.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314), section 3, "4-bit NormalFloat" and "Double Quantization".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Final

import torch
from torch import Tensor

from gammac.formats.base import SCALE_BITS, Format, Parts, Quantized, group_name, spread

NORMAL_FLOAT: Final = "normal_float"
DOUBLE_NORMAL_FLOAT: Final = "double_normal_float"
DOUBLE_BLOCK: Final = 256  # scales that share a second scale
DOUBLE_BITS: Final = 8
F32_BITS: Final = 32


@cache
def normal_levels(bits: int) -> Tensor:
    """The 2^bits levels f32, ascending from -1 to 1, one of them exactly 0 (QLoRA, equation 4, appendix E).

    Quantiles at even steps from ½ to 1 - δ, one more of them above zero than below; δ is the mean of half
    a step of 2^bits and of 2^bits - 1 levels.
    """
    count = 1 << bits
    edge = 1 - 0.5 * (1 / (2 * (count - 1)) + 1 / (2 * count))
    above = torch.special.ndtri(torch.linspace(0.5, edge, count // 2 + 1, dtype=torch.float64)[1:])
    below = -torch.special.ndtri(torch.linspace(0.5, edge, count // 2, dtype=torch.float64)[1:])
    levels = torch.cat([below.flip(0), torch.zeros(1, dtype=torch.float64), above])
    return (levels / levels.abs().max()).float()


@cache
def dynamic_levels() -> Tensor:
    """The 256 levels f32 of a signed dynamic tree, ascending, with 0 and 1 (Dettmers et al. 2022, 8-bit
    Optimizers via Block-wise Quantization, arXiv 2110.02861, section 1.3).

    Of each of seven powers of ten, 2^i middles of even steps between a tenth of it and itself.
    """
    halves = []
    for exponent in range(DOUBLE_BITS - 1):
        ends = torch.linspace(0.1, 1, (1 << exponent) + 1, dtype=torch.float64)
        halves.append((ends[1:] + ends[:-1]) / 2 * 10.0 ** (exponent - DOUBLE_BITS + 2))
    half = torch.cat(halves)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([half, -half, ends]).sort().values.float()


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """u8 indices of the nearest of ascending `levels` [n]; of equals the lower one."""
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def to_dynamic(
    values: Tensor, dtype: torch.dtype = torch.float32, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Values [rows, groups] as u8 indices of `dynamic_levels`, and the scale of each block of 256 of them:
    its largest magnitude, unless `scales` are given."""
    flat = values.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % DOUBLE_BLOCK)).reshape(-1, DOUBLE_BLOCK)
    largest = blocks.abs().amax(1).to(dtype) if scales is None else scales
    codes = nearest_level(blocks / largest.float().clamp(min=1e-30)[:, None], dynamic_levels())
    return codes.flatten()[: len(flat)].reshape(values.shape), largest


def from_dynamic(codes: Tensor, block_scales: Tensor) -> Tensor:
    """The inverse of `to_dynamic`, f32 [rows, groups]."""
    by_block = block_scales.float().repeat_interleave(DOUBLE_BLOCK)[: codes.numel()]
    return dynamic_levels()[codes.long()] * by_block.reshape(codes.shape)


@dataclass(frozen=True)
class NormalFloat(Format):
    """Parts: codes u8 [rows, columns], indices of `normal_levels`; scales f16 [rows, groups], the largest
    magnitude of each group."""

    kind: ClassVar[str] = NORMAL_FLOAT
    bits: int
    group: int

    @property
    def name(self) -> str:
        """For example nf4g64."""
        return f"nf{self.bits}{group_name(self.group)}"

    def storage_bits(self, rows: int, columns: int) -> int:
        """Codes and f16 scales."""
        return self.payload_bits(rows, columns) + SCALE_BITS * rows * self.groups(columns)

    def part_bits(self) -> Mapping[str, int]:
        """Stored bits of an element of each part."""
        return {"codes": self.bits, "scales": SCALE_BITS}

    def dequantize(self, parts: Parts) -> Tensor:
        """scale · level, f32 [rows, columns]."""
        columns = parts["codes"].shape[1]
        scales = spread(self.scales_of(parts), self.inputs_per_scale(columns), columns)
        return normal_levels(self.bits)[parts["codes"].long()] * scales

    def scales_of(self, parts: Parts) -> Tensor:
        """f32 [rows, groups]."""
        return parts["scales"].float()

    def scale_parts(self, scales: Tensor) -> dict[str, Tensor]:
        """Scales [rows, groups] as they are stored: every part but the codes."""
        return {"scales": scales.half()}

    def quantized(self, codes: Tensor, scale_parts: Parts) -> Quantized:
        """A weight from codes and what `scale_parts` gave."""
        return Quantized(self, {"codes": codes.to(torch.uint8), **scale_parts})


@dataclass(frozen=True)
class DoubleNormalFloat(NormalFloat):
    """NormalFloat with quantized scales: less their mean, on 8-bit dynamic levels, in blocks of 256.

    Parts: codes u8 [rows, columns]; scales u8 [rows, groups], indices of `dynamic_levels`; block_scales f32
    [ceil(rows · groups / 256)], one a block of scales, row after row; mean f32 [1]. QLoRA, section 3,
    "Double Quantization": 4.127 bits a weight in groups of 64.
    """

    kind: ClassVar[str] = DOUBLE_NORMAL_FLOAT
    by_rows: ClassVar[bool] = False  # blocks of scales cross the ends of rows

    @property
    def name(self) -> str:
        """For example nf4g64-dq."""
        return f"{super().name}-dq"

    def storage_bits(self, rows: int, columns: int) -> int:
        """Codes, 8-bit scales, an f32 a block of them and the f32 mean."""
        scales = rows * self.groups(columns)
        blocks = -(-scales // DOUBLE_BLOCK)
        return self.payload_bits(rows, columns) + DOUBLE_BITS * scales + F32_BITS * (blocks + 1)

    def part_bits(self) -> Mapping[str, int]:
        """Stored bits of an element of each part."""
        return {"codes": self.bits, "scales": DOUBLE_BITS, "block_scales": F32_BITS, "mean": F32_BITS}

    def scales_of(self, parts: Parts) -> Tensor:
        """f32 [rows, groups]."""
        return from_dynamic(parts["scales"], parts["block_scales"]) + parts["mean"]

    def scale_parts(self, scales: Tensor) -> dict[str, Tensor]:
        """Scales [rows, groups] as they are stored: every part but the codes."""
        mean = scales.float().mean().reshape(1)
        codes, block_scales = to_dynamic(scales.float() - mean)
        return {"scales": codes, "block_scales": block_scales, "mean": mean}
