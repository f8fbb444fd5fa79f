"""Putting a folder together beside its place, so that a killed compile leaves no half artifact."""

import ctypes
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]

from gammac.diagnostics import CompileError
from gammac.runtime.artifact import is_artifact

RENAME_EXCHANGE: Final = 2
AT_FDCWD: Final = -100


def check_writable(out: Path, overwrite: bool = True) -> None:
    """Raise CompileError now if an artifact could not be put at `out` after hours of work."""
    if out.exists() and not _is_replaceable(out):
        kind = "a folder with other things in it" if out.is_dir() else "a file"
        raise CompileError(
            f"{out} is {kind}, not an artifact", hint="choose another name; it stays untouched"
        )
    if is_artifact(out) and not overwrite:
        raise CompileError(f"{out} is there already", hint="choose another name, or allow overwriting")
    ancestor = next(p for p in (out.absolute().parent, *out.absolute().parents) if p.exists())
    try:
        # permission bits don't tell: root ignores them, and a read-only disk has them all
        with tempfile.TemporaryDirectory(dir=ancestor, prefix=f".{out.name}."):
            pass
    except OSError as error:
        raise CompileError(
            f"nothing can be written to {ancestor}: {error.strerror}", hint="choose another folder"
        ) from error


@contextmanager
def staging(out: Path, overwrite: bool = True) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place when the block ends well, and vanishes otherwise.

    Raises CompileError as `check_writable` does, and when the folder can't be moved to its place.
    """
    check_writable(out, overwrite)
    # an exchange must replace the folder, not a link that points to it
    place = out.resolve()
    _sweep_up(place)
    work = place.parent / f".{place.name}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        work.mkdir(parents=True)
        yield work
        _publish(work, place, overwrite)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sweep_up(place: Path) -> None:
    """Remove what killed compiles left beside `place`: folders named after a process that is gone."""
    for left in place.parent.glob(f".{place.name}.*.*"):
        pid = left.name.removeprefix(f".{place.name}.").split(".")[0]
        if left.is_dir() and pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _publish(work: Path, place: Path, overwrite: bool) -> None:
    # someone may have written there while we were at work
    check_writable(place, overwrite)
    try:
        if not is_artifact(place):
            work.rename(place)
        elif not _exchange(work, place):
            _swap_in_two_steps(work, place)
    except OSError as error:
        raise CompileError(
            f"{place} can't be written: {error.strerror}", hint="choose another folder"
        ) from error


def _is_replaceable(out: Path) -> bool:
    return out.is_dir() and (is_artifact(out) or not any(out.iterdir()))


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system has no such call."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    result: int = renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return result == 0


def _swap_in_two_steps(work: Path, place: Path) -> None:
    old = work.with_name(f"{work.name}.old")
    place.rename(old)
    try:
        work.rename(place)
    except OSError:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)
