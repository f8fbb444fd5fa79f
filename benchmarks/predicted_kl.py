"""How well do scores predict? What they say of the allocations of sweeps, beside the KL that was measured.

python benchmarks/predicted_kl.py smollm2-135m out/*/sweep.json --calibration VALID \
    [--strategies "fisher,greedy_kl,gamma{curvature=0}"]

The sweeps must be of these formats: w2g64, w3g64, w4g64. For each strategy: the KL over the sum of the
scores of an allocation's formats, its mean and how far it spreads (standard deviation of the logarithm),
and Spearman's correlation with the KL among the allocations of one budget, the mean over budgets. Then
for each pair of strategies how far their scores of one weight in one format are apart: the middle two
thirds of the logarithms of their ratio lie within ± so much. gamma stands there twice: with what it
learnt block by block (alone), and with what other modules add to that.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import spearmanr
from scoring import BLOCK_FORMATS, Scoring

from gammac.cli.console import OUT
from gammac.cli.sweep import parts
from gammac.ir import Module

# weight name → format name → score; of the linears of the blocks
Scores = Mapping[str, Mapping[str, float]]
LEAST = 1e-9  # nats: what falls with the bits may be nothing at the end


@click.command()
@click.argument("model")
@click.argument("sweeps", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--calibration", type=click.Path(path_type=Path), required=True)
@click.option("--strategies", default="fisher,greedy_kl,gamma", show_default=True)
@click.option("--target", "device", default="cpu", show_default=True)
@click.option("--cache", type=click.Path(path_type=Path))
def main(
    model: str, sweeps: Sequence[Path], calibration: Path, strategies: str, device: str, cache: Path | None
) -> None:
    """Score by each strategy, which the cache may know, and compare."""
    found = [json.loads(path.read_text()) for path in sweeps]
    rows = [row for sweep in found for row in sweep["rows"]]
    offered = {f for sweep in found for f in sweep["options"]["block"].split("+")}
    if foreign := offered - {*BLOCK_FORMATS.split("+")}:
        raise click.UsageError(
            f"sweeps of {', '.join(sorted(foreign))}: only {BLOCK_FORMATS} are scored here"
        )
    bench = Scoring(model, device, calibration, cache)
    scores: dict[str, Scores] = {}
    for strategy in parts(strategies):
        scored = bench.score(strategy)
        alone = _scores(scored, "losses_alone")
        if alone:
            scores[f"{strategy}, alone"] = alone
        scores[strategy] = _scores(scored, "scores")
    OUT.print(f"{len(rows)} allocations\n\n| scores | KL ÷ sum | spread | rank within a budget |")
    OUT.print("|---|---|---|---|")
    for name, found in scores.items():
        ratio, spread, rank = prediction(rows, found)
        OUT.print(f"| {name} | {ratio:.3g} | {spread:.3f} | {rank:.2f} |")
    OUT.print("\n| scores | and | apart by |\n|---|---|---|")
    for a, b in combinations(scores, 2):
        OUT.print(f"| {a} | {b} | {apart(scores[a], scores[b]):.2f} |")


def _scores(module: Module, attribute: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, weight in module.weights.items():
        own = weight.attrs.get(attribute)
        if weight.attrs.get("role") == "block" and isinstance(own, Mapping):
            found[name] = {str(f): float(str(x)) for f, x in own.items()}
    return found


def prediction(rows: Sequence[Mapping[str, Any]], scores: Scores) -> tuple[float, float, float]:
    """KL ÷ sum of scores, geometric mean; standard deviation of its logarithm; rank correlation."""
    by_budget: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        total = sum(own[row["assignment"][name]] for name, own in scores.items())
        by_budget[row["budget"]].append((row["kl"], total))
    ratios = np.log([kl / total for pairs in by_budget.values() for kl, total in pairs])
    ranks = [spearmanr(pairs).statistic for pairs in by_budget.values() if len(pairs) > 1]
    return float(np.exp(ratios.mean())), float(ratios.std()), float(np.mean(ranks)) if ranks else float("nan")


def apart(a: Scores, b: Scores) -> float:
    """Half of what the middle 68 % of ln(a ÷ b) span, over weights and formats."""
    ratios = [np.log(max(a[n][f], LEAST) / max(b[n][f], LEAST)) for n, own in a.items() for f in own]
    low, high = np.quantile(ratios, (0.16, 0.84))
    return float(high - low) / 2


if __name__ == "__main__":
    main()
