"""One load in a process of its own: seconds to the first token, peak resident memory.

    python -m gammac.runtime.probe PATH THREADS RUNTIME PROMPT RESULT.json

The answer goes to a file. Only what running needs is imported, so that the memory is the runtime's.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from gammac.runtime.peers import IMPORTS, RUNTIMES

PROMPT: Final = 32
NEW: Final = 8


@dataclass(frozen=True)
class Load:
    """Seconds from opening the folder to the first token after a prompt; peak bytes resident, and how many of
    them came after the runtime's imports."""

    first_token_seconds: float
    peak_rss_bytes: int
    added_bytes: int


def peak_rss_bytes() -> int:
    """The most memory this process has had resident.

    getrusage counts the parent's memory in, from before this program was started; Linux's VmHWM doesn't.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(path: Path, threads: int, runtime: str, prompt: int = PROMPT) -> Load:
    """Load, read a prompt, write a few tokens; the clock starts behind the import of a peer's package."""
    if runtime in IMPORTS:
        IMPORTS[runtime]()
    before, started = peak_rss_bytes(), time.perf_counter()
    runner = RUNTIMES[runtime](path, threads, True)
    runner.prefill_seconds(prompt)
    first_token = time.perf_counter() - started
    runner.decode_seconds(prompt, NEW)
    peak = peak_rss_bytes()
    return Load(first_token, peak, peak - before)


if __name__ == "__main__":
    load = measure(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    Path(sys.argv[5]).write_text(json.dumps(asdict(load)))
