"""`gammac targets` and `zoo`: what there is."""

from pathlib import Path

import click

from gammac.cli.console import ERR, OUT


@click.group("targets", invoke_without_command=True)
@click.pass_context
def targets_group(ctx: click.Context) -> None:
    """The targets; `targets show NAME` for one."""
    if ctx.invoked_subcommand is None:
        from gammac import tables
        from gammac.targets.target import ALIASES, HOST, host_target, load_target, target_names

        OUT.print(tables.targets([load_target(name) for name in target_names()]))
        OUT.print(f"{HOST} stands for {host_target()} on this machine", highlight=False)
        for name, meant in ALIASES.items():
            OUT.print(f"{name} stands for {meant}", highlight=False)


@targets_group.command("show")
@click.argument("name")
@click.option("--backend", help="One of those that the target has figures for (default: its own).")
def targets_show(name: str, backend: str | None) -> None:
    """What a target can run and how fast, with the sources."""
    from gammac import tables
    from gammac.targets.target import load_target

    target = load_target(name, backend)
    OUT.print(tables.kernels(target))
    for source in target.sources:
        OUT.print(f"source: {source}", highlight=False, markup=False)


@click.group()
def zoo() -> None:
    """Models that gammac knows by name."""


@zoo.command("list")
def zoo_list() -> None:
    """Names, sizes and licences."""
    from gammac import tables
    from gammac.models_zoo.registry import MODELS

    OUT.print(tables.models(MODELS))


@zoo.command("fetch")
@click.argument("name")
@click.option("--cache", type=click.Path(path_type=Path), help="Where to (default: the user's cache).")
def zoo_fetch(name: str, cache: Path | None) -> None:
    """Download a model; prints its folder."""
    from gammac.models_zoo.fetch import fetch

    with ERR.status(f"fetching {name}"):
        folder = fetch(name, cache=cache)
    click.echo(folder)
