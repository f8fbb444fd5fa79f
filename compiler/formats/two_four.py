"""2:4 sparsity: of every four consecutive inputs of a row two weights are kept, the others are exactly zero.

Groups of four are counted in the original order of inputs, as the hardware counts them (Mishra et al. 2021,
Accelerating Sparse Deep Neural Networks, arXiv 2104.08378). Which two are kept takes 3 bits a group as the
number of one of six patterns, or 4 bits as the hardware's two positions.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Final

import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats.base import Parts
from gammac.formats.kept import KeptFormat

TWO_FOUR: Final = "two_four"
FOUR: Final = 4
KEPT: Final = 2
# the positions of the kept weights of each pattern, ascending
PATTERNS: Final = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
PATTERN_BITS: Final = 3
POSITION_BITS: Final = 2


@dataclass(frozen=True)
class TwoFourFormat(KeptFormat):
    """Kept values of `width` bits on a symmetric grid with an f16 scale for each `group` original inputs of a
    row (0: the whole row), or, at 16 bits, f16 numbers without a scale.

    `hardware`: positions are counted as the hardware stores them, a bit a weight; else as patterns, 0.75.
    The headline counts what codes take, values and patterns alike: 2.75 bits for s24w4g64.

    Parts: codes u8 [rows, columns / 2], kept values in order of inputs (f16 numbers at 16 bits); patterns u8
    [rows, columns / 4], indices of PATTERNS; scales f16 [rows, groups], except at 16 bits.
    """

    kind: ClassVar[str] = TWO_FOUR
    together: ClassVar[int] = FOUR
    places_part: ClassVar[str] = "patterns"
    hardware: bool = False
    bits: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """The headline follows from the width."""
        object.__setattr__(self, "bits", self.width * KEPT / FOUR + self.index_bits / FOUR)

    @property
    def index_bits(self) -> int:
        """What the positions of a group of four take."""
        return KEPT * POSITION_BITS if self.hardware else PATTERN_BITS

    @property
    def density(self) -> float:
        """See Format."""
        return KEPT / FOUR

    @property
    def name(self) -> str:
        """For example s24w4g64, s24w4g64-hw, s24f16."""
        return f"s24{self.values_name}{'-hw' if self.hardware else ''}"

    def holds(self, in_features: int) -> bool:
        """Rows are whole groups of four."""
        return in_features % FOUR == 0

    def kept_of(self, columns: int) -> int:
        """See KeptFormat."""
        return columns // FOUR * KEPT

    def place_bits(self, columns: int) -> int:
        """See KeptFormat."""
        return columns // FOUR * self.index_bits

    def best(self, scores: Tensor) -> Tensor:
        """See KeptFormat."""
        return keep_two(scores)

    def places(self, mask: Tensor) -> Tensor:
        """See KeptFormat."""
        return patterns_of(mask)

    def mask(self, places: Tensor) -> Tensor:
        """See KeptFormat."""
        return mask_of(places)

    def check(self, parts: Parts) -> None:
        """Raises CompileError for parts that are no 2:4 weight: an unknown pattern, or other sizes."""
        patterns, codes = parts["patterns"], parts["codes"]
        if codes.shape[1] != KEPT * patterns.shape[1] or int(patterns.max()) >= len(PATTERNS):
            raise CompileError(
                f"these are no {self.name} codes: of each four inputs two are kept, in one of six patterns",
                hint="the cache or the artifact is damaged; compile again",
            )


def by_four(values: Tensor) -> Tensor:
    """[rows, columns] as [rows, columns / 4, 4]."""
    return values.reshape(len(values), values.shape[1] // FOUR, FOUR)


def keep_two(scores: Tensor) -> Tensor:
    """Of each four columns of scores [rows, columns] the two largest, as a mask; of equals the first."""
    a, b, c, d = by_four(scores).unbind(2)
    # how many of the others are kept first; comparing is many times faster than sorting fours
    ab, ac, ad, bc, bd, cd = (
        (x >= y).to(torch.int8) for x, y in ((a, b), (a, c), (a, d), (b, c), (b, d), (c, d))
    )
    before = (3 - ab - ac - ad, ab + 2 - bc - bd, ac + bc + 1 - cd, ad + bd + cd)
    return (torch.stack(before, 2) < KEPT).reshape(scores.shape)


def is_two_four(weight: Tensor) -> Tensor:
    """Of each row of a weight [rows, columns], whether no four columns have more than two nonzeros."""
    return (by_four(weight) != 0).sum(2).amax(1) <= KEPT


def patterns_of(mask: Tensor) -> Tensor:
    """u8 [rows, columns / 4] for a mask [rows, columns] with two of each four."""
    fours = by_four(mask)
    assert bool((fours.sum(2) == KEPT).all()), "a mask keeps two of each four"
    places = torch.tensor([sum(1 << place for place in pattern) for pattern in PATTERNS])
    numbers = torch.zeros(1 << FOUR, dtype=torch.uint8).scatter_(
        0, places, torch.arange(len(PATTERNS), dtype=torch.uint8)
    )
    return numbers[(fours * torch.tensor([1, 2, 4, 8])).sum(2)]


def mask_of(patterns: Tensor) -> Tensor:
    """The inverse of `patterns_of`."""
    table = torch.zeros(len(PATTERNS), FOUR, dtype=torch.bool)
    for number, pattern in enumerate(PATTERNS):
        table[number, list(pattern)] = True
    return table[patterns.long()].reshape(len(patterns), -1)
