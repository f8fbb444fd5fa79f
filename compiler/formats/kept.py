"""Sparsity beside 2:4: so many of each eight inputs are kept, or a share of each row, wherever it stands.

Layer-wise rates (OWL, BESA) are made of these: the same width at several densities, among which an allocation
chooses. No emitter multiplies by them; the interpreter measures what such masks are worth.
"""

from dataclasses import dataclass, field
from itertools import combinations
from math import comb
from typing import ClassVar, Final

import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats.base import SCALE_BITS, Format, Parts, Quantized, group_name, spread
from gammac.formats.integer import IntegerFormat
from gammac.formats.two_four import FLOAT_WIDTH

N_OF_EIGHT: Final = "n_of_eight"
UNSTRUCTURED: Final = "unstructured"
EIGHT: Final = 8


@dataclass(frozen=True)
class KeptFormat(Format):
    """`kept_of(columns)` values of `width` bits a row on a symmetric grid with an f16 scale for each `group`
    original inputs (0: the whole row), or, at 16 bits, f16 numbers without a scale; and their places."""

    together: ClassVar[int] = 1  # how many columns no order may tear apart
    width: int
    group: int

    def kept_of(self, columns: int) -> int:
        """How many weights of a row are kept."""
        raise NotImplementedError

    def place_bits(self, columns: int) -> int:
        """What their places take in a row."""
        raise NotImplementedError

    def best(self, scores: Tensor) -> Tensor:
        """The mask bool [rows, columns] of those that are kept: the largest scores; of equals the first."""
        raise NotImplementedError

    def places(self, mask: Tensor) -> Tensor:
        """A mask bool [rows, columns] as it is stored, u8."""
        raise NotImplementedError

    def mask(self, places: Tensor) -> Tensor:
        """The inverse of `places`."""
        raise NotImplementedError

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
        mask, codes = self.mask(parts["places"]), parts["codes"]
        values = codes.float()
        if not self.is_float:
            scales = spread(parts["scales"].float(), self.inputs_per_scale(mask.shape[1]), mask.shape[1])
            values = (values - self.grid.midpoint) * scales[mask].reshape_as(codes)
        return torch.zeros(mask.shape).masked_scatter_(mask, values)

    def check(self, parts: Parts) -> None:
        """Raises CompileError for places that keep another number than there are codes."""
        kept = parts["codes"].shape[1]
        if bool((self.mask(parts["places"]).sum(1) != kept).any()):
            raise CompileError(
                f"these are no {self.name} codes: their places are not those of {kept} a row",
                hint="the cache or the artifact is damaged; compile again",
            )

    def quantized(self, codes: Tensor, mask: Tensor, scales: Tensor | None = None) -> Quantized:
        """A weight from codes [rows, columns] and the mask [rows, columns] of those that are kept."""
        kept = codes[mask].reshape(len(mask), self.kept_of(mask.shape[1]))
        parts = {"codes": kept.half() if self.is_float else kept.to(torch.uint8), "places": self.places(mask)}
        return Quantized(self, parts if scales is None else {**parts, "scales": scales.half()})

    def fit(self, in_features: int) -> "KeptFormat":
        """See Format; f16 numbers have no group."""
        return self if self.is_float else super().fit(in_features)


@dataclass(frozen=True)
class NOfEightFormat(KeptFormat):
    """`kept` of each eight inputs; their places are the number of one of (8 over kept) patterns.

    Parts: codes u8 [rows, columns · kept / 8] (f16 numbers at 16 bits); places u8 [rows, columns / 8];
    scales f16 [rows, groups], except at 16 bits.
    """

    kind: ClassVar[str] = N_OF_EIGHT
    together: ClassVar[int] = EIGHT
    kept: int
    bits: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """The headline follows."""
        object.__setattr__(self, "bits", (self.kept * self.width + self.place_bits(EIGHT)) / EIGHT)

    @property
    def name(self) -> str:
        """For example s48w4g64, s38f16."""
        return f"s{self.kept}8{self.values_name}"

    @property
    def density(self) -> float:
        """See Format."""
        return self.kept / EIGHT

    def holds(self, in_features: int) -> bool:
        """Rows are whole eights."""
        return in_features % EIGHT == 0

    def kept_of(self, columns: int) -> int:
        """See KeptFormat."""
        return columns // EIGHT * self.kept

    def place_bits(self, columns: int) -> int:
        """See KeptFormat."""
        return columns // EIGHT * (comb(EIGHT, self.kept) - 1).bit_length()

    def best(self, scores: Tensor) -> Tensor:
        """See KeptFormat."""
        eights = scores.reshape(len(scores), -1, EIGHT)
        order = torch.argsort(eights, dim=2, descending=True, stable=True)[..., : self.kept]
        return torch.zeros(eights.shape, dtype=torch.bool).scatter_(2, order, True).reshape(scores.shape)

    def places(self, mask: Tensor) -> Tensor:
        """See KeptFormat."""
        numbers = torch.zeros(1 << EIGHT, dtype=torch.uint8)
        numbers[self._patterns()] = torch.arange(comb(EIGHT, self.kept), dtype=torch.uint8)
        return numbers[(mask.reshape(len(mask), -1, EIGHT) * (1 << torch.arange(EIGHT))).sum(2)]

    def mask(self, places: Tensor) -> Tensor:
        """See KeptFormat."""
        patterns = self._patterns()[places.long().clamp(max=comb(EIGHT, self.kept) - 1)]
        return ((patterns[..., None] >> torch.arange(EIGHT)) & 1).bool().reshape(len(places), -1)

    def _patterns(self) -> Tensor:
        """As bits of a byte, in order of their numbers."""
        return torch.tensor([sum(1 << i for i in places) for places in combinations(range(EIGHT), self.kept)])


@dataclass(frozen=True)
class UnstructuredFormat(KeptFormat):
    """All but `pruned` of a hundred inputs of a row, rounded in favour of what is kept; a bit says of each
    whether it is. Rows are pruned alike, as Wanda does (arXiv 2306.11695, section 3).

    Parts: codes u8 [rows, kept] (f16 numbers at 16 bits); places u8 [rows, columns], 0 or 1; scales f16
    [rows, groups], except at 16 bits.
    """

    kind: ClassVar[str] = UNSTRUCTURED
    pruned: int
    bits: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """The headline follows."""
        object.__setattr__(self, "bits", round(self.density * self.width, 6) + 1)

    @property
    def name(self) -> str:
        """For example u50w4g64, u70f16."""
        return f"u{self.pruned}{self.values_name}"

    @property
    def density(self) -> float:
        """See Format."""
        return 1 - self.pruned / 100

    def kept_of(self, columns: int) -> int:
        """See KeptFormat."""
        return columns - columns * self.pruned // 100

    def place_bits(self, columns: int) -> int:
        """See KeptFormat."""
        return columns

    def best(self, scores: Tensor) -> Tensor:
        """See KeptFormat."""
        return largest(scores, torch.full((len(scores),), self.kept_of(scores.shape[1])))

    def places(self, mask: Tensor) -> Tensor:
        """See KeptFormat."""
        return mask.to(torch.uint8)

    def mask(self, places: Tensor) -> Tensor:
        """See KeptFormat."""
        return places.bool()


def largest(scores: Tensor, counts: Tensor) -> Tensor:
    """Of each row of scores [rows, columns] the `counts` [rows] largest, as a mask; of equals the first."""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(scores.shape[1]).expand_as(order))
    return ranks < counts[:, None]
