"""Is the cost model worth it? Allocations that meet a limit by it, beside those that know only bits.

python benchmarks/hardware_term.py smollm2-135m --calibration VALID --text TEST --target cpu --backend onnx

For each of some budgets in bits, what the bits-only allocation takes on the target (milliseconds of a token,
or megabytes at the peak) becomes the limit. Of bits-only allocations the widest that meets the limit counts.
Both are tried on TEST: KL to full precision in nats a token, perplexity. One scoring run serves all rows.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
from scoring import Scoring

from gammac.cli.console import OUT
from gammac.formats import parse_format
from gammac.ir import Module
from gammac.runtime.evaluate import WINDOW, windows_for
from gammac.sweep import try_all
from gammac.targets.cost import CONTEXT, Cost, module_cost
from gammac.targets.target import BLOCK
from gammac.trials import Assignment

FORMATS: Final = "w2g64+w3g64+w4g64+w5g64+w6g64+w8g64"
NARROWEST, WIDEST = 200, 800  # hundredths of a bit


@dataclass(frozen=True)
class Measure:
    """A kind of limit: what of a cost it counts, in which unit, and how a budget of it is spelled."""

    name: str
    unit: str
    of: Callable[[Cost], float]
    spelled: str


MEASURES: Final = (
    Measure("latency", "ms", lambda cost: 1e3 * cost.decode_seconds, "{:.6f}ms/token"),
    Measure("memory", "MB", lambda cost: 1e-6 * cost.peak_bytes, f"{{:.6f}}MB@{CONTEXT}"),
)


@dataclass(frozen=True)
class Row:
    """An allocation; `value` is what it takes of the limit."""

    measure: Measure
    limit: float
    how: str
    bits: float
    value: float
    assignment: Assignment


@dataclass(frozen=True)
class Allocator:
    """A scored model on a target."""

    scoring: Scoring
    scored: Module

    def __call__(self, budget: str) -> tuple[Cost, Assignment]:
        """What an allocation costs, and the allocation."""
        chosen, assignment = self.scoring.allocate(self.scored, budget)
        return module_cost(chosen, self.scoring.plan.target), assignment

    def widest(self, measure: Measure, limit: float, low: int) -> tuple[Cost, Assignment]:
        """The bits-only allocation of the most bits within a limit, which `low` hundredths of a bit meet."""
        best, high = self(f"{low / 100:.2f}"), WIDEST
        while high - low > 1:
            middle = (low + high) // 2
            tried = self(f"{middle / 100:.2f}")
            if measure.of(tried[0]) <= limit:
                best, low = tried, middle
            else:
                high = middle
        return best

    def rows(self, measure: Measure, bits: float) -> Iterator[Row]:
        """Both allocations at the limit that so many bits make."""
        limit = measure.of(self(f"{bits:g}")[0])
        blind = self.widest(measure, limit, round(100 * bits))
        seeing = self(measure.spelled.format(limit))
        for how, (cost, assignment) in (("bits alone", blind), (f"{measure.name} model", seeing)):
            yield Row(measure, limit, how, cost.payload_bits, measure.of(cost), assignment)


@click.command()
@click.argument("model")
@click.option("--calibration", type=click.Path(path_type=Path), required=True)
@click.option("--text", type=click.Path(path_type=Path), required=True)
@click.option("--target", default="cpu", show_default=True)
@click.option("--backend", default="")
@click.option("--bits", default="2.5,3,3.5,4.5", show_default=True)
@click.option("--formats", default=FORMATS, show_default=True)
@click.option("--strategy", default="fisher", show_default=True)
@click.option("--windows", default=20, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path))
def main(
    model: str, calibration: Path, text: Path, target: str, backend: str, bits: str, formats: str,
    strategy: str, windows: int, cache: Path | None,
) -> None:  # fmt: skip
    """Print a table."""
    scoring = Scoring(model, target, calibration, cache, formats=formats, backend=backend)
    allocator = Allocator(scoring, scoring.score(strategy))
    rows = [r for m in MEASURES for b in map(float, bits.split(",")) for r in allocator.rows(m, b)]
    tokens = windows_for(text, scoring.plan.source.tokenizer, windows, WINDOW)
    trials = try_all(allocator.scored, scoring.ctx, tokens, [row.assignment for row in rows])
    OUT.print(f"{model} on {scoring.plan.target.name}, {scoring.plan.target.emitter}, {windows} windows\n")
    OUT.print("| limit | by | payload bits | predicted | KL | perplexity | weights by bits |")
    OUT.print("|---" * 7 + "|")
    for row, trial in zip(rows, trials, strict=True):
        limit, value = (f"{x:.3f} {row.measure.unit}" for x in (row.limit, row.value))
        found = f"{trial.kl:.4f} | {trial.ppl:.3f} | {_widths(allocator.scored, row.assignment)}"
        OUT.print(f"| {limit} | {row.how} | {row.bits:.3f} | {value} | {found} |", highlight=False)


def _widths(module: Module, assignment: Assignment) -> str:
    """How many of the blocks' weights have how many bits."""
    blocks = [n for n in assignment if module.weights[n].attrs["role"] == BLOCK]
    counts = Counter(parse_format(assignment[n]).bits for n in blocks)
    return ", ".join(f"{bits:g}: {counts[bits]}" for bits in sorted(counts))


if __name__ == "__main__":
    main()
