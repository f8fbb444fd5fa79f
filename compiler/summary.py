"""What a person wants to see of a module or a compile, as rows; the command line draws them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gammac.calibration import block_index
from gammac.ir import Module
from gammac.pipeline import Step
from gammac.runtime.bench import BenchResult, Timed, ratio
from gammac.targets.cost import WeightCost, weight_costs
from gammac.targets.target import Target

FLOATS: Final = "norms, biases, positions"


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
    """One row for each kind of weight: its path without the number of the block; one for all floats."""
    groups: dict[str, list[WeightCost]] = defaultdict(list)
    for cost in weight_costs(module, target):
        name = without_block(cost.name) if cost.role or cost.format else FLOATS
        groups[name].append(cost)
    return [_row(name, costs) for name, costs in groups.items()]


def by_weight(module: Module, target: Target) -> list[Row]:
    """One row for each weight."""
    return [_row(cost.name, [cost]) for cost in weight_costs(module, target)]


def without_block(name: str) -> str:
    """`model.layers.*.mlp.up_proj` for `model.layers.3.mlp.up_proj.weight`."""
    index = block_index(name)
    name = name.removesuffix(".weight")
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


def timing_rows(steps: Sequence[Step]) -> list[tuple[str, float, bool]]:
    """Pass, seconds, and whether its result came from the cache."""
    return [(step.pass_.name, step.seconds, step.cached) for step in steps]


def bench_figures(found: BenchResult) -> dict[str, float | int]:
    """One artifact's speed, memory and size; rates are medians over the rounds."""
    return {
        "threads": found.threads,
        "decode tokens/s": found.decode.median,
        "prefill tokens/s": found.prefill.median,
        "seconds to the first token": found.load.first_token_seconds,
        "peak resident MB": found.load.peak_rss_bytes / 1e6,
        "size MB": found.size_bytes / 1e6,
        "read bandwidth GB/s": found.read_bytes_per_second.median / 1e9,
        "MB read per token": found.bytes_per_token / 1e6,
        "share of the bandwidth limit": found.share_of_limit,
    }


def side_by_side(found: Sequence[Timed]) -> dict[str, dict[str, float]]:
    """The first beside the others: rates, and ratios of its figures over theirs."""
    ours, rows = found[0], {}
    for timed in found:
        rows[timed.contestant.label] = {
            "decode tokens/s": timed.decode.median,
            "decode ratio": ratio(ours.decode, timed.decode),
            "prefill tokens/s": timed.prefill.median,
            "prefill ratio": ratio(ours.prefill, timed.prefill),
            "seconds to the first token": timed.load.first_token_seconds,
            "first token ratio": ours.load.first_token_seconds / timed.load.first_token_seconds,
            "peak resident MB": timed.load.peak_rss_bytes / 1e6,
            "memory ratio": ours.load.peak_rss_bytes / timed.load.peak_rss_bytes,
            "size MB": timed.size_bytes / 1e6,
            "size ratio": ours.size_bytes / timed.size_bytes,
            "GB/s": timed.bytes_per_second / 1e9,
        }
    return rows
