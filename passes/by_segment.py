"""Learn something of each segment of a module while calibration text runs through it.

One segment is in memory at a time. What was learnt of it is kept in the cache, and so is what the next
one reads: a killed run goes on behind the last finished segment.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import psutil  # type: ignore[import-untyped]
from torch import Tensor

from gammac.cache import key_of
from gammac.calibration import Segment, SegmentWeights, Stream, run_segment
from gammac.diagnostics import CompileError
from gammac.ir import Module, Op, to_text
from gammac.pipeline import Context


class Collector(Protocol):
    """What watches one segment, over all batches."""

    def visit(self, segment: Segment, weights: SegmentWeights, op: Op, tensors: list[Tensor]) -> None:
        """See one linear in one batch, with the tensors that it reads."""
        ...

    def results(self, ctx: Context) -> dict[str, Any]:
        """What was learnt, by weight name: plain values and digests."""
        ...


def collect_by_segment(
    module: Module, ctx: Context, name: str, title: str, collector: Callable[[], Collector]
) -> dict[str, Any]:
    """The results of a new collector for each segment of `@forward`, joined.

    `name` is that of the pass, with all its options: results are kept under it. Raises CompileError
    without calibration text, or where another process is at the same work.
    """
    if ctx.calibration is None:
        raise CompileError(f"{name.partition('{')[0]} needs calibration text", hint="give --calibration FILE")
    key = key_of(to_text(module), ctx.calibration.digest, name)
    folder = None if ctx.cache.folder is None else ctx.cache.folder / "streams" / key
    with _claimed(folder) if folder is not None else nullcontext():
        stream = Stream(module.functions["forward"], ctx.calibration.tokens, folder)
        found = _collect(module, ctx, stream, key, title, collector)
    if folder is not None:
        _remove(folder)
    return found


def _collect(
    module: Module, ctx: Context, stream: Stream, key: str, title: str, collector: Callable[[], Collector]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for index in ctx.progress(range(len(stream.segments)), title):

        def compute(index: int = index) -> dict[str, Any]:
            watching = collector()
            _restore(module, ctx, stream, index)
            # the state that this segment read stays until the next one is through: a killed run needs it
            run_segment(module, stream, ctx.store, watching.visit, index, forget=False)
            if index:
                stream.forget(index - 1)
            return watching.results(ctx)

        found.update(ctx.cache.record(key_of(key, str(index)), compute, ctx.store))
    return found


def _restore(module: Module, ctx: Context, stream: Stream, index: int) -> None:
    """Have ready what a segment reads: as the one before or a killed run left it, or made again."""
    if stream.has(index):
        return
    stream.start()
    for earlier in range(index):
        run_segment(module, stream, ctx.store, lambda *_: None, earlier)


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder. Raises CompileError when one is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "pid"
    holder = lock.read_text() if lock.exists() else ""
    if holder.isdigit() and int(holder) != os.getpid() and psutil.pid_exists(int(holder)):
        raise CompileError(
            f"process {holder} is calibrating the same model on the same text",
            hint="wait, or use another --cache",
        )
    lock.write_text(str(os.getpid()))
    yield


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
