"""An artifact's static library, run by the C example that lies beside it: here, or under qemu-user."""

import platform
import subprocess
from pathlib import Path
from typing import Final

import numpy as np

from gammac.diagnostics import CompileError
from gammac.runtime.program_session import LIBRARIES, NotEmulated, ProgramSession, emulation, place_of
from gammac.runtime.session import Logits
from gammac.runtime.tvm_session import lacking
from gammac.targets.tvm.description import parse_description
from gammac.targets.tvm.names import DESCRIPTION_NAME, EXAMPLE_NAME, PARAMS_NAME, STATIC_NAME
from gammac.targets.tvm.toolchain import demand_linker

THREADS: Final = 2
# nats at one position: sums in another order move a few inputs to the next of their 127 steps, which was 0.03
# at most on smollm2 at 3 bits; a token at a wrong position costs several
MOST_KL: Final = 0.5


class StaticSession(ProgramSession):
    """A decoder, one whole sequence at a time; the program is linked into the folder `work`.

    Raises NotEmulated where nothing here runs it, and CompileError where prefill and decode differ.
    """

    def __init__(self, folder: Path, work: Path, threads: int = THREADS) -> None:
        about = parse_description((folder / DESCRIPTION_NAME).read_text(encoding="utf-8"))
        here = about.arch == platform.machine()
        lacks = lacking(about.isa, about.arch, about.cpu_flags) if here else ""
        if lacks:
            raise NotEmulated(lacks)
        emulator = [] if here else emulation(about.arch, about.code.get("cpu", ""))
        program = work / "example"
        _link(folder, about.arch, program, static=bool(emulator) and LIBRARIES not in emulator)
        command = [*emulator, str(program), str(folder / PARAMS_NAME), "--threads", str(threads)]
        super().__init__(about, command, place_of(emulator))

    def _run(self, tokens: list[int]) -> Logits:
        """Logits of decode, after those of prefill were found to be the same."""
        *rows, whole = super()._run(tokens)
        apart = kl(rows[-1], whole)
        if not apart < MOST_KL:
            raise CompileError(
                f"the static library's prefill and decode are {apart:.3g} nats apart",
                hint="this is a fault of gammac; keep the dumps of --dump-ir and report it",
            )
        return np.stack(rows)


def kl(one: Logits, other: Logits) -> float:
    """KL(one ‖ other) of two rows of logits, in nats."""
    p, q = (row.astype(np.float64) - np.logaddexp.reduce(row, dtype=np.float64) for row in (one, other))
    return float((np.exp(p) * (p - q)).sum())


def _link(folder: Path, machine: str, program: Path, static: bool) -> None:
    linker = demand_linker(machine)
    command = [*linker, "-O1", *(["-static"] if static else []), "-o", str(program)]
    command += [str(folder / EXAMPLE_NAME), str(folder / STATIC_NAME), "-lm", "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotEmulated(f"{' '.join(linker)} does not link {STATIC_NAME}: {done.stderr.strip()}")
