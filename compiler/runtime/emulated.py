"""A TVM artifact for another machine, run by the C++ runner under qemu-user: slow, but itself."""

import shutil
import tempfile
from pathlib import Path

from gammac.cache import key_of
from gammac.diagnostics import CompileError
from gammac.runtime.program_session import NotEmulated, ProgramSession, emulation, place_of
from gammac.targets.tvm.description import parse_description
from gammac.targets.tvm.names import DESCRIPTION_NAME
from gammac.targets.tvm.runner import NAME, build_runner, source_digest


class EmulatedSession(ProgramSession):
    """Raises NotEmulated where there is no emulator, or no runner for the machine can be made: `cache` keeps
    it, and TVM's wheels for the machine lie in `cache`/wheels. A missing instruction raises it later.
    """

    def __init__(self, folder: Path, cache: Path) -> None:
        about = parse_description((folder / DESCRIPTION_NAME).read_text(encoding="utf-8"))
        machine = about.arch
        emulator = emulation(machine, about.code.get("cpu", ""))
        place = cache / "runners" / key_of(machine, about.tvm, source_digest())[:16]
        runner = place / NAME if (place / NAME).exists() else _built(place, machine, cache / "wheels")
        command = [*emulator, str(runner), str(folder), "--threads", "1"]
        super().__init__(about, command, place_of(emulator))


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
