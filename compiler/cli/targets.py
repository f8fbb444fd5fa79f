"""`gammac targets`: what there is, what one can do, and rows of figures for one."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gammac.cli.console import OUT, show_progress
from gammac.diagnostics import CompileError

if TYPE_CHECKING:
    from gammac.calibrate import Wish


@click.group("targets", invoke_without_command=True)
@click.pass_context
def targets_group(ctx: click.Context) -> None:
    """The targets; `targets show NAME` for one."""
    if ctx.invoked_subcommand is None:
        from gammac import tables
        from gammac.targets.target import ALIASES, HOST, host_target, load_target, target_names

        OUT.print(tables.targets([load_target(name) for name in target_names()]))
        OUT.print(f"{HOST} stands for {host_target()} on this machine", highlight=False)
        for alias, name in ALIASES.items():
            OUT.print(f"{alias} stands for {name}", highlight=False)


@targets_group.command("show")
@click.argument("name")
@click.option("--backend", help="One of those that the target has figures for (default: its own).")
def targets_show(name: str, backend: str | None) -> None:
    """What a target can run and how fast, with the sources."""
    from gammac import tables
    from gammac.targets.target import load_target

    target = load_target(name, backend)
    OUT.print(tables.kernels(target))
    if target.cpu:
        OUT.print(f"code for {' '.join((target.cpu, *target.features))}", highlight=False, markup=False)
    if target.analysed:
        OUT.print(tables.analysed(target))
    if target.measured:
        OUT.print(f"{len(target.measured)} products were timed", highlight=False)
    for source in target.sources:
        OUT.print(f"source: {source}", highlight=False, markup=False)


@targets_group.command("calibrate")
@click.argument("name", default="cpu")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="The new target's .toml file."
)
@click.option("--formats", help="Such as w3g64,w4g64 (default: 1 to 8 bits at g64).")
@click.option("--shapes", help="Rows by columns, such as 4096x4096,11008x4096 (default: small to large).")
@click.option("--threads", help="Such as 1,2 (default: one, and all cores).")
@click.option("--model", help="Fit calls, attention and the runtime's memory to this model.")
@click.option("--cache", type=click.Path(path_type=Path), help="Where finished work of the model is kept.")
@click.option("--quick", is_flag=True, help="Few of everything, to try it out: no figures to go by.")
def targets_calibrate(
    name: str, out: Path, quick: bool, model: str | None, cache: Path | None, **wanted: str | None
) -> None:
    """Time the TVM backend's kernels on this machine, and write a target that predicts with them.

    Leave the machine alone meanwhile. Use it with --target OUT --backend tvm.
    """
    from gammac.calibrate import QUICK, Wish, calibrate, calibrated
    from gammac.files import write_atomically
    from gammac.model_costs import with_model_costs
    from gammac.runtime.tvm_session import lacking
    from gammac.targets.target import load_target, parse_target, target_text
    from gammac.targets.tvm.kernels import isa_of

    if out.suffix != ".toml":
        raise CompileError(f"{out} is no .toml file", hint="a target is known by its ending")
    isa = isa_of(load_target(name, "tvm"))
    lacks = lacking(isa.name, isa.machine, isa.cpu_flags)
    if lacks:
        raise CompileError(
            f"{name} can't be timed here: {lacks}", hint="gammac targets analyse needs no device"
        )
    wish = _wish(QUICK if quick else Wish(), wanted)
    found = calibrate(isa, wish, show_progress)
    made = calibrated(target_text(name), found, out.stem, platform.machine())
    parse_target(made, str(out), "tvm")
    write_atomically(out, made.encode())
    if model:
        write_atomically(out, with_model_costs(made, out, model, cache).encode())
    OUT.print(f"{len(found.rows)} rows in {out}: use --target {out} --backend tvm", highlight=False)


def _wish(wish: "Wish", wanted: dict[str, str | None]) -> "Wish":
    from dataclasses import replace

    from gammac.calibrate import shapes_of
    from gammac.runtime.session import default_threads

    changes: dict[str, Any] = {"threads": tuple(sorted({1, default_threads()}))}
    if wanted["formats"]:
        changes["formats"] = tuple(wanted["formats"].split(","))
    if wanted["shapes"]:
        changes["shapes"] = tuple(shapes_of(wanted["shapes"].split(",")))
    if wanted["threads"]:
        if not all(part.isdigit() and int(part) for part in wanted["threads"].split(",")):
            raise CompileError(f"{wanted['threads']!r} are no numbers of threads", hint="write --threads 1,2")
        changes["threads"] = tuple(map(int, wanted["threads"].split(",")))
    return replace(wish, **changes)


@targets_group.command("analyse")
@click.argument("name")
@click.option("--core", help="What llvm-mca is to model (default: the target's own core).")
@click.option("--llvm-mca", "mca", default="", help="Its path (default: the newest that is installed).")
@click.option("--bits", default="1,2,3,4,5,6,7,8", show_default=True)
@click.option("--groups", default="32,64", show_default=True, help="Of at most 64.")
def targets_analyse(name: str, core: str | None, mca: str, bits: str, groups: str) -> None:
    """Rates of the TVM backend's kernels on a core that is not at hand, by llvm-mca, as rows for a file."""
    from gammac.formats import IntegerFormat
    from gammac.target_rows import to_toml
    from gammac.targets.target import load_target
    from gammac.targets.tvm.analysis import analyse, find_mca
    from gammac.targets.tvm.build import demand_core
    from gammac.targets.tvm.kernels import isa_of

    target = load_target(name, "tvm")
    isa, tool = isa_of(target), find_mca(mca)
    demand_core(isa)
    if not target.ghz:
        raise CompileError(f"{target.name} does not say its clock", hint="write ghz = 2.4 into its file")
    formats = [IntegerFormat(b, g) for b in _numbers(bits) for g in _numbers(groups)]
    model = core or target.cpu
    rows = [analyse(f, isa, target.ghz, tool, model) for f in show_progress(formats, "analysing kernels")]
    click.echo(to_toml("analysed", rows), nl=False)


def _numbers(text: str) -> list[int]:
    if not all(part.isdigit() and 0 < int(part) <= 64 for part in text.split(",")):
        raise CompileError(f"{text!r} is no list of numbers up to 64", hint="write 32,64")
    return [int(part) for part in text.split(",")]
