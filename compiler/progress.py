"""Progress of long work: a pass iterates over `ctx.progress(items, "what")`; the command line draws."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Yields the items, telling whoever watches how many are done."""

    def __call__(self, items: Sequence[T], title: str) -> Iterator[T]:
        """The items, one by one."""
        ...


def no_progress(items: Iterable[T], title: str) -> Iterator[T]:
    """Yields the items and tells nobody."""
    return iter(items)
