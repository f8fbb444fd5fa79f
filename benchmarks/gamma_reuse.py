"""Do scores learnt at one budget serve another? GAMMA learnt at several targets, and on several texts.

python benchmarks/gamma_reuse.py smollm2-135m --targets 2.25,2.5,3,3.5 --calibration VALID --calibration MIX \
    --text TEST --windows 40

Prints Spearman's and Kendall's rank correlation between the learnt orders (ranks of what a step from each
format to the next wider one gains a parameter, centred within each pair of formats), then perplexity and
KL of each budget's allocation from the scores learnt there, beside those from all others, not refined.
"""

from itertools import combinations, pairwise
from pathlib import Path

import click
import numpy as np
from scipy.stats import kendalltau, spearmanr
from scoring import Scoring

from gammac.cli.console import OUT, show_progress
from gammac.formats import parse_format
from gammac.ir import Module
from gammac.runtime.evaluate import windows_for
from gammac.trials import run_trials


@click.command()
@click.argument("model")
@click.option("--targets", default="2.25,2.5,3,3.5", show_default=True)
@click.option("--calibration", "texts", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--text", type=click.Path(path_type=Path), required=True)
@click.option("--windows", default=40, show_default=True)
@click.option("--target", "device", default="cpu", show_default=True)
@click.option(
    "--strategy", default="gamma", show_default=True, help="Options go into braces; target is added."
)
@click.option("--cache", type=click.Path(path_type=Path))
def main(
    model: str, targets: str, texts: tuple[Path, ...], text: Path, windows: int, device: str, strategy: str,
    cache: Path | None,
) -> None:  # fmt: skip
    """Learn at each target on the first text, and at the middle target on the others."""
    budgets = targets.split(",")
    learnt: dict[str, tuple[Path | None, str]] = {t: (None, t) for t in budgets}
    middle = budgets[len(budgets) // 2]
    learnt |= {f"{middle} on {t.stem}": (t, middle) for t in texts[1:]}
    # candidates of the first text for all: only what the scores are learnt from differs
    bench = Scoring(model, device, texts[0], cache)
    scored = {
        name: bench.score(strategy_at(strategy, target), calibration=calibration)
        for name, (calibration, target) in learnt.items()
    }
    _correlations(scored)
    tokens = windows_for(text, bench.plan.source.tokenizer, windows)
    rows = [(budget, name) for budget in budgets for name in scored]
    assignments = [bench.allocate(scored[name], budget)[1] for budget, name in rows]
    trials = run_trials(bench.candidates, bench.ctx.store, tokens, assignments, show_progress)
    OUT.print(f"\nperplexity (KL) on {windows} windows; rows: budget, columns: scores learnt at\n")
    OUT.print("| budget | " + " | ".join(scored) + " |")
    for budget in budgets:
        cells = [f"{t.ppl:.2f} ({t.kl:.4f})" for (b, _), t in zip(rows, trials, strict=True) if b == budget]
        OUT.print(f"| {budget} | " + " | ".join(cells) + " |")


def strategy_at(strategy: str, target: str) -> str:
    """The strategy's text with `target` among its options."""
    name, _, options = strategy.removesuffix("}").partition("{")
    return f"{name}{{{','.join(filter(None, (options, f'target={target}')))}}}"


def steps(module: Module) -> np.ndarray:
    """Ranks of what a step to the next wider format gains a parameter, centred for each pair of formats."""
    gains: dict[tuple[str, str], list[float]] = {}
    for weight in module.weights.values():
        scores = weight.attrs.get("scores")
        if weight.attrs.get("role") != "block" or not isinstance(scores, dict):
            continue
        names = sorted(scores, key=parse_format)
        for low, high in pairwise(names):
            gain = (float(scores[low]) - float(scores[high])) / weight.type.numel()
            gains.setdefault((low, high), []).append(gain)
    return np.concatenate([np.argsort(np.argsort(g)) - (len(g) - 1) / 2 for g in gains.values()])


def _correlations(scored: dict[str, Module]) -> None:
    OUT.print("| learnt at | and at | Spearman | Kendall |")
    for a, b in combinations(scored, 2):
        x, y = steps(scored[a]), steps(scored[b])
        OUT.print(f"| {a} | {b} | {spearmanr(x, y).statistic:.3f} | {kendalltau(x, y).statistic:.3f} |")


if __name__ == "__main__":
    main()
