"""`gammac study`."""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from gammac.cli.console import ERR, OUT, show_progress
from gammac.cli.options import request_of, shared_options
from gammac.diagnostics import CompileError

if TYPE_CHECKING:
    from gammac.study.run import Prepared, Study

# what every row says itself, and what stands in its place
DECIDED: Final = {
    "formats": None, "group_size": "64", "symmetric": False, "quantizer": "gptq", "tie": None, "refine": None,
    "sparsity": None, "mask": None,
}  # fmt: skip
LIST: Final = "Comma-separated; all if not given."


@click.command("study")
@click.argument("model")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the table and the plot."
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A column of perplexity; repeatable.",
)
@click.option(
    "--windows", type=click.IntRange(1), default=100, show_default=True, help="Of 1024 tokens; the first N."
)
@click.option(
    "--tasks", type=click.Path(path_type=Path), help="Zero-shot tasks: a folder of .jsonl files, or one."
)
@click.option("--task-items", type=click.IntRange(1), help="Only the first examples of each task.")
@click.option(
    "--rows", type=click.Path(path_type=Path), help="Your own rows (.toml) instead of the shipped ones."
)
@click.option("--methods", default="", help=f"Rows of these names: RTN,GPTQ. {LIST}")
@click.option("--bits", default="", help=f"Rows of these headline bits: 2,3,4. {LIST}")
@click.option("--groups", default="", help=f"Rows of these groups: 64,channel,none. {LIST}")
@click.option("--seed", default=0, show_default=True)
@click.option("--dry-run", is_flag=True, help="Tell the rows and what each would take; do nothing.")
@shared_options
def study_command(**options: Any) -> None:
    """Quantize MODEL by every method at every width, and measure each: the table of the empirical study.

    No artifact is written. Rows that are done stay in the cache: a killed study goes on where it stopped.
    Options below the rows' own hold for rows that leave them open.
    """
    from gammac.study.run import StudyRequest, prepare, run_study
    from gammac.sweep_report import check_folder

    wish = StudyRequest(
        request_of({**options, **DECIDED}, "32", options["seed"], strategy="uniform"),
        _rows(options),
        options["texts"],
        options["windows"],
        options["tasks"],
        options["task_items"],
    )
    with ERR.status("capturing the model"):
        ready = prepare(wish, options["cache"], show_progress)
    if options["dry_run"]:
        _print_estimate(ready)
        return
    check_folder(options["out"])
    found = run_study(ready, lambda study: _show(study, options["out"]))
    _print_study(found, [*_write(found, options["out"]), *_drawn(found, options["out"])], options["out"])
    if found.failed:
        sys.exit(1)


# shared options that rows decide are none of this command's; and one table format is enough for all rows
study_command.params = [p for p in study_command.params if p.name not in DECIDED]
next(p for p in study_command.params if p.name == "table_formats").default = "w8g64"


def _rows(options: dict[str, Any]) -> Any:
    from gammac.study.rows import chosen, read_rows

    methods, bits, groups = (_parts(options[name]) for name in ("methods", "bits", "groups"))
    return chosen(read_rows(options["rows"]), methods, [_number(b) for b in bits], groups)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise CompileError(f"{text!r} is no number of bits", hint="write --bits 2,3,4") from None


def _write(study: "Study", folder: Path) -> list[Path]:
    from gammac.study import report

    return report.write(study, folder)


def _show(study: "Study", folder: Path) -> None:
    """The files as far as they go, and a line for the newest row."""
    from gammac.study import report

    _write(study, folder)
    ERR.print(report.line(study.rows[-1]), highlight=False, markup=False)


def _drawn(study: "Study", folder: Path) -> list[Path]:
    """The plot, if there is matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        ERR.print("note: no plot without matplotlib: pip install 'gammac\\[plots]'", highlight=False)
        return []
    from gammac.study import plot

    return plot.draw(study, folder)


def _print_study(study: "Study", paths: list[Path], folder: Path) -> None:
    from gammac import tables
    from gammac.study import report

    for grid in report.grids(study):
        OUT.print(tables.grid(grid))
    OUT.print(report.headline(study), highlight=False, markup=False, soft_wrap=True)
    OUT.print(f"{len(paths)} files in {folder}: {', '.join(p.name for p in paths)}", highlight=False)
    for remark in report.remarks(study):
        ERR.print(remark, highlight=False, markup=False, soft_wrap=True)


def _print_estimate(ready: "Prepared") -> None:
    from gammac import tables
    from gammac.study.estimate import estimate_rows
    from gammac.study.report import estimate_grid

    OUT.print(tables.grid(estimate_grid(ready.plan.source.name, estimate_rows(ready))))
