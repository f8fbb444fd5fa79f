"""A TVM artifact for another machine, run by the C++ runner under qemu-user: slow, but itself."""

import platform
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import numpy as np

from gammac.cache import key_of
from gammac.diagnostics import CompileError
from gammac.runtime.session import Logits, Tokens, check_room
from gammac.targets.tvm.description import parse_description
from gammac.targets.tvm.names import DESCRIPTION_NAME
from gammac.targets.tvm.runner import NAME, build_runner, source_digest
from gammac.targets.tvm.toolchain import MACHINES, find_emulator

ANY_CORE: Final = "max"  # qemu's name for a core that has everything


class NotEmulated(CompileError):
    """Nothing is known of the artifact: it could not be run at all."""


class EmulatedSession:
    """A decoder, one whole sequence at a time.

    Raises NotEmulated where there is no emulator, or no runner for the machine can be made: `cache` keeps it,
    and TVM's wheels for the machine lie in `cache`/wheels. A missing instruction raises it later.
    """

    kind = "decoder"

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self._about = parse_description((folder / DESCRIPTION_NAME).read_text(encoding="utf-8"))
        machine = self._about.arch
        emulator = find_emulator(machine) if machine != platform.machine() else None
        if emulator is None:
            raise NotEmulated(f"no emulator of {machine} is here", hint="apt-get install qemu-user-static")
        self.core = _core(emulator, self._about.code.get("cpu", ""))
        self.emulator = Path(emulator).name
        place = cache / "runners" / key_of(machine, self._about.tvm, source_digest())[:16]
        runner = place / NAME if (place / NAME).exists() else _built(place, machine, cache / "wheels")
        root = f"/usr/{MACHINES[machine].triple}"
        self._command = [emulator, "-cpu", self.core, *(("-L", root) if Path(root).is_dir() else ())]
        self._command += [str(runner), str(folder), "--threads", "1"]
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
        """The likeliest tokens behind some, from the runner's own cache."""
        said = self._said("--new", str(count), *map(str, tokens))
        return [int(line) for line in said.split()]

    def _run(self, tokens: list[int]) -> Logits:
        found = np.frombuffer(self._said("--logits", *map(str, tokens)), np.float32)
        return found.reshape(len(tokens), self.vocab_size)

    def _said(self, *arguments: str) -> bytes:
        done = subprocess.run([*self._command, *arguments], capture_output=True, check=False)
        if done.returncode in (-signal.SIGILL, 128 + signal.SIGILL):
            raise NotEmulated(f"{self.emulator} -cpu {self.core} lacks an instruction of it")
        if done.returncode != 0:
            words = done.stderr.decode(errors="replace").strip() or f"it ended with {done.returncode}"
            raise CompileError(f"the artifact does not run under {self.emulator} -cpu {self.core}: {words}")
        return done.stdout


def _core(emulator: str, core: str) -> str:
    """The core itself if the emulator knows it."""
    known = subprocess.run([emulator, "-cpu", "help"], capture_output=True, text=True, check=False)
    return core if core in known.stdout.split() else ANY_CORE


def _built(place: Path, machine: str, wheels: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=place.parent))
    try:
        build_runner(work, machine, wheels)
        if not place.exists():  # else another process was faster
            work.rename(place)
    except CompileError as error:
        raise NotEmulated(str(error)) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return place / NAME
