"""Do scores learnt at one budget serve another? GAMMA learnt at several targets, and on several texts.

python benchmarks/gamma_reuse.py smollm2-135m --targets 2.25,2.5,3,3.5 --calibration VALID --calibration MIX \
    --text TEST --windows 40

Prints Spearman's and Kendall's rank correlation between the learnt orders (ranks of what a step from each
format to the next wider one gains a parameter, centred within each pair of formats), then perplexity and
KL of each budget's allocation from the scores learnt there, beside those from all others, not refined.
"""

from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import click
import numpy as np
from scipy.stats import kendalltau, spearmanr

from gammac.budget import parse_budgets
from gammac.cli.console import OUT, show_progress
from gammac.driver import Request, context_of, make_plan
from gammac.formats import parse_format
from gammac.ir import Module
from gammac.passes import Choices, default_pipeline
from gammac.passes.allocate import Allocate
from gammac.passes.sensitivity import STRATEGIES
from gammac.pipeline import Pipeline
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
    learnt = {t: (texts[0], t) for t in budgets}
    middle = budgets[len(budgets) // 2]
    learnt |= {f"{middle} on {t.stem}": (t, middle) for t in texts[1:]}
    scored: dict[str, Module] = {}
    base = None
    for name, (calibration, target) in learnt.items():
        choices = Choices("w2g64+w3g64+w4g64", "w8g64", strategy=strategy_at(strategy, target), refine=False)
        plan = make_plan(Request(model, device, budgets[0], choices, texts[0]), cache)
        ctx = context_of(plan, show_progress)
        # candidates of the first text for all: only what the scores are learnt from differs
        passes = default_pipeline(choices, plan.target.emitter, compiler=plan.compiler)
        cut = next(i for i, p in enumerate(passes) if isinstance(p, tuple(STRATEGIES.values())))
        candidates = Pipeline(passes[:cut]).run(plan.module, ctx)
        own = context_of(replace(plan, request=replace(plan.request, calibration=calibration)), show_progress)
        scored[name] = Pipeline(passes[cut : cut + 1]).run(candidates, own)
        base = base or (plan, ctx)
    assert base is not None
    _correlations(scored)
    plan, ctx = base
    tokens = windows_for(text, plan.source.tokenizer, windows)
    rows = [(budget, name) for budget in budgets for name in scored]
    assignments = []
    for budget, name in rows:
        chosen = Allocate().run(scored[name], replace(ctx, budgets=parse_budgets(budget)))
        formats = {n: w.attrs.get("format") for n, w in chosen.weights.items()}
        assignments.append({n: str(f) for n, f in formats.items() if f is not None})
    trials = run_trials(scored[rows[0][1]], ctx.store, tokens, assignments, show_progress)
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
