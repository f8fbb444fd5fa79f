"""What a model's time and memory say about what no product explains: calls, attention, the runtime itself.

A model is compiled at 4 bits and timed on this machine; then each figure is what makes the cost model come
out at what was measured, the others given:

- attention over a cache from how much longer a token takes behind a full cache than behind an empty one;
- attention of a prefill from how much more than four times as long four times as many tokens take;
- a call of the other ops from a token's whole time;
- the runtime's own bytes from the process's memory.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Final

from gammac.driver import Request, compile_model, make_plan
from gammac.ir import Module
from gammac.passes import Choices
from gammac.runtime.runners import SessionRunner
from gammac.runtime.session import open_session
from gammac.target_rows import table_of, with_figure
from gammac.targets import cost
from gammac.targets.target import Target

NEW, ROUNDS = 64, 5  # tokens that are timed, and how often
SHARE: Final = 4  # of the context: the shorter of two prefills
SLOWEST: Final = 1e3  # times: rates that a noisy machine makes absurd stay as they were
ENDLESS: Final = 1e12  # a rate that costs nothing
MEMORY: Final = """
import sys
from pathlib import Path
from gammac.runtime.probe import peak_rss_bytes
from gammac.runtime.runners import SessionRunner
from gammac.runtime.session import open_session
before = peak_rss_bytes()
runner = SessionRunner(open_session(Path(sys.argv[1]), int(sys.argv[2]), verify=False))
runner.prefill_seconds(int(sys.argv[3]))
print(peak_rss_bytes() - before)
"""


@dataclass(frozen=True)
class Timed:
    """Seconds of a token behind `context` others and behind none, of prefills; bytes that a prefill adds."""

    context: int
    decode: float
    decode_empty: float
    prefill: float
    prefill_short: float
    bytes: int


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
    return Timed(context, *times, added_bytes(folder, threads, context))


def read_anew(folder: Path) -> None:
    """Have the system forget what it holds of an artifact's files: what was just written lies in small pages,
    which reads a sixth slower than what is mapped from a file in large ones."""
    if hasattr(os, "posix_fadvise"):
        for path in filter(Path.is_file, folder.iterdir()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def added_bytes(folder: Path, threads: int, tokens: int) -> int:
    """Resident bytes that opening an artifact and a prefill add, at most, to a process of their own."""
    command = [sys.executable, "-c", MEMORY, str(folder), str(threads), str(tokens)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout))


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
             "runtime_bytes": max(0, timed.bytes - held)},
        "overhead_us": {"default": call},
    }  # fmt: skip


def _rate(now: float, predicted: float, measured: float) -> float:
    faster = predicted / measured if measured > 0 else SLOWEST
    return now * faster if 1 / SLOWEST < faster < SLOWEST else now
