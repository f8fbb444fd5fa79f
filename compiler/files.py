"""Writing files so that a killed process or a full disk never leaves half of one behind."""

import os
import tempfile
from pathlib import Path

from gammac.diagnostics import CompileError


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename. Raises CompileError naming the path when it can't."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise CompileError(f"{path} can't be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes files that only their owner can read; an artifact is to be shared
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise CompileError(
            f"{path} can't be written: {error.strerror}",
            hint="free some disk space, or choose another folder",
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
