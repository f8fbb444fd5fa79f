"""`gammac sweep`."""

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gammac.cli.console import ERR, OUT, show_progress
from gammac.cli.options import request_of, shared_options
from gammac.diagnostics import CompileError

if TYPE_CHECKING:
    from gammac.sweep import Sweep


@click.command("sweep")
@click.argument("model")
@click.option(
    "--budgets",
    default="2.25,2.5,2.75,3,3.25,3.5",
    show_default=True,
    help="A row for each; + joins those that hold together: 3,2.5bpw+80MB.",
)
@click.option(
    "--pareto",
    help="quality,latency (or memory, energy, prefill, size): budgets from the least that is possible to the "
    "most that the formats take, in place of --budgets.",
)
@click.option("--points", type=click.IntRange(2), default=6, show_default=True, help="Of --pareto.")
@click.option(
    "--strategies",
    default="gamma,fisher,weight_mse",
    show_default=True,
    help="A curve for each; spelled as --strategy.",
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of tables and plots."
)
@click.option(
    "--text", type=click.Path(path_type=Path), help="Tried on this (default: the calibration text)."
)
@click.option(
    "--windows", type=click.IntRange(1), default=40, show_default=True, help="Of 1024 tokens; the first N."
)
@click.option("--seeds", "--seed", default="0", show_default=True, help="For strategies that read the seed.")
@shared_options
def sweep_command(**options: Any) -> None:
    """Allocate MODEL by every strategy at every budget, and measure each allocation.

    No artifact is written. What is found stays in the cache: a killed sweep goes on where it stopped.
    """
    from gammac import sweep_report, tables
    from gammac.sweep import SweepRequest, run_sweep

    sweep_report.check_folder(options["out"])
    budgets, strategies = parts(options["budgets"]), parts(options["strategies"])
    seeds = tuple(_seed(part) for part in parts(options["seeds"]))
    if options["pareto"]:
        budgets = _front(options, strategies[0], seeds[0])
    request = request_of(options, budgets[0], seeds[0], strategy=strategies[0])
    wish = SweepRequest(request, strategies, budgets, seeds, options["text"], options["windows"])
    found = run_sweep(wish, options["cache"], show_progress)
    paths = [*sweep_report.write(found, options["out"]), *_drawn(found, options["out"])]
    for grid in sweep_report.grids(found):
        OUT.print(tables.grid(grid))
    OUT.print(sweep_report.headline(found), highlight=False, markup=False, soft_wrap=True)
    OUT.print(f"{len(paths)} files in {options['out']}: {', '.join(p.name for p in paths)}", highlight=False)


def _front(options: dict[str, Any], strategy: str, seed: int) -> tuple[str, ...]:
    from gammac.driver import make_plan
    from gammac.pareto import front, parse_front

    kind = parse_front(options["pareto"])
    request = request_of(options, "8", seed, strategy=strategy)
    return front(make_plan(request, options["cache"], artifact=False), kind, options["points"])


def parts(text: str) -> tuple[str, ...]:
    """Parts between commas, each once; a comma in braces parts a strategy's options. Raises CompileError."""
    parts = tuple(dict.fromkeys(p.strip() for p in re.split(r",(?![^{]*})", text) if p.strip()))
    if not parts:
        raise CompileError(f"{text!r} is an empty list")
    return parts


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise CompileError(f"{text!r} is no seed", hint="write --seeds 0,1,2")
    return int(text)


def _drawn(found: "Sweep", folder: Path) -> list[Path]:
    """The plots, if there is matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        ERR.print("note: no plots without matplotlib: pip install 'gammac\\[plots]'", highlight=False)
        return []
    from gammac import plots

    return plots.draw(found, folder)
