"""What sparse formats share: values of what is kept, where it stands, zero elsewhere."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Self

import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats.base import CHANNEL, SCALE_BITS, Format, Parts, Quantized, group_name, spread
from gammac.formats.integer import IntegerFormat

FLOAT_WIDTH: Final = 16


@dataclass(frozen=True)
class KeptFormat(Format):
    """`kept_of(columns)` values of `width` bits a row on a symmetric grid with an f16 scale for each `group`
    original inputs (0: the whole row), or, at 16 bits, f16 numbers without a scale; and their places."""

    together: ClassVar[int] = 1  # how many columns no order may tear apart
    places_part: ClassVar[str] = "places"
    width: int
    group: int

    @abstractmethod
    def kept_of(self, columns: int) -> int:
        """How many weights of a row are kept."""

    @abstractmethod
    def place_bits(self, columns: int) -> int:
        """What their places take in a row."""

    @abstractmethod
    def best(self, scores: Tensor) -> Tensor:
        """The mask bool [rows, columns] of those that are kept: the largest scores; of equals the first."""

    @abstractmethod
    def places(self, mask: Tensor) -> Tensor:
        """A mask bool [rows, columns] as it is stored, u8."""

    @abstractmethod
    def mask(self, places: Tensor) -> Tensor:
        """The inverse of `places`."""

    @property
    def is_float(self) -> bool:
        """Whether kept values are f16 numbers."""
        return self.width == FLOAT_WIDTH

    @property
    def grid(self) -> IntegerFormat:
        """The format of kept values: symmetric, so that zero is one of its numbers."""
        assert not self.is_float, f"{self.name} has no grid"
        return IntegerFormat(self.width, self.group, True)

    @property
    def values_name(self) -> str:
        """The part of a name that tells of values."""
        return "f16" if self.is_float else f"w{self.width}{group_name(self.group)}"

    def payload_bits(self, rows: int, columns: int) -> int:
        """Kept values and their places."""
        return rows * (self.kept_of(columns) * self.width + self.place_bits(columns))

    def storage_bits(self, rows: int, columns: int) -> int:
        """Kept values, places, f16 scales."""
        scales = 0 if self.is_float else SCALE_BITS * rows * self.groups(columns)
        return self.payload_bits(rows, columns) + scales

    def dequantize(self, parts: Parts) -> Tensor:
        """Kept values at their places, zero elsewhere, f32 [rows, columns]."""
        mask, codes = self.mask(parts[self.places_part]), parts["codes"]
        values = codes.float()
        if not self.is_float:
            scales = spread(parts["scales"].float(), self.inputs_per_scale(mask.shape[1]), mask.shape[1])
            values = (values - self.grid.midpoint) * scales[mask].reshape_as(codes)
        return torch.zeros(mask.shape).masked_scatter_(mask, values)

    def check(self, parts: Parts) -> None:
        """Raises CompileError for places that keep another number than there are codes."""
        kept, mask = parts["codes"].shape[1], self.mask(parts[self.places_part])
        if kept != self.kept_of(mask.shape[1]) or bool((mask.sum(1) != kept).any()):
            raise CompileError(
                f"these are no {self.name} codes: their places are not those of {kept} a row",
                hint="the cache or the artifact is damaged; compile again",
            )

    def quantized(self, codes: Tensor, mask: Tensor, scales: Tensor | None = None) -> Quantized:
        """A weight from codes [rows, columns] and the mask [rows, columns] of those that are kept."""
        kept = codes[mask].reshape(len(mask), self.kept_of(mask.shape[1]))
        codes = kept.half() if self.is_float else kept.to(torch.uint8)
        parts = {"codes": codes, self.places_part: self.places(mask)}
        return Quantized(self, parts if scales is None else {**parts, "scales": scales.half()})

    def fit(self, in_features: int) -> Self:
        """See Format; f16 numbers have no group."""
        return self if self.is_float else super().fit(in_features)

    def with_group(self, group: int) -> Self:
        """See Format; f16 numbers have no group."""
        return replace(self, group=CHANNEL if self.is_float else group)


def largest(scores: Tensor, counts: Tensor) -> Tensor:
    """Of each row of scores [rows, columns] the `counts` [rows] largest, as a mask; of equals the first."""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(scores.shape[1]).expand_as(order))
    return ranks < counts[:, None]
