"""The command group, the console, and the progress bars that all commands share."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from gammac import __version__
from gammac.diagnostics import CompileError

T = TypeVar("T")
# a file or a pipe has no width of its own
OUT: Final = Console(width=None if sys.stdout.isatty() else 120)
ERR: Final = Console(stderr=True)


class Commands(click.Group):
    """A group whose commands end in a message, not a traceback, when the user made a mistake."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; print a CompileError to stderr and exit with 1."""
        try:
            return super().invoke(ctx)
        except CompileError as error:
            ERR.print(f"[bold red]error:[/] {_plain(str(error))}", highlight=False, soft_wrap=True)
            sys.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a user's work, which is the order they were added in."""
        return list(self.commands)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gammac")
def main() -> None:
    """An ahead-of-time compiler for transformers: a model, a device and a budget in, an artifact out."""


def show_progress(items: Sequence[T], title: str) -> Iterator[T]:
    """The items, with a bar and the time left on stderr."""
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(
        *columns, TimeRemainingColumn(), console=ERR, transient=True, disable=not ERR.is_terminal
    ) as bars:
        yield from bars.track(items, description=title)
