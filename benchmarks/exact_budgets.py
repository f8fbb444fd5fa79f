"""Are budgets met exactly? Random budgets of payload and of true bits, allocated from a model's real scores.

python benchmarks/exact_budgets.py smollm2-135m --calibration VALID [--strategy gamma] [--count 20]

For each kind of budget: how many of the allocations are within it, the largest slack, whether it is less
than the smallest upgrade that was left, whether a second run and a run over the weights in reverse order
give the same allocation, and whether it stays the best at what it takes when every bit is rewarded by a
constant (the budget binds then, so that this adds the same to all that use it up). Exits with 1 if not.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from scoring import Scoring

from gammac.budget import parse_budgets
from gammac.cli.console import OUT
from gammac.ir import Module
from gammac.passes.allocate import problem
from gammac.passes.allocation_problem import Group, used
from gammac.passes.allocation_search import choose

# nats a bit: steps between formats are worth about 1e-9
REWARDS = (-3e-10, -3e-9, -3e-8)


@click.command()
@click.argument("model")
@click.option("--calibration", type=click.Path(path_type=Path), required=True)
@click.option("--strategy", default="gamma", show_default=True)
@click.option("--count", default=20, show_default=True)
@click.option("--target", "device", default="cpu", show_default=True)
@click.option("--cache", type=click.Path(path_type=Path))
def main(model: str, calibration: Path, strategy: str, count: int, device: str, cache: Path | None) -> None:
    """Print a row for each kind of budget."""
    bench = Scoring(model, device, calibration, cache)
    scored = bench.score(strategy)
    generator = np.random.default_rng(0)
    OUT.print("| budget | within | largest slack | less than any upgrade | repeated | reversed | priced |")
    OUT.print("|---|---|---|---|---|---|---|")
    good = True
    for unit in ("", "bpw"):
        budgets = [f"{x:.4f}{unit}" for x in generator.uniform(2.05, 3.95, count)]
        budgets = [b if not unit else f"{float(b.removesuffix(unit)) + 0.3:.4f}{unit}" for b in budgets]
        rows = [_checked(bench, scored, budget) for budget in budgets]
        within, slack, upgrade, *same = (list(column) for column in zip(*rows, strict=True))
        spare = all(s < u for s, u in zip(slack, upgrade, strict=True))
        counts = " | ".join(f"{sum(column)} of {count}" for column in same)
        OUT.print(
            f"| {count} × {unit or 'payload'} | {sum(within)} of {count} | {max(slack):,.0f} bits "
            f"| {'always' if spare else 'NO'} | {counts} |"
        )
        good = good and spare and all(map(all, (within, *same)))
    sys.exit(not good)


def _checked(bench: Scoring, scored: Module, budget: str) -> tuple[bool, float, float, bool, bool, bool]:
    _, formats = bench.allocate(scored, budget)
    ctx = replace(bench.ctx, budgets=parse_budgets(budget))
    limits, rows = problem(scored, ctx, "", None, 0)
    groups = [group for _, group in rows]
    picks = tuple(
        next(i for i, choice in enumerate(group) if choice.name == formats[names[0]]) for names, group in rows
    )
    (spent,) = used(groups, picks, 1)
    slack = limits[0].capacity - spent
    now = [group[pick] for group, pick in zip(groups, picks, strict=True)]
    upgrades = [
        choice.costs[0] - at.costs[0]
        for group, at in zip(groups, now, strict=True)
        for choice in group
        if choice.score < at.score
    ]
    backwards = replace(scored, weights=dict(reversed(scored.weights.items())))
    again = (bench.allocate(m, budget)[1] for m in (scored, backwards))
    priced = (choose(_priced(groups, kappa), (spent,)) for kappa in REWARDS)
    return (
        slack >= 0,
        slack,
        min(upgrades, default=float("inf")),
        *(found == formats for found in again),
        all(found == picks for found in priced),
    )


def _priced(groups: Sequence[Group], kappa: float) -> list[Group]:
    """κ added to each score for each bit."""
    return [tuple(replace(c, score=c.score + kappa * c.costs[0]) for c in group) for group in groups]


if __name__ == "__main__":
    main()
