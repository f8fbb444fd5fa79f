"""The runner in C++: artifacts without Python. `python -m gammac.targets.tvm.runner FOLDER` builds it."""

import hashlib
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import zipfile
from collections.abc import Mapping
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from gammac.diagnostics import CompileError
from gammac.targets.tvm.names import INSTALL
from gammac.targets.tvm.runner.unicode import tables
from gammac.targets.tvm.toolchain import CXX, demand_linker

NAME: Final = "gammac-run"
# package → its library, and where that lies in a wheel
LIBRARIES: Final[Mapping[str, str]] = {
    "apache-tvm-ffi": "tvm_ffi/lib/libtvm_ffi.so",
    "apache-tvm": "tvm/lib/libtvm_runtime.so",
}
FLAGS: Final = ("-std=c++17", "-O2", "-Wall", "-Wl,--build-id=none", "-s")
# machine → the tag of the wheels that PyPI has for it
WHEELS: Final = {"x86_64": "manylinux_2_28_x86_64", "aarch64": "manylinux_2_28_aarch64"}


def build_runner(folder: Path, machine: str = "", wheels: Path | None = None) -> Path:
    """Compile `gammac-run` into a folder, with TVM's two runtime libraries beside it; returns its path.

    For another machine than this one, the libraries come out of TVM's wheels for it, in the folder `wheels`.
    Raises CompileError where there is no compiler, no TVM or no such wheel, and with the compiler's words.
    """
    machine = machine or platform.machine()
    tvm = _versions()["apache-tvm"]
    compiler = demand_linker(machine, CXX)
    folder.mkdir(parents=True, exist_ok=True)
    libraries = runtime_libraries(folder, machine, wheels)
    made = folder / NAME
    sources_of = resources.as_file(resources.files("gammac.targets.tvm.runner"))
    with sources_of as sources, tempfile.TemporaryDirectory() as generated:
        Path(generated, "unicode.inc").write_text(tables(), encoding="ascii")
        command = [
            *compiler, *FLAGS, f'-DGAMMAC_TVM="{tvm}"', f"-I{_packages() / 'tvm_ffi' / 'include'}",
            f"-I{generated}",
            *map(str, sorted(sources.glob("*.cc"))), "-o", str(made), *map(str, libraries),
            # only the registrations of the runtime are wanted, and no symbol of it is named
            "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN", "-pthread",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{compiler[0]} does not build the runner:\n{done.stderr}")
    return made


def source_digest() -> str:
    """Of the runner's sources, so that a runner that is kept is the one that belongs to this gammac."""
    files = sorted(resources.files("gammac.targets.tvm.runner").iterdir(), key=lambda file: file.name)
    texts = [file.read_bytes() for file in files if file.name.endswith((".cc", ".h"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()


def runtime_libraries(folder: Path, machine: str, wheels: Path | None) -> list[Path]:
    """Copies of TVM's runtime for a machine. Raises CompileError where it is not at hand."""
    if machine == platform.machine():
        return [Path(shutil.copy(_packages() / place, folder)) for place in LIBRARIES.values()]
    found = {package: find_wheel(package, machine, wheels) for package in LIBRARIES}
    return [_unpack(found[package], place, folder) for package, place in LIBRARIES.items()]


def find_wheel(package: str, machine: str, wheels: Path | None) -> Path:
    """The wheel of a package for a machine, of the version that is installed here. Raises CompileError."""
    versions = _versions()
    if machine not in WHEELS:
        raise CompileError(
            f"TVM has no runtime for {machine} on PyPI", hint=f"the runner is for {' and '.join(WHEELS)}"
        )
    stem = f"{package.replace('-', '_')}-{versions[package]}-"
    found = sorted(wheels.glob(f"{stem}*{machine}.whl")) if wheels else []
    if not found:
        wanted = " ".join(f"{name}=={number}" for name, number in versions.items())
        raise CompileError(
            f"there is no wheel {stem}*{machine}.whl in {wheels or 'any folder'}",
            hint=f"pip download --no-deps --only-binary=:all: --platform {WHEELS[machine]} "
            f"-d {wheels or 'wheels'} {wanted}, then name that folder",
        )
    return found[0]


def _unpack(wheel: Path, place: str, folder: Path) -> Path:
    made = folder / Path(place).name
    with zipfile.ZipFile(wheel) as archive:
        made.write_bytes(archive.read(place))
    return made


def _versions() -> dict[str, str]:
    try:
        return {package: version(package) for package in LIBRARIES}
    except PackageNotFoundError as error:
        raise CompileError("the runner needs TVM's runtime", hint=INSTALL) from error


def _packages() -> Path:
    return Path(sysconfig.get_path("platlib"))
