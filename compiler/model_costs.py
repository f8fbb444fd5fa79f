"""What a model's time and memory say about what no product explains: calls, attention, the runtime itself.

A model is compiled at 4 bits and timed on this machine; then each figure is what makes the cost model come
out at what was measured, the others given:

- attention over a cache from how much longer a token takes behind a full cache than behind an empty one;
- attention of a prefill from how much more than four times as long four times as many tokens take;
- a call of the other ops from a token's whole time;
- the runtime's own bytes from the process's memory.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Final

from gammac.driver import Request, compile_model, make_plan
from gammac.ir import Module
from gammac.passes import Choices
from gammac.runtime.bench import load_in_process
from gammac.runtime.runners import SessionRunner
from gammac.runtime.session import open_session
from gammac.target_rows import table_of, with_figure
from gammac.targets import cost
from gammac.targets.target import Target

NEW, ROUNDS = 64, 5  # tokens that are timed, and how often
SHARE: Final = 4  # of the context: the shorter of two prefills
ABSURD: Final = 1e3  # times as fast or as slow: a noisy machine says so, and the rate stays as it was
ENDLESS: Final = 1e12  # a rate that costs nothing


@dataclass(frozen=True)
class Timed:
    """Seconds of a token behind `context` others and behind none, of a prefill of `context` tokens and of one
    SHARE times shorter; bytes that opening the artifact and that prefill add to a process."""

    context: int
    decode: float
    decode_empty: float
    prefill: float
    prefill_short: float
    added_bytes: int


def time_model(folder: Path, threads: int, context: int = cost.CONTEXT) -> Timed:
    """Time an artifact behind at most `context` tokens; medians."""
    read_anew(folder)
    session = open_session(folder, threads)
    runner, context = SessionRunner(session), min(context, session.context - NEW)

    def decode(past: int) -> float:
        return median(runner.decode_seconds(past, NEW) / NEW for _ in range(ROUNDS))

    def prefill(tokens: int) -> float:
        return median(runner.prefill_seconds(tokens) for _ in range(ROUNDS))

    times = decode(context - NEW // 2), decode(1), prefill(context), prefill(context // SHARE)
    return Timed(context, *times, load_in_process(folder, threads, "gammac", context).added_bytes)


def read_anew(folder: Path) -> None:
    """Have the system forget what it holds of an artifact's files: what was just written lies in small pages,
    which reads a sixth slower than what is mapped from a file in large ones."""
    if hasattr(os, "posix_fadvise"):
        for path in filter(Path.is_file, folder.iterdir()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def with_model_costs(text: str, where: Path, model: str, cache: Path | None) -> str:
    """The target's file with the figures at which a model's times and memory come out.

    `where` is the file, which is read. Raises CompileError as a compile does.
    """
    choices = Choices("w4g64", "w4g64", quantizer="rtn", strategy="weight_mse", refine=False)
    request = Request(model, str(where), "4", choices, calibration_windows=4, backend="tvm")
    plan = make_plan(request, cache)
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_model(plan, Path(folder) / "artifact")
        timed = time_model(compiled.folder, plan.target.threads)
    for table, figures in fitted(compiled.module, plan.target, timed).items():
        for key, figure in figures.items():
            text = with_figure(text, table_of(text, table), key, figure)
    return text


def fitted(module: Module, target: Target, timed: Timed) -> Mapping[str, Mapping[str, float]]:
    """Figures by table and key. A rate that would come out as nothing, or as endless, stays as it is."""

    def decode(past: int, on: Target) -> float:
        return cost.seconds(module, cost.decode_function(module, past), on)

    def prefill(tokens: int, on: Target) -> float:
        return cost.seconds(module, cost.prefill_function(module, tokens), on)

    def others(on: Target) -> Target:
        return replace(on, attention_gbps=ENDLESS, attention_gflops=ENDLESS)

    def longer(on: Target) -> float:
        return decode(timed.context, on) - decode(1, on)

    def bent(on: Target) -> float:
        return prefill(timed.context, on) - SHARE * prefill(timed.context // SHARE, on)

    def called(call: float) -> float:
        return decode(timed.context, replace(target, overhead_us={**target.overhead_us, "default": call}))

    rest = longer(others(target))
    gbps = _rate(target.attention_gbps, longer(target) - rest, timed.decode - timed.decode_empty - rest)
    target = replace(target, attention_gbps=gbps)
    # NOTE not from none: an op whose call costs nothing moves nothing either
    each = called(2.0) - called(1.0)
    call = max(0.0, 1 + (timed.decode - called(1.0)) / each) if each else target.overhead_us["default"]
    target = replace(target, overhead_us={**target.overhead_us, "default": call})
    rest = bent(others(target))
    measured = timed.prefill - SHARE * timed.prefill_short
    gflops = _rate(target.attention_gflops, bent(target) - rest, measured - rest)
    held = cost.peak_bytes(module, replace(target, runtime_bytes=0), tokens=timed.context)
    return {
        "": {"attention_gbps": gbps, "attention_gflops": gflops,
             "runtime_bytes": max(0, timed.added_bytes - held)},
        "overhead_us": {"default": call},
    }  # fmt: skip


def _rate(now: float, predicted: float, measured: float) -> float:
    """The rate at which what was predicted takes as long as was measured."""
    faster = predicted / measured if measured > 0 else ABSURD
    return now * faster if 1 / ABSURD < faster < ABSURD else now
