"""What a person wants to see of a module or a compile, as rows; the command line draws them."""

import resource
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from gammac.calibration import block_index
from gammac.ir import Module
from gammac.pipeline import Step
from gammac.targets.cost import WeightCost, weight_costs
from gammac.targets.target import Target


@dataclass(frozen=True)
class Row:
    """Some weights together: how many, in which formats, what they take."""

    name: str
    formats: str
    weights: int
    parameters: int
    payload_bits: float
    true_bits: float
    bytes: int
    seconds: float


def by_projection(module: Module, target: Target) -> list[Row]:
    """One row for each kind of weight: its path without the number of the block."""
    groups: dict[str, list[WeightCost]] = defaultdict(list)
    for cost in weight_costs(module, target):
        groups[_without_block(cost.name)].append(cost)
    return [_row(name, costs) for name, costs in groups.items()]


def by_weight(module: Module, target: Target) -> list[Row]:
    """One row for each weight."""
    return [_row(cost.name, [cost]) for cost in weight_costs(module, target)]


def _without_block(name: str) -> str:
    index = block_index(name)
    return name if index is None else name.replace(f".{index}.", ".*.", 1)


def _row(name: str, costs: list[WeightCost]) -> Row:
    counts: dict[str, int] = defaultdict(int)
    for cost in costs:
        counts[cost.format or "f32"] += 1
    formats = " ".join(f if n == len(costs) else f"{f}×{n}" for f, n in sorted(counts.items()))
    numel = sum(c.numel for c in costs)
    return Row(
        name, formats, len(costs), numel, sum(c.payload_bits for c in costs) / numel,
        sum(c.storage_bits for c in costs) / numel, sum(c.bytes for c in costs),
        sum(c.decode_seconds for c in costs),
    )  # fmt: skip


def peak_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def timing_rows(steps: Sequence[Step]) -> list[tuple[str, float, bool]]:
    """Pass, seconds, and whether its result came from the cache."""
    return [(step.pass_.name, step.seconds, step.cached) for step in steps]
