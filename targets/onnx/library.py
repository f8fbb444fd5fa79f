"""The operator library, built once for its sources and the compiler, then copied."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from gammac.cache import key_of
from gammac.diagnostics import CompileError
from gammac.files import write_atomically
from gammac.targets.onnx.any_bits import SOURCES, CompileFailed, build_library, find_compiler, library_name


def library_builder(cache: Path) -> Callable[[Path], Path]:
    """A function that puts the library into a folder; what was built before comes from `cache`.

    It raises CompileError with the compiler's words when the sources don't build.
    """

    def build(folder: Path) -> Path:
        kept = cache / _key() / library_name()
        if not kept.is_file():
            try:
                write_atomically(kept, build_library(folder).read_bytes())
            except CompileFailed as error:
                raise CompileError(
                    f"{find_compiler()} does not build the operator library:\n{error}",
                    hint="set CXX to another C++17 compiler, or give --portable",
                ) from error
        return Path(shutil.copyfile(kept, folder / library_name()))

    return build


def _key() -> str:
    compiler = find_compiler() or "none"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [path.read_text() for path in sorted(SOURCES.iterdir()) if path.is_file()]
    return key_of(compiler, version, *sources)
