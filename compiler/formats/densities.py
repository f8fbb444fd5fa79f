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

from gammac.formats.kept import KeptFormat, largest

N_OF_EIGHT: Final = "n_of_eight"
UNSTRUCTURED: Final = "unstructured"
EIGHT: Final = 8


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
