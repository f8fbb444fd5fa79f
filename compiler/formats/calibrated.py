"""NormalFloat around an offset: Information Calibration Quantization of IR-QLoRA (Qin et al. 2024, arXiv
2402.05445, section 3.2), whose blocks are shifted before they are rounded and shifted back afterwards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from gammac.formats.base import SCALE_BITS, Parts, spread
from gammac.formats.normal_float import (
    DOUBLE_BITS,
    DOUBLE_BLOCK,
    DoubleNormalFloat,
    from_dynamic,
    to_dynamic,
)

CALIBRATED_NORMAL_FLOAT: Final = "calibrated_normal_float"


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
