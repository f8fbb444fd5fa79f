"""Are budgets met exactly? Random budgets of payload and of true bits, allocated from a model's real scores.

python benchmarks/exact_budgets.py smollm2-135m --calibration VALID [--strategy gamma] [--count 20]

For each kind of budget: how many of the allocations are within it, the largest slack, whether it is less
than the smallest upgrade that was left, and whether a second run, a run over the weights in reverse order,
and runs with a price κ n b added to every score (κ of both signs) give the same allocation. Exits with 1 if
one does not.
"""

import sys
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from scoring import Scoring

from gammac.budget import parse_budgets
from gammac.cli.console import OUT
from gammac.formats import parse_format
from gammac.ir import Module
from gammac.passes.allocate import problem
from gammac.passes.allocation_problem import used


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
    # the price of a bit leaves the optimum as it is only where every bit of the budget is used
    priced = [bench.allocate(_priced(scored, kappa), budget)[1] for kappa in (-1e-10, 1e-10)]
    return (
        slack >= 0,
        slack,
        min(upgrades, default=float("inf")),
        *(found == formats for found in again),
        slack != 0 or all(found == formats for found in priced),
    )


def _priced(module: Module, kappa: float) -> Module:
    """κ n b added to each score of the linears of the blocks, with their parameters n and bits b."""
    weights = []
    for weight in module.weights.values():
        scores = weight.attrs.get("scores")
        if weight.attrs.get("role") == "block" and isinstance(scores, dict):
            n = weight.type.numel()
            new = {f: float(str(s)) + kappa * n * parse_format(f).bits for f, s in scores.items()}
            weights.append(weight.with_attrs(scores=new))
    return module.with_weights(*weights)


if __name__ == "__main__":
    main()
