"""Format and Quantized: what every way to store a weight has in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Self

import torch
from torch import Tensor

CHANNEL: Final = 0
SCALE_BITS: Final = 16
FALLBACK_GROUPS: Final = (256, 128, 96, 64, 32, 16)
Parts = Mapping[str, Tensor]


class Format(ABC):
    """What stored bits mean. A frozen dataclass with `bits` and `group` among its fields.

    `bits` is the headline: code bits a weight, as papers count. `group` inputs of a row share a scale
    (0: the whole row). Formats are ordered from narrow to wide.
    """

    kind: ClassVar[str]  # what a target's kernel rows call it
    by_rows: ClassVar[bool] = True  # each part has the weight's rows as its first dimension
    bits: float
    group: int

    @property
    @abstractmethod
    def name(self) -> str:
        """The spelling that `parse_format` reads."""

    @abstractmethod
    def storage_bits(self, rows: int, columns: int) -> int:
        """Everything stored for a weight [rows, columns]: codes, scales, zero points, masks, indices."""

    @abstractmethod
    def dequantize(self, parts: Parts) -> Tensor:
        """The numbers that stored parts stand for, f32 [rows, columns]."""

    @property
    def density(self) -> float:
        """The share of weights that are kept."""
        return 1.0

    def payload_bits(self, rows: int, columns: int) -> int:
        """Bits of the codes alone."""
        return int(self.bits * rows * columns + 1e-6)  # down, so that a budget of the headline is kept

    def inputs_per_scale(self, in_features: int) -> int:
        """The group size in inputs, for a weight with `in_features` columns."""
        return self.group or in_features

    def holds(self, in_features: int) -> bool:
        """Whether rows of this length can be stored at all."""
        return True

    def check(self, parts: Parts) -> None:
        """Raises CompileError for parts that stand for nothing in this format."""
        return

    def groups(self, in_features: int) -> int:
        """Scales in a row."""
        return -(-in_features // self.inputs_per_scale(in_features))

    def with_group(self, group: int) -> Self:
        """The same format with another group size."""
        changed: Self = replace(self, group=group)  # type: ignore[type-var]  # every format is a dataclass
        return changed

    def fit(self, in_features: int) -> Self:
        """This format, or the next smaller group size that divides the row.

        The fallback: the largest of 256, 128, 96, 64, 32, 16 that is below the wished group and
        divides `in_features`; if none does, one scale for the whole row.
        """
        if not self.group or in_features % self.group == 0:
            return self
        fits = [g for g in FALLBACK_GROUPS if g < self.group and in_features % g == 0]
        return self.with_group(fits[0] if fits else CHANNEL)

    def __lt__(self, other: "Format") -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[float, str, int, str]:
        return self.bits, self.kind, self.group, self.name


@dataclass(frozen=True)
class Quantized:
    """A weight in a format. `parts` are the tensors that the format's `dequantize` reads."""

    format: Format
    parts: Parts

    @property
    def codes(self) -> Tensor:
        """u8 [rows, columns]."""
        return self.parts["codes"]

    @property
    def scales(self) -> Tensor:
        """f16 [rows, groups]."""
        return self.parts["scales"]

    @property
    def zeros(self) -> Tensor | None:
        """Zero points u8 [rows, groups], where the format has them."""
        return self.parts.get("zeros")

    def dequantize(self) -> Tensor:
        """f32 [rows, columns]."""
        return self.format.dequantize(self.parts)

    def rows(self, start: int, end: int) -> "Quantized":
        """Some rows of it, still in the same format."""
        assert self.format.by_rows, f"{self.format.name} is not stored row by row"
        return Quantized(self.format, {name: part[start:end] for name, part in self.parts.items()})


def concat_rows(weights: Sequence[Quantized]) -> Quantized:
    """Weights of one format and width, one below the other."""
    first = weights[0]
    assert all(w.format == first.format for w in weights), "rows of different formats don't stack"
    return Quantized(first.format, {n: torch.cat([w.parts[n] for w in weights]) for n in first.parts})


def spread(values: Tensor, size: int, columns: int) -> Tensor:
    """Per-group values [rows, groups] to [rows, columns]."""
    return values.repeat_interleave(size, dim=1)[:, :columns]


def group_name(group: int) -> str:
    """`g64`, or `channel` for one scale a row."""
    return f"g{group}" if group else "channel"
