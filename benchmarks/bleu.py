"""BLEU of one continuation against one reference each (Papineni et al. 2002), on tokens of any kind."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Final

LONGEST: Final = 4  # n-grams


def bleu(found: Sequence[Sequence[Hashable]], wanted: Sequence[Sequence[Hashable]]) -> float:
    """Corpus BLEU-4 between 0 and 1, without smoothing: clipped matches are summed over the corpus before
    they are divided, and a corpus shorter than its reference pays exp(1 − reference / found)."""
    hits, total = [0] * LONGEST, [0] * LONGEST
    for ours, theirs in zip(found, wanted, strict=True):
        for n in range(1, LONGEST + 1):
            here, there = _grams(ours, n), _grams(theirs, n)
            hits[n - 1] += sum((here & there).values())
            total[n - 1] += sum(here.values())
    if not all(hits):
        return 0.0
    mean = sum(math.log(h / t) for h, t in zip(hits, total, strict=True)) / LONGEST
    lengths = sum(map(len, wanted)) / sum(map(len, found))
    return math.exp(mean + min(0.0, 1 - lengths))


def _grams(tokens: Sequence[Hashable], n: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
