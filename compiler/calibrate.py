"""Measure the TVM emitter's products on this machine: rows that a target then predicts with.

A weight is read from memory, not from a cache: as many copies are multiplied in turn as a cache can't hold.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Any, Final

import numpy as np

from gammac.diagnostics import CompileError
from gammac.formats import Format, parse_format
from gammac.progress import Progress, no_progress
from gammac.runtime.bench import read_bandwidth
from gammac.target_rows import table_of, to_toml
from gammac.targets.target import Measured
from gammac.targets.tvm.names import INT8

ALIGNMENT: Final = 64
NEW, ROUNDS = 64, 5  # tokens of a model that are timed, and how often
BIG_CORES: Final = 1


@dataclass(frozen=True)
class Wish:
    """What is measured. `tokens` are those of a prefill; `copies_bytes` of weights are read in turn."""

    formats: tuple[str, ...] = ("w1g64", "w2g64", "w3g64", "w4g64", "w5g64", "w6g64", "w8g64")
    shapes: tuple[tuple[int, int], ...] = (
        (512, 512), (1536, 512), (512, 1536), (2048, 2048), (4096, 4096), (32768, 512)
    )  # fmt: skip
    threads: tuple[int, ...] = (1, 2)
    tokens: int = 128
    rounds: int = 9
    copies_bytes: int = 192 << 20


QUICK: Final = Wish(("w3g64", "w4g64"), ((256, 256), (1024, 512)), (1,), 16, 3, 4 << 20)


@dataclass(frozen=True)
class Calibration:
    """What was found. Bandwidths are of one thread and of all, bytes a second."""

    rows: tuple[Measured, ...]
    bandwidth: tuple[float, float]
    threads: int


def calibrate(isa: Any, wish: Wish, progress: Progress = no_progress) -> Calibration:
    """Time products with int8 inputs in every format, shape and number of threads.

    Raises CompileError for a format without a kernel, and where TVM has fewer threads than are wanted.
    """
    formats = [_packable(name) for name in wish.formats]
    pool = _pool(max(wish.threads))
    jobs = [(f, shape, tokens) for f in formats for shape in wish.shapes for tokens in (1, wish.tokens)]
    rows = []
    for format_, shape, tokens in progress(jobs, "timing kernels"):
        run = _product(format_.fit(shape[1]), shape, tokens, isa, wish)
        for threads in wish.threads:
            pool(BIG_CORES, threads)
            seconds = float(f"{median([run() for _ in range(wish.rounds + 1)][1:]):.4g}")
            rows.append(Measured("linear", format_.fit(shape[1]).name, *shape, threads, seconds, tokens))
    speeds = (read_bandwidth(1), read_bandwidth(max(wish.threads)))
    return Calibration(tuple(rows), speeds, max(wish.threads))


def _packable(name: str) -> Format:
    from gammac.targets.tvm.kernels import has_layout

    format_ = parse_format(name)
    if not has_layout(format_):
        raise CompileError(f"{format_.name} has no TVM kernel", hint="integers such as w3g64 have one")
    return format_


def _pool(threads: int) -> Callable[..., None]:
    """Sets how many of the process's threads work. How many there are is settled when they are made."""
    if int(os.environ.setdefault("TVM_NUM_THREADS", str(threads))) < threads:
        raise CompileError(
            f"TVM_NUM_THREADS is {os.environ['TVM_NUM_THREADS']}, {threads} threads are to be timed",
            hint="unset it, or give --threads",
        )
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    import tvm  # type: ignore[import-untyped]  # noqa: F401  (it registers the function)
    import tvm_ffi

    found: Callable[..., None] = tvm_ffi.get_global_func("runtime.config_threadpool")
    return found


def _product(
    format_: Format, shape: tuple[int, int], tokens: int, isa: Any, wish: Wish
) -> Callable[[], float]:
    """Seconds of one call, over calls with another copy of the weight each."""
    import tvm
    from tvm.target import Target as LlvmTarget  # type: ignore[import-untyped]

    from gammac.targets.tvm.kernels import decode_linear, has_layout, lowering, packed_bytes, prefill_linear

    assert has_layout(format_)
    make = decode_linear if tokens == 1 else prefill_linear
    kernel = make(format_, *shape, isa, integer=True)
    module = tvm.IRModule({kernel.name: kernel.func.with_attr("global_symbol", kernel.name)})
    with lowering():
        function = tvm.compile(module, target=LlvmTarget(isa.llvm_target()))[kernel.name]
    copies = 1 if tokens > 1 else -(-wish.copies_bytes // packed_bytes(format_, *shape, isa))
    inputs = [_tensor(o, tokens) for o in kernel.inputs if o.name.startswith("x")]
    weights = [[_tensor(o, tokens) for o in kernel.inputs[len(inputs) :]] for _ in range(copies)]
    outputs = [_tensor(o, tokens) for o in kernel.outputs]

    def run() -> float:
        started = time.perf_counter()
        for weight in weights:
            function(*inputs, *weight, *outputs)
        return (time.perf_counter() - started) / copies

    return run


def _tensor(operand: Any, tokens: int) -> Any:
    """Some numbers that a kernel takes; their values don't matter for its time."""
    import tvm_ffi

    sizes = [tokens if isinstance(size, str) else size for size in operand.shape]
    dtype = np.dtype(operand.dtype)
    raw = np.empty(prod(sizes) * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    array = raw[start : start + prod(sizes) * dtype.itemsize].view(dtype).reshape(sizes)
    array[...] = 1
    return tvm_ffi.from_dlpack(array)


# ---- the target's file --------------------------------------------------------------------------


def calibrated(text: str, found: Calibration, name: str, machine: str) -> str:
    """A target's file with what was measured in it, under a name of its own.

    `text` is the file's; the rows are those of the TVM backend, the target's own emitter or another.
    """
    one, all_ = (speed / 1e9 for speed in found.bandwidth)
    figures = {"name": f'"{name}"', "threads": str(found.threads), "dram_gbps": f"{one:.3g}",
               "dram_gbps_peak": f"{max(one, all_):.3g}"}  # fmt: skip
    for key, value in figures.items():
        text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, count=1, flags=re.MULTILINE)
    rows = to_toml(table_of(text, "measured"), found.rows)
    return f"{text.rstrip()}\n\n# measured on {machine}, products in {INT8}\n{rows}"


def shapes_of(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """`4096x11008` as rows and columns. Raises CompileError for anything else."""
    for text in texts:
        match = re.fullmatch(r"(\d+)x(\d+)", text.strip())
        if match is None or "0" in match.groups():
            raise CompileError(f"{text!r} is no shape", hint="write rows by columns, as in 4096x11008")
        yield int(match[1]), int(match[2])
