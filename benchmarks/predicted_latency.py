"""Does the cost model predict? Random allocations of a model, compiled and timed.

python benchmarks/predicted_latency.py smollm2-135m --target mine.toml --backend tvm --count 20 --threads 2

Prints predicted and measured decode time behind 512 tokens, prefill of 512 tokens and peak memory of each
allocation; then for each of the three the mean error, what a constant factor or a constant sum would leave of
it (a runtime's own memory is such a sum), and the rank correlation. `--target` should be calibrated on the
machine that runs this, with as many threads: gammac targets calibrate -o mine.toml. Leave the machine alone.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import click
import numpy as np

from gammac.cli.console import OUT
from gammac.driver import Compiled, Request, compile_model, make_plan
from gammac.passes import Choices
from gammac.runtime.runners import SessionRunner
from gammac.runtime.session import open_session
from gammac.targets.cost import CONTEXT

FORMATS = "w2g64+w3g64+w4g64+w5g64+w6g64+w8g64"
NEW = 64
ROUNDS = 5
# in a process of its own: what opening and a prefill add to what was resident before
MEMORY = """
import json, sys
from pathlib import Path
from gammac.runtime.probe import peak_rss_bytes
from gammac.runtime.runners import SessionRunner
from gammac.runtime.session import open_session
before = peak_rss_bytes()
runner = SessionRunner(open_session(Path(sys.argv[1]), int(sys.argv[2]), verify=False))
runner.prefill_seconds(int(sys.argv[3]))
print(json.dumps(peak_rss_bytes() - before))
"""


@click.command()
@click.argument("model")
@click.option("--target", default="cpu", show_default=True)
@click.option("--backend", type=click.Choice(["onnx", "tvm"]), default="tvm", show_default=True)
@click.option("--count", default=20, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path))
def main(model: str, target: str, backend: str, count: int, threads: int, cache: Path | None) -> None:
    """Print a row for each allocation, and a line for each of the three."""
    generator = np.random.default_rng(0)
    rows = []
    OUT.print("| bits | decode ms | predicted | prefill ms | predicted | memory MB | predicted |")
    OUT.print("|---|---|---|---|---|---|---|")
    for seed in range(count):
        budget = f"{generator.uniform(2.2, 7.5):.2f}"
        choices = Choices(FORMATS, quantizer="rtn", strategy="random", refine=False)
        request = Request(
            model, target, budget, choices, calibration_windows=4, calibration_length=64, seed=seed,
            backend=backend,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as name:
            plan = make_plan(request, cache)
            plan = replace(plan, target=replace(plan.target, threads=threads))
            compiled = compile_model(plan, Path(name) / "artifact")
            rows.append(_row(compiled, threads))
        pairs = " | ".join(f"{found:.3f} | {predicted:.3f}" for found, predicted in rows[-1])
        OUT.print(f"| {compiled.cost.payload_bits:.2f} | {pairs} |", highlight=False)
    for title, pairs_of in zip(("decode", "prefill", "memory"), zip(*rows, strict=True), strict=True):
        OUT.print(f"{title}: {_summary(np.array(pairs_of))}", highlight=False)


def _row(compiled: Compiled, threads: int) -> list[tuple[float, float]]:
    """Measured and predicted: milliseconds of a token and of a prefill, megabytes."""
    runner = SessionRunner(open_session(compiled.folder, threads))
    decode = median(runner.decode_seconds(CONTEXT, NEW) / NEW for _ in range(ROUNDS))
    prefill = median(runner.prefill_seconds(CONTEXT) for _ in range(ROUNDS))
    command = [sys.executable, "-c", MEMORY, str(compiled.folder), str(threads), str(CONTEXT)]
    memory = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    cost = compiled.cost
    return [
        (1e3 * decode, 1e3 * cost.decode_seconds),
        (1e3 * prefill, 1e3 * cost.prefill_seconds),
        (1e-6 * memory, 1e-6 * cost.peak_bytes),
    ]


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
