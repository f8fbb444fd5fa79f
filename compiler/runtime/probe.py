"""One load in a process of its own: seconds to the first token, peak resident memory.

    python -m gammac.runtime.probe PATH THREADS RUNTIME RESULT.json

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
    """Seconds from opening the folder to the first token after a prompt of 32; peak bytes resident."""

    first_token_seconds: float
    peak_rss_bytes: int


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


def measure(path: Path, threads: int, runtime: str) -> Load:
    """Load, read a prompt, write a few tokens; the clock starts behind the import of a peer's package."""
    if runtime in IMPORTS:
        IMPORTS[runtime]()
    started = time.perf_counter()
    runner = RUNTIMES[runtime](path, threads, True)
    runner.prefill_seconds(PROMPT)
    first_token = time.perf_counter() - started
    runner.decode_seconds(PROMPT, NEW)
    return Load(first_token, peak_rss_bytes())


if __name__ == "__main__":
    load = measure(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    Path(sys.argv[4]).write_text(json.dumps(asdict(load)))
