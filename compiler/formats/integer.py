"""Integer codes on a grid: scale · (code − zero point)."""

from dataclasses import dataclass
from typing import ClassVar, Final

from torch import Tensor

from gammac.formats.base import SCALE_BITS, Format, Parts, Quantized, group_name, spread

INTEGER: Final = "integer"


@dataclass(frozen=True)
class IntegerFormat(Format):
    """Codes of `bits` bits with a scale for each `group` inputs of a row (0: the whole row).

    Parts: codes u8 [rows, columns], scales f16 [rows, groups] and, unless symmetric, zero points
    u8 [rows, groups].
    """

    kind: ClassVar[str] = INTEGER
    bits: int
    group: int
    symmetric: bool = False

    @property
    def name(self) -> str:
        """For example w3g64, w4channel, w4g32-sym."""
        return f"w{self.bits}{group_name(self.group)}{'-sym' if self.symmetric else ''}"

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric format."""
        return 1 << (self.bits - 1)

    def storage_bits(self, rows: int, columns: int) -> int:
        """Codes, f16 scales, zero points as wide as a code."""
        per_group = SCALE_BITS + (0 if self.symmetric else self.bits)
        return self.payload_bits(rows, columns) + per_group * rows * self.groups(columns)

    def dequantize(self, parts: Parts) -> Tensor:
        """scale · (code − zero point), f32 [rows, columns]."""
        codes = parts["codes"]
        columns = codes.shape[1]
        size = self.inputs_per_scale(columns)
        stored = parts.get("zeros")
        zeros = self.midpoint if stored is None else spread(stored.float(), size, columns)
        return (codes.float() - zeros) * spread(parts["scales"].float(), size, columns)

    def quantized(self, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Quantized:
        """A weight from its parts; a symmetric format has no zero points."""
        parts = {"codes": codes, "scales": scales}
        return Quantized(self, parts if zeros is None else {**parts, "zeros": zeros})
