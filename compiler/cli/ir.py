"""`gammac inspect`, `diff`, `opt` and `passes`: looking at the IR and working on it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gammac.cli.console import OUT, show_progress
from gammac.cli.options import CALIBRATION_LENGTH, CALIBRATION_WINDOWS
from gammac.diagnostics import CompileError

if TYPE_CHECKING:
    from gammac.ir import Module
    from gammac.targets.target import Target


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--target", help="Whose costs to show (default: the artifact's, else cpu).")
@click.option("--every-weight", is_flag=True, help="A row for each weight, not for each projection.")
@click.option("--weight", "weight_name", help="One weight, by the end of its name: why it has its format.")
def inspect(file: Path, target: str | None, every_weight: bool, weight_name: str | None) -> None:
    """Ops, formats, bits, sizes and predicted cost of a .gir FILE or an artifact."""
    from gammac import tables
    from gammac.driver import MODULE
    from gammac.runtime.artifact import device_kernels, open_artifact
    from gammac.summary import by_projection, by_weight
    from gammac.targets.cost import module_cost
    from gammac.targets.target import load_target

    artifact, backend = None, None
    if file.is_dir():
        artifact = open_artifact(file)
        target, backend = target or artifact.manifest.target, artifact.manifest.emitter
        file = artifact.path(MODULE)
    module = read_module(file)
    chosen = load_target(target or "cpu", backend)
    if weight_name:
        _print_weight(module, weight_name, chosen)
        return
    for line in tables.op_counts(module):
        OUT.print(line, highlight=False, markup=False)
    rows = (by_weight if every_weight else by_projection)(module, chosen)
    OUT.print(tables.weights(f"@{module.name} on {chosen.name}", rows))
    if artifact is not None and (kernels := device_kernels(artifact)):
        OUT.print(tables.device_kernels(kernels))
    OUT.print(tables.cost_line(module_cost(module, chosen)), highlight=False)


def read_module(path: Path) -> "Module":
    """A .gir file. Raises CompileError when it can't be read or is wrong."""
    from gammac.ir import parse, verify
    from gammac.texts import read_text

    module = parse(read_text(path), str(path))
    found = verify(module)
    if found:
        raise CompileError.from_diagnostics(f"{path} is not well formed", found)
    return module


def _print_weight(module: "Module", name: str, target: "Target") -> None:
    from gammac import tables
    from gammac.explain import explain, find_weight, on_device, reasons
    from gammac.ir.text import weight_text

    weight = find_weight(module, name)
    OUT.print(weight_text(weight), highlight=False, soft_wrap=True, markup=False)
    found = explain(module, weight, target)
    if found.options:
        OUT.print(tables.options(found))
    if found.wider or found.narrower:
        OUT.print(tables.steps(found))
    for line in (*reasons(found), *on_device(found, target)):
        OUT.print(line, highlight=False, markup=False, soft_wrap=True)


@click.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
def diff(before: Path, after: Path) -> None:
    """What changed between two .gir files; exits with 1 if anything did."""
    from gammac.ir.diff import diff_modules

    lines = list(diff_modules(read_module(before), read_module(after)))
    colours = {"-": "red", "+": "green", "@": "cyan"}
    for line in lines:
        OUT.print(line, style=colours.get(line[:1], ""), markup=False, highlight=False, soft_wrap=True)
    sys.exit(1 if lines else 0)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-p", "--passes", required=True, help='For example "allocate{budget=2.5},quantize".')
@click.option("-o", "--out", type=click.Path(path_type=Path), help="A .gir file (default: print).")
@click.option("--target", default="cpu", show_default=True)
@click.option("--calibration", type=click.Path(path_type=Path), help="For passes that read text.")
@CALIBRATION_WINDOWS
@CALIBRATION_LENGTH
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="The model's folder, to read calibration text."
)
@click.option("--cache", type=click.Path(path_type=Path), help="The cache of the compile that wrote FILE.")
def opt(file: Path, passes: str, out: Path | None, **options: Any) -> None:
    """Run passes on a .gir FILE: a compile goes on from any of its dumps."""
    from gammac.files import write_atomically
    from gammac.ir import to_text
    from gammac.passes import PASSES
    from gammac.passes.options import parse_passes
    from gammac.pipeline import Pipeline

    pipeline = Pipeline(parse_passes(passes, PASSES))
    module = pipeline.run(read_module(file), _opt_context(options))
    if out is None:
        click.echo(to_text(module), nl=False)
    else:
        write_atomically(out, to_text(module).encode())


def _opt_context(options: dict[str, Any]) -> Any:
    from gammac.models_zoo.fetch import default_cache
    from gammac.pipeline import Context
    from gammac.runtime.generate import load_tokenizer
    from gammac.targets.target import load_target
    from gammac.texts import Calibration, read_text, token_windows
    from gammac.weights import WeightStore

    calibration = None
    if options["calibration"]:
        if options["tokenizer"] is None:
            raise CompileError("calibration text needs a tokenizer", hint="give --tokenizer FOLDER")
        text, tokenizer = read_text(options["calibration"]), load_tokenizer(options["tokenizer"])
        length, windows = options["calibration_length"], options["calibration_windows"]
        calibration = Calibration(token_windows(text, tokenizer, length, windows, spread=True))
    store = WeightStore((options["cache"] or default_cache()) / "weights")
    return Context(load_target(options["target"]), store, (), calibration, progress=show_progress)


@click.command("passes")
def passes_command() -> None:
    """The passes, their options, and what they count on and promise."""
    from gammac import tables
    from gammac.passes import PASSES

    OUT.print(tables.passes(PASSES))
