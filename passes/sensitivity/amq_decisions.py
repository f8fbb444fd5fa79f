"""What `amq` decides: weights that get one format, and their costs as its search reads them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gammac.budget import PAYLOAD, TRUE
from gammac.formats import Format, candidates_of, parse_format
from gammac.ir import Module, Weight
from gammac.passes.sensitivity.amq_search import Flags, Ints, Space
from gammac.targets.target import BLOCK
from gammac.trials import Assignment


@dataclass(frozen=True)
class Decision:
    """Weights that get one format, and the formats to search among, the narrowest first."""

    weights: tuple[Weight, ...]
    formats: tuple[Format, ...]

    @property
    def numel(self) -> int:
        """Parameters of all its weights."""
        return sum(weight.type.numel() for weight in self.weights)

    def amount(self, format_: Format, kind: str) -> int:
        """PAYLOAD or TRUE bits of all its weights in a format."""
        count = {PAYLOAD: format_.payload_bits, TRUE: format_.storage_bits}[kind]
        return sum(count(*_shape(weight)) for weight in self.weights)

    def noise(self, format_: Format) -> float:
        """How the error of a format scales: 4^−(true bits a weight)."""
        return float(4.0 ** -(self.amount(format_, TRUE) / self.numel))


def decisions_of(module: Module, tie: bool, widest: int) -> list[Decision]:
    """One for each block linear; with `tie`, one for those that are tied and have formats in common.

    Formats of more than `widest` bits are left out; the narrowest is searched in any case.
    """
    from gammac.passes.allocate import tie_groups  # that file imports this package

    found: list[Decision] = []
    for names in tie_groups(module):
        weights = tuple(module.weights[name] for name in names if is_searched(module.weights[name]))
        together = [weights] if tie and _common_formats(weights) else [(weight,) for weight in weights]
        for group in together:
            formats = _common_formats(group)
            narrow = tuple(f for f in formats if f.bits <= widest)
            found.append(Decision(group, narrow or formats[:1]))
    return found


def is_searched(weight: Weight) -> bool:
    """Whether a weight is a block linear with candidates; embedding and head are not searched."""
    return "candidates" in weight.attrs and weight.attrs.get("role") == BLOCK


def _common_formats(weights: Sequence[Weight]) -> tuple[Format, ...]:
    """Those that every one of the weights has, by the bits that they store."""
    names = [candidates_of(weight).keys() for weight in weights]
    common = [parse_format(name) for name in names[0] if all(name in n for n in names)] if names else []
    return tuple(sorted(common, key=lambda f: f.storage_bits(*_shape(weights[0]))))


def space_of(decisions: Sequence[Decision], pinned: Flags) -> Space:
    """The space of designs; a pinned decision has its widest format only."""
    most = max((len(d.formats) for d in decisions), default=0)
    padded = [d.formats + d.formats[-1:] * (most - len(d.formats)) for d in decisions]
    bits = [[d.amount(f, PAYLOAD) for f in row] for d, row in zip(decisions, padded, strict=True)]
    noise = [[d.noise(f) / d.noise(row[0]) for f in row] for d, row in zip(decisions, padded, strict=True)]
    high = np.array([len(d.formats) - 1 for d in decisions], dtype=np.int64)
    return Space(np.array(bits, dtype=np.float64), np.array(noise), np.where(pinned, high, 0), high)


def scan_of(decisions: Sequence[Decision]) -> Ints:
    """All in their widest formats, and then each in turn in its narrowest, i64 [1 + decisions, decisions]."""
    widest = np.array([len(d.formats) - 1 for d in decisions], dtype=np.int64)
    scan = np.tile(widest, (1 + len(decisions), 1))
    scan[np.arange(len(decisions)) + 1, np.arange(len(decisions))] = 0
    return scan


def formats_in(decisions: Sequence[Decision], design: Ints) -> list[Format]:
    """The format of each decision."""
    return [d.formats[index] for d, index in zip(decisions, design, strict=True)]


def assignment_of(decisions: Sequence[Decision], design: Ints) -> Assignment:
    """The format of each weight."""
    pairs = zip(decisions, formats_in(decisions, design), strict=True)
    return {weight.name: format_.name for d, format_ in pairs for weight in d.weights}


def _shape(weight: Weight) -> tuple[int, int]:
    rows, columns = weight.type.shape
    assert isinstance(rows, int) and isinstance(columns, int)
    return rows, columns
