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
from gammac.formats.base import CHANNEL, SCALE_BITS, Format, Parts, Quantized, group_name, spread
from gammac.formats.integer import IntegerFormat

TWO_FOUR: Final = "two_four"
FOUR: Final = 4
KEPT: Final = 2
FLOAT_WIDTH: Final = 16
# the positions of the kept weights of each pattern, ascending
PATTERNS: Final = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
PATTERN_BITS: Final = 3
POSITION_BITS: Final = 2


@dataclass(frozen=True)
class TwoFourFormat(Format):
    """Kept values of `width` bits on a symmetric grid with an f16 scale for each `group` original inputs of a
    row (0: the whole row), or, at 16 bits, f16 numbers without a scale.

    `hardware`: positions are counted as the hardware stores them, a bit a weight; else as patterns, 0.75.
    The headline counts what codes take, values and patterns alike: 2.75 bits for s24w4g64.

    Parts: codes u8 [rows, columns / 2], kept values in order of inputs (f16 numbers at 16 bits); patterns u8
    [rows, columns / 4], indices of PATTERNS; scales f16 [rows, groups], except at 16 bits.
    """

    kind: ClassVar[str] = TWO_FOUR
    width: int
    group: int
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
    def is_float(self) -> bool:
        """Whether kept values are f16 numbers."""
        return self.width == FLOAT_WIDTH

    @property
    def density(self) -> float:
        """See Format."""
        return KEPT / FOUR

    @property
    def together(self) -> int:
        """How many columns no order may tear apart."""
        return FOUR

    @property
    def grid(self) -> IntegerFormat:
        """The format of kept values: symmetric, so that zero is one of its numbers."""
        assert not self.is_float, f"{self.name} has no grid"
        return IntegerFormat(self.width, self.group, True)

    @property
    def name(self) -> str:
        """For example s24w4g64, s24w4g64-hw, s24f16."""
        values = "f16" if self.is_float else f"w{self.width}{group_name(self.group)}"
        return f"s24{values}{'-hw' if self.hardware else ''}"

    def holds(self, in_features: int) -> bool:
        """Rows are whole groups of four."""
        return in_features % FOUR == 0

    def fit(self, in_features: int) -> "TwoFourFormat":
        """See Format; f16 numbers have no group."""
        return self if self.is_float else super().fit(in_features)

    def with_group(self, group: int) -> "TwoFourFormat":
        """See Format; f16 numbers have no group."""
        return TwoFourFormat(self.width, CHANNEL if self.is_float else group, self.hardware)

    def storage_bits(self, rows: int, columns: int) -> int:
        """Kept values, positions, f16 scales."""
        scales = 0 if self.is_float else SCALE_BITS * rows * self.groups(columns)
        return rows * columns // FOUR * (KEPT * self.width + self.index_bits) + scales

    def dequantize(self, parts: Parts) -> Tensor:
        """Kept values at their places, zero elsewhere, f32 [rows, columns]."""
        mask = mask_of(parts["patterns"])
        if self.is_float:
            values = parts["codes"].float()
        else:
            scales = spread(parts["scales"].float(), self.inputs_per_scale(mask.shape[1]), mask.shape[1])
            values = (parts["codes"].float() - self.grid.midpoint) * scales[mask].reshape_as(parts["codes"])
        return torch.zeros(mask.shape).masked_scatter_(mask, values)

    def check(self, parts: Parts) -> None:
        """Raises CompileError for parts that are no 2:4 weight: an unknown pattern, or other sizes."""
        patterns, codes = parts["patterns"], parts["codes"]
        if codes.shape[1] != KEPT * patterns.shape[1] or int(patterns.max()) >= len(PATTERNS):
            raise CompileError(
                f"these are no {self.name} codes: of each four inputs two are kept, in one of six patterns",
                hint="the cache or the artifact is damaged; compile again",
            )

    def quantized(self, codes: Tensor, mask: Tensor, scales: Tensor | None = None) -> Quantized:
        """A weight from codes [rows, columns] and the mask [rows, columns] of those that are kept."""
        rows, columns = mask.shape
        kept = codes[mask].reshape(rows, columns // FOUR * KEPT)
        parts = {
            "codes": kept.half() if self.is_float else kept.to(torch.uint8),
            "patterns": patterns_of(mask),
        }
        return Quantized(self, parts if scales is None else {**parts, "scales": scales.half()})


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
