"""The runner in C++: artifacts without Python. `python -m gammac.targets.tvm.runner FOLDER` builds it."""

import shutil
import subprocess
import sysconfig
import tempfile
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from gammac.diagnostics import CompileError
from gammac.targets.tvm.names import INSTALL
from gammac.targets.tvm.runner.unicode import tables

NAME: Final = "gammac-run"
LIBRARIES: Final = (("tvm_ffi", "libtvm_ffi.so"), ("tvm", "libtvm_runtime.so"))
FLAGS: Final = ("-std=c++17", "-O2", "-Wall", "-Wl,--build-id=none", "-s")
COMPILERS: Final = ("c++", "g++", "clang++")


def build_runner(folder: Path) -> Path:
    """Compile `gammac-run` into a folder, with TVM's two runtime libraries beside it; returns its path.

    Raises CompileError where there is no compiler or no TVM, and with the compiler's words when it fails.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise CompileError(f"no C++ compiler: there is none of {', '.join(COMPILERS)}", hint="install one")
    try:
        tvm = version("apache-tvm")
    except PackageNotFoundError as error:
        raise CompileError("the runner needs TVM's runtime", hint=INSTALL) from error
    packages = Path(sysconfig.get_path("platlib"))
    folder.mkdir(parents=True, exist_ok=True)
    libraries = [Path(shutil.copy(packages / package / "lib" / name, folder)) for package, name in LIBRARIES]
    made = folder / NAME
    sources_of = resources.as_file(resources.files("gammac.targets.tvm.runner"))
    with sources_of as sources, tempfile.TemporaryDirectory() as generated:
        Path(generated, "unicode.inc").write_text(tables(), encoding="ascii")
        command = [
            compiler, *FLAGS, f'-DGAMMAC_TVM="{tvm}"', f"-I{packages / 'tvm_ffi' / 'include'}",
            f"-I{generated}",
            *map(str, sorted(sources.glob("*.cc"))), "-o", str(made), *map(str, libraries),
            # only the registrations of the runtime are wanted, and no symbol of it is named
            "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN", "-pthread",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{compiler} does not build the runner:\n{done.stderr}")
    return made
