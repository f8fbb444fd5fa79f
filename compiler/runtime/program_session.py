"""A decoder that another program runs, one whole sequence at a time."""

import platform
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from gammac.diagnostics import CompileError
from gammac.runtime.session import Logits, Tokens, check_room
from gammac.targets.tvm.description import Description
from gammac.targets.tvm.toolchain import MACHINES, find_emulator

LIBRARIES: Final = "-L"  # qemu's option


class NotEmulated(CompileError):
    """Nothing is known of the artifact: it could not be run at all."""


class ProgramSession:
    """`command` takes token ids and `--logits` or `--new N`, as the runner in C++ does; `place` is where it
    runs, in words.

    A missing instruction raises NotEmulated.
    """

    kind = "decoder"

    def __init__(self, about: Description, command: Sequence[str], place: str) -> None:
        self._about, self._command, self.place = about, list(command), place
        self._read: list[int] = []

    @property
    def vocab_size(self) -> int:
        """Numbers in a row of the output."""
        return self._about.vocab_size

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self._about.context

    def logits(self, tokens: Tokens) -> Logits:
        """Output f32 [batch, seq, vocab] of tokens i64 [batch, seq]."""
        check_room(tokens.shape[1], self.context)
        return np.stack([self._run(row.tolist()) for row in tokens])

    def prefill(self, tokens: Tokens) -> Logits:
        """Append tokens i64 [seq]; logits f32 [vocab] after the last of them. All are read again."""
        self._read += tokens.tolist()
        check_room(len(self._read), self.context)
        last: Logits = self._run(self._read)[-1]
        return last

    def decode(self, token: int) -> Logits:
        """Append one token; logits f32 [vocab] after it."""
        return self.prefill(np.array([token], np.int64))

    def reset(self, capacity: int | None = None) -> None:
        """Forget what was read."""
        self._read = []

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The likeliest tokens behind some, from the program's own cache."""
        said = self._said("--new", str(count), *map(str, tokens))
        return [int(line) for line in said.split()]

    def _run(self, tokens: list[int]) -> Logits:
        found = np.frombuffer(self._said("--logits", *map(str, tokens)), np.float32)
        return found.reshape(-1, self.vocab_size)

    def _said(self, *arguments: str) -> bytes:
        done = subprocess.run([*self._command, *arguments], capture_output=True, check=False)
        if done.returncode in (-signal.SIGILL, 128 + signal.SIGILL):
            raise NotEmulated(f"{self.place} an instruction of it is missing")
        if done.returncode != 0:
            words = done.stderr.decode(errors="replace").strip() or f"it ended with {done.returncode}"
            raise CompileError(f"the artifact does not run {self.place}: {words}")
        return done.stdout


def emulation(machine: str, core: str) -> list[str]:
    """What runs another machine's programs, on a core or, where it is unknown, on one that has everything;
    with LIBRARIES, and that machine's libraries, if they are here.

    Raises NotEmulated where there is no emulator.
    """
    emulator = find_emulator(machine) if machine != platform.machine() else None
    if emulator is None:
        raise NotEmulated(f"no emulator of {machine} is here", hint="apt-get install qemu-user-static")
    known = subprocess.run([emulator, "-cpu", "help"], capture_output=True, text=True, check=False)
    about = MACHINES[machine]
    libraries = (LIBRARIES, f"/usr/{about.triple}") if Path("/usr", about.triple).is_dir() else ()
    return [emulator, *libraries, "-cpu", core if core in known.stdout.split() else about.any_core]


def place_of(command: Sequence[str]) -> str:
    """Where what `emulation` runs is run, in words; no command is this machine itself."""
    return " ".join(["under", Path(command[0]).name, *command[-2:]]) if command else "on this machine"
