"""Labelled texts of several lengths: a batch holds texts of one length, so that nothing is padded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gammac.passes.training.trainer import Data, shuffled


@dataclass(frozen=True)
class LabelledData:
    """Rows by length, each group with tokens i64 [n, length] and labels i64 [n]."""

    groups: tuple[Data, ...]

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def steps(self, tokens: int, size: int) -> int:
        """Steps of `size` rows at most that so many tokens make, one at least."""
        passes = tokens / sum(group.tokens.numel() for group in self.groups)
        return max(1, round(passes * len(self._cuts(size))))

    def batch(self, step: int, size: int, seed: int) -> Data:
        """The rows of a step, `size` at most: at each pass groups are shuffled and cut, and cuts shuffled."""
        cuts = self._cuts(size)
        turn, place = divmod(step, len(cuts))
        group, start = cuts[int(shuffled(len(cuts), seed, turn)[place])]
        return group.take(shuffled(len(group), seed, turn)[start : start + size])

    def _cuts(self, size: int) -> list[tuple[Data, int]]:
        return [(group, start) for group in self.groups for start in range(0, len(group), size)]

    def parts(self, size: int) -> Iterator[Data]:
        """All rows once."""
        for group in self.groups:
            yield from group.parts(size)


def by_length(texts: Sequence[Tensor], labels: Sequence[int]) -> LabelledData:
    """Tokenized texts i64 [length] with their classes, in groups of one length, short ones first."""
    groups: dict[int, list[int]] = {}
    for index, text in enumerate(texts):
        groups.setdefault(len(text), []).append(index)
    return LabelledData(
        tuple(
            Data(torch.stack([texts[i] for i in found]), torch.tensor([labels[i] for i in found]))
            for _, found in sorted(groups.items())
        )
    )
