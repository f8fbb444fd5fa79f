"""Does the cost model predict? Random allocations of a model, compiled and timed.

python benchmarks/predicted_latency.py smollm2-135m --target mine.toml --backend tvm --count 20 --threads 2

Prints predicted and measured decode time behind 512 tokens, prefill of 512 tokens and peak memory of each
allocation; then for each of the three the mean error, what a constant factor or a constant sum would leave of
it, and the rank correlation. `--target` should be calibrated on the
machine that runs this, with as many threads: gammac targets calibrate -o mine.toml --threads 2 --model MODEL.
Leave the machine alone; each artifact is timed in turn with the others, and the median of the rounds counts,
since a virtual machine has neighbours.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from gammac.budget import parse_budgets
from gammac.cli.console import OUT
from gammac.driver import Compiled, Request, compile_model, make_plan
from gammac.model_costs import time_model
from gammac.passes import Choices

FORMATS = "w2g64+w3g64+w4g64+w5g64+w6g64+w8g64"
LEAST, MOST = 2.6, 7.5  # bits; RTN leaves nothing of a model below


@click.command()
@click.argument("model")
@click.option("--target", default="cpu", show_default=True)
@click.option("--backend", type=click.Choice(["onnx", "tvm"]), default="tvm", show_default=True)
@click.option("--count", default=20, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path))
def main(
    model: str, target: str, backend: str, count: int, threads: int, rounds: int, cache: Path | None
) -> None:
    """Print a row for each allocation, and a line for each of the three."""
    generator = np.random.default_rng(0)
    budgets = [f"{generator.uniform(LEAST, MOST):.2f}" for _ in range(count)]
    choices = Choices(FORMATS, quantizer="rtn", strategy="random", refine=False)
    request = Request(
        model, target, "3", choices, calibration_windows=4, calibration_length=64, backend=backend
    )
    plan = make_plan(request, cache)
    plan = replace(plan, target=replace(plan.target, threads=threads))
    with tempfile.TemporaryDirectory() as name:
        made = []
        for seed, budget in enumerate(budgets):
            drawn = replace(request, budget=budget, seed=seed)
            own = replace(plan, request=drawn, budgets=parse_budgets(budget))
            made.append(compile_model(own, Path(name) / str(seed)))
        OUT.print("| bits | decode ms | predicted | prefill ms | predicted | memory MB | predicted |")
        OUT.print("|---|---|---|---|---|---|---|")
        timed = np.array([[_times(compiled, threads) for compiled in made] for _ in range(rounds)])
        rows = [_row(*one) for one in zip(made, np.median(timed, 0), strict=True)]
    for title, pairs_of in zip(("decode", "prefill", "memory"), zip(*rows, strict=True), strict=True):
        OUT.print(f"{title}: {_summary(np.array(pairs_of))}", highlight=False)


def _times(compiled: Compiled, threads: int) -> tuple[float, float, float]:
    """Milliseconds of a token and of a prefill, megabytes."""
    timed = time_model(compiled.folder, threads)
    return 1e3 * timed.decode, 1e3 * timed.prefill, 1e-6 * timed.added_bytes


def _row(compiled: Compiled, measured: np.ndarray) -> list[tuple[float, float]]:
    """The same, measured and predicted."""
    cost = compiled.cost
    predicted = (1e3 * cost.decode_seconds, 1e3 * cost.prefill_seconds, 1e-6 * cost.peak_bytes)
    found = list(zip(measured.tolist(), predicted, strict=True))
    pairs = " | ".join(f"{a:.3f} | {b:.3f}" for a, b in found)
    OUT.print(f"| {cost.payload_bits:.2f} | {pairs} |", highlight=False)
    return found


def _summary(pairs: np.ndarray) -> str:
    measured, predicted = pairs.T
    ratio, apart = float(np.median(predicted / measured)), float(np.median(measured - predicted))
    tried = (predicted, predicted / ratio, predicted + apart)
    plain, scaled, moved = (float(np.abs(p / measured - 1).mean()) for p in tried)
    ranks = [np.argsort(np.argsort(values)) for values in (measured, predicted)]
    correlation = float(np.corrcoef(*ranks)[0, 1]) if len(measured) > 1 else 1.0
    return (
        f"mean error {plain:.1%}, {scaled:.1%} but for the median ratio {ratio:.3f}, "
        f"{moved:.1%} but for the median difference {apart:.3f}; rank correlation {correlation:.3f}"
    )


if __name__ == "__main__":
    main()
