"""`gammac zoo`: what models there are."""

from pathlib import Path

import click

from gammac.cli.console import ERR, OUT


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
