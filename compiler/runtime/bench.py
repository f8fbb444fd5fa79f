"""Speed, memory and size of an artifact, side by side with a peer and with the machine's limit.

Decode is 128 tokens after a prompt of 32, batch 1; prefill is 512 tokens; five rounds after one
warm-up. An absolute figure is a note: what counts is the ratio of two things measured in turns.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from gammac.diagnostics import CompileError
from gammac.runtime.peers import Contestant
from gammac.runtime.probe import PROMPT, Load
from gammac.runtime.runners import Runner, SessionRunner
from gammac.runtime.session import ArtifactSession, default_threads, open_session

STREAM_BYTES: Final = 256 << 20
"""Far more than a last-level cache holds."""


@dataclass(frozen=True)
class Work:
    """What is timed: tokens of the decode's prompt, tokens decoded, tokens of the prefill, rounds."""

    prompt: int = 32
    new: int = 128
    prefill: int = 512
    rounds: int = 5


@dataclass(frozen=True)
class Rounds:
    """One figure a round, in order."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.values)


@dataclass(frozen=True)
class BenchResult:
    """Rates in tokens a second; `bytes_per_token` is weights and cache read by a decode step."""

    threads: int
    work: Work
    decode: Rounds
    prefill: Rounds
    load: Load
    size_bytes: int
    read_bytes_per_second: Rounds
    bytes_per_token: int

    @property
    def share_of_limit(self) -> float:
        """Decode rate over the rate at which the machine could read the bytes: 1 is the limit."""
        rates = zip(self.decode.values, self.read_bytes_per_second.values, strict=True)
        return median(rate * self.bytes_per_token / bandwidth for rate, bandwidth in rates)


@dataclass(frozen=True)
class Timed:
    """One contestant of several that were timed in turns; rates in tokens a second."""

    contestant: Contestant
    decode: Rounds
    prefill: Rounds
    load: Load
    size_bytes: int

    @property
    def bytes_per_second(self) -> float:
        """The size times the decode rate, as if a token read every byte once."""
        return self.size_bytes * self.decode.median


def ratio(ours: Rounds, theirs: Rounds) -> float:
    """The median of the rounds' ratios; above 1 the first is larger."""
    return median(a / b for a, b in zip(ours.values, theirs.values, strict=True))


def bench(
    artifact: Path, *, threads: int | None = None, work: Work = Work(), spinning: bool = True
) -> BenchResult:
    """Time an artifact. Raises CompileError when it can't be opened or is no decoder."""
    threads = threads or default_threads()
    session = _decoder(artifact, threads, spinning)
    rates = _in_turns({"ours": SessionRunner(session)}, work, lambda: read_bandwidth(threads))
    mean_past = work.prompt + (work.new + 1) / 2
    return BenchResult(
        threads,
        work,
        rates["ours decode"],
        rates["ours prefill"],
        load_in_process(artifact, threads, "gammac"),
        size_of(artifact),
        rates["bandwidth"],
        session.weight_bytes_per_token + round(session.cache_bytes_per_token * mean_past),
    )


def bench_together(
    contestants: Sequence[Contestant],
    *,
    threads: int | None = None,
    work: Work = Work(),
    spinning: bool = True,
) -> tuple[Timed, ...]:
    """Time several artifacts and peers, round by round in turns; the labels must differ.

    Raises CompileError when one can't be opened or its runtime is not installed.
    """
    threads = threads or default_threads()
    rates = _in_turns({c.label: c.open(threads, spinning) for c in contestants}, work)
    return tuple(
        Timed(
            c,
            rates[f"{c.label} decode"],
            rates[f"{c.label} prefill"],
            load_in_process(c.path, threads, c.runtime),
            size_of(c.path),
        )
        for c in contestants
    )


def _decoder(folder: Path, threads: int, spinning: bool) -> ArtifactSession:
    session = open_session(folder, threads, spinning=spinning)
    if session.kind != "decoder":
        raise CompileError(f"{folder} is an encoder, it decodes nothing", hint="bench takes a decoder")
    return session


def _in_turns(
    runners: Mapping[str, Runner], work: Work, bandwidth: Callable[[], float] | None = None
) -> dict[str, Rounds]:
    found: dict[str, list[float]] = {}
    for _ in range(work.rounds + 1):
        for name, runner in runners.items():
            decode = work.new / runner.decode_seconds(work.prompt, work.new)
            prefill = work.prefill / runner.prefill_seconds(work.prefill)
            found.setdefault(f"{name} decode", []).append(decode)
            found.setdefault(f"{name} prefill", []).append(prefill)
        if bandwidth is not None:
            found.setdefault("bandwidth", []).append(bandwidth())
    # the first round warms up: pages, caches, clocks
    return {name: Rounds(tuple(values[1:])) for name, values in found.items()}


def read_bandwidth(threads: int) -> float:
    """Bytes a second of streaming reads: the best of a few passes over 256 MiB, all threads at once."""
    array = np.ones(STREAM_BYTES // 8, np.int64)
    parts = np.array_split(array, threads)
    with ThreadPoolExecutor(threads) as pool:
        return STREAM_BYTES / min(_seconds(pool, parts) for _ in range(4))


def _seconds(pool: ThreadPoolExecutor, parts: Sequence[np.ndarray]) -> float:
    started = time.perf_counter()
    # numpy lets other threads run while it reduces, and a maximum needs no arithmetic to speak of
    list(pool.map(np.max, parts))
    return time.perf_counter() - started


def size_of(path: Path) -> int:
    """Bytes of a folder's files, or of a file and those that share its name (weights beside a graph)."""
    inner = path.parent.glob(f"{path.stem}.*") if path.is_file() else path.rglob("*")
    files = [file for file in inner if file.is_file()]
    return sum(file.stat().st_size for file in files)


def load_in_process(folder: Path, threads: int, runtime: str, prompt: int = PROMPT) -> Load:
    """Load a folder in a fresh process, and read a prompt of so many tokens.

    Raises CompileError with the process's last words if it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "load.json"
        command = [
            sys.executable,
            "-m",
            "gammac.runtime.probe",
            str(folder),
            str(threads),
            runtime,
            str(prompt),
            str(result),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not result.is_file():
            last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
            raise CompileError(f"{folder} can't be loaded by {runtime}: {last}")
        return Load(**json.loads(result.read_text()))
