"""NormalFloat around an offset: Information Calibration Quantization of IR-QLoRA (Qin et al. 2024, arXiv
2402.05445, section 3.2), whose blocks are shifted before they are rounded and shifted back afterwards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from gammac.formats.base import SCALE_BITS, Format, Parts, Quantized, spread
from gammac.formats.normal_float import (
    DOUBLE_BITS,
    DOUBLE_BLOCK,
    DoubleNormalFloat,
    NormalFloat,
    from_dynamic,
    to_dynamic,
)

CALIBRATED_NORMAL_FLOAT: Final = "calibrated_normal_float"
OFFSET_NORMAL_FLOAT: Final = "offset_normal_float"


@dataclass(frozen=True)
class CalibratedNormalFloat(DoubleNormalFloat):
    """Doubly quantized NormalFloat of w − τ, with τ for each group on 8-bit dynamic levels.

    Parts: those of DoubleNormalFloat; offsets u8 [rows, groups], indices of `dynamic_levels`; offset_scales
    f16 [ceil(rows · groups / 256)], one a block of offsets. 4.253 bits a weight in groups of 64.
    """

    kind: ClassVar[str] = CALIBRATED_NORMAL_FLOAT

    @property
    def name(self) -> str:
        """For example nf4g64-icq."""
        return f"{super().name.removesuffix('-dq')}-icq"

    @property
    def plain(self) -> DoubleNormalFloat:
        """The same without offsets."""
        return DoubleNormalFloat(self.bits, self.group)

    def storage_bits(self, rows: int, columns: int) -> int:
        """Those of DoubleNormalFloat, 8-bit offsets, and an f16 a block of them."""
        offsets = rows * self.groups(columns)
        blocks = -(-offsets // DOUBLE_BLOCK)
        return super().storage_bits(rows, columns) + DOUBLE_BITS * offsets + SCALE_BITS * blocks

    def part_bits(self) -> Mapping[str, int]:
        """Stored bits of an element of each part."""
        return {**super().part_bits(), "offsets": DOUBLE_BITS, "offset_scales": SCALE_BITS}

    def dequantize(self, parts: Parts) -> Tensor:
        """scale · level + τ, f32 [rows, columns]."""
        columns = parts["codes"].shape[1]
        return super().dequantize(parts) + spread(
            self.offsets_of(parts), self.inputs_per_scale(columns), columns
        )

    def offsets_of(self, parts: Parts) -> Tensor:
        """τ, f32 [rows, groups]."""
        return from_dynamic(parts["offsets"], parts["offset_scales"])

    def offset_parts(self, offsets: Tensor) -> dict[str, Tensor]:
        """Offsets [rows, groups] as they are stored; an offset of zero stays exactly zero."""
        codes, scales = to_dynamic(offsets, torch.float16)
        return {"offsets": codes, "offset_scales": scales}


@dataclass(frozen=True)
class OffsetNormalFloat(NormalFloat):
    """NormalFloat of w − τ with τ for each group as f16: calibrated, not quantized doubly.

    Parts: those of NormalFloat; offsets f16 [rows, groups]. 4.5 bits a weight in groups of 64.
    """

    kind: ClassVar[str] = OFFSET_NORMAL_FLOAT

    @property
    def name(self) -> str:
        """For example nf4g64-offset."""
        return f"{super().name}-offset"

    @property
    def plain(self) -> NormalFloat:
        """The same without offsets."""
        return NormalFloat(self.bits, self.group)

    def storage_bits(self, rows: int, columns: int) -> int:
        """Those of NormalFloat, and an f16 a group."""
        return super().storage_bits(rows, columns) + SCALE_BITS * rows * self.groups(columns)

    def part_bits(self) -> Mapping[str, int]:
        """Stored bits of an element of each part."""
        return {**super().part_bits(), "offsets": SCALE_BITS}

    def dequantize(self, parts: Parts) -> Tensor:
        """scale · level + τ, f32 [rows, columns]."""
        columns = parts["codes"].shape[1]
        return super().dequantize(parts) + spread(
            self.offsets_of(parts), self.inputs_per_scale(columns), columns
        )

    def offsets_of(self, parts: Parts) -> Tensor:
        """τ, f32 [rows, groups]."""
        return parts["offsets"].float()

    def offset_parts(self, offsets: Tensor) -> dict[str, Tensor]:
        """Offsets [rows, groups] as they are stored."""
        return {"offsets": offsets.half()}


def in_plain_scales(format_: Format) -> NormalFloat | None:
    """What a doubly quantized format is with its scales and offsets as f16; None for other formats."""
    if isinstance(format_, CalibratedNormalFloat):
        return OffsetNormalFloat(format_.bits, format_.group)
    return NormalFloat(format_.bits, format_.group) if isinstance(format_, DoubleNormalFloat) else None


def with_plain_scales(quantized: Quantized) -> Quantized:
    """The same codes in `in_plain_scales`: scales and offsets differ by their rounding to f16."""
    double, plain = quantized.format, in_plain_scales(quantized.format)
    assert plain is not None and isinstance(double, DoubleNormalFloat)
    parts = plain.scale_parts(double.scales_of(quantized.parts))
    if isinstance(double, CalibratedNormalFloat) and isinstance(plain, OffsetNormalFloat):
        parts |= plain.offset_parts(double.offsets_of(quantized.parts))
    return plain.quantized(quantized.codes, parts)
