"""The parameter file: arrays one after the other, each at a multiple of 64 bytes, as kernels read them.

Nothing in it is read or copied at load: the file is mapped, and a kernel's first touch brings a page in.
"""

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from gammac.targets.tvm.description import Entry

ALIGNMENT: Final = 64

Array = npt.NDArray[Any]


class Places(Protocol):
    """Where arrays lie in a parameter file."""

    @property
    def entries(self) -> Sequence[Entry]:
        """The index."""
        ...

    def place(self, name: str, array: Callable[[], Array]) -> int:
        """The place of an array in the index."""
        ...


class WrittenParams:
    """A parameter file that is finished: for a second program on the same parameters."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self._places = {entry.name: i for i, entry in enumerate(entries)}

    def place(self, name: str, array: Callable[[], Array]) -> int:
        """The place of an array that was written under this name."""
        return self._places[name]


class ParamFile:
    """A parameter file under construction."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self._file = path.open("wb")

    def __enter__(self) -> "ParamFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def place(self, name: str, array: Callable[[], Array]) -> int:
        """Write an array; its place in the index."""
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        values = np.ascontiguousarray(array())
        self.entries.append(Entry(name, str(values.dtype), values.shape, self._file.tell()))
        self._file.write(values.reshape(-1).view(np.uint8).data)
        return len(self.entries) - 1


@dataclass(frozen=True)
class MappedParams:
    """The arrays of a parameter file, read-only, backed by the file itself."""

    path: Path
    entries: tuple[Entry, ...]

    def arrays(self) -> Iterator[Array]:
        """In the order of the index. Raises ValueError for an entry that the file is too short for."""
        mapped = np.frombuffer(_mapped(self.path), np.uint8)
        for entry in self.entries:
            end = entry.offset + entry.nbytes
            if entry.offset % ALIGNMENT or end > len(mapped):
                raise ValueError(f"{entry.name} is not within {self.path.name}")
            yield mapped[entry.offset : end].view(entry.dtype).reshape(entry.shape)


def _mapped(path: Path) -> mmap.mmap:
    """A file in memory, in large pages where the system has them: a token reads all of it, in small pages up
    to a sixth slower. Raises OSError, or ValueError for an empty file."""
    with path.open("rb") as file:
        # private: the interface to other libraries has no word for read-only
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    # a system may know the word and not do it
    with suppress(OSError):
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped
