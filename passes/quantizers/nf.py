"""NormalFloat: each weight to the nearest quantile of a normal distribution, in units of its group's largest.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314), section 3. No search for a smaller range: the scale is the
largest magnitude, as in the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gammac.formats import DOUBLE_NORMAL_FLOAT, NORMAL_FLOAT, Format, NormalFloat, Quantized, spread
from gammac.formats.normal_float import nearest_level, normal_levels
from gammac.passes.quantizers.grid import SMALLEST_SCALE
from gammac.passes.quantizers.levels import by_group, sweep_to_levels


@dataclass(frozen=True)
class Nf:
    """The nearest level; nothing to choose."""

    name: ClassVar[str] = "nf"
    needs_gram: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = (NORMAL_FLOAT, DOUBLE_NORMAL_FLOAT)
    stacks: ClassVar[bool] = True

    def quantize(self, weight: Tensor, gram: Tensor | None, formats: Sequence[Format]) -> list[Quantized]:
        """See Quantizer. The Gram matrix is not looked at."""
        found = []
        for format_ in formats:
            assert isinstance(format_, NormalFloat), f"{format_.name} has no normal levels"
            stored = _absmax(weight, format_)
            columns = weight.shape[1]
            scales = spread(divisors(format_, stored), format_.inputs_per_scale(columns), columns)
            codes = nearest_level(weight / scales, normal_levels(format_.bits))
            found.append(format_.quantized(codes, stored))
        return found


def sweep_normal_float(weight: Tensor, format_: NormalFloat, order: Tensor, factor: Tensor) -> Quantized:
    """NormalFloat with GPTQ's error feedback; scales are those of the original weight."""
    stored = _absmax(weight, format_)
    levels = format_.scales_of(stored)[..., None] * normal_levels(format_.bits)
    size = format_.inputs_per_scale(weight.shape[1])
    return format_.quantized(sweep_to_levels(weight, levels, size, order, factor), stored)


def _absmax(weight: Tensor, format_: NormalFloat) -> dict[str, Tensor]:
    """The largest magnitude of each group, as it is stored."""
    groups = by_group(weight, format_.inputs_per_scale(weight.shape[1]))
    return format_.scale_parts(groups.abs().amax(-1).clamp(min=SMALLEST_SCALE))


def divisors(format_: NormalFloat, stored: dict[str, Tensor]) -> Tensor:
    """Scales f32 [rows, groups] that can be divided by."""
    scales = format_.scales_of(stored)  # doubly quantized ones may come out as nothing, or less
    return torch.where(scales.abs() < SMALLEST_SCALE, SMALLEST_SCALE, scales)
