"""Compilers that link for a machine, this one or another: which there are, and what installs one."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from gammac.diagnostics import CompileError

C, CXX = "c", "c++"
# of this machine, the first that is there; and the last part of a cross compiler's name, and of zig's
_NATIVE: Final = {C: ("cc", "gcc", "clang"), CXX: ("c++", "g++", "clang++")}
_CROSS: Final = {C: "gcc", CXX: "g++"}
_ZIG: Final = {C: "cc", CXX: "c++"}
_VARIABLE: Final = {C: "CC", CXX: "CXX"}
_ELF_MACHINE: Final = 18  # where a file's header says what it is for


@dataclass(frozen=True)
class Machine:
    """`triple` stands in the names of its compilers; `elf` is e_machine of its files; `qemu` runs them, on
    `any_core` where it doesn't know a target's."""

    triple: str
    elf: int
    qemu: str
    any_core: str = "max"

    @property
    def package(self) -> str:
        """Debian's."""
        return f"g++-{self.triple.replace('_', '-')}"


# by platform.machine()
MACHINES: Final = {
    "x86_64": Machine("x86_64-linux-gnu", 62, "qemu-x86_64"),
    "aarch64": Machine("aarch64-linux-gnu", 183, "qemu-aarch64"),
    "riscv64": Machine(
        "riscv64-linux-gnu", 243, "qemu-riscv64", "rv64,v=true,vlen=256,elen=64,vext_spec=v1.0"
    ),
    "armv7l": Machine("arm-linux-gnueabihf", 40, "qemu-arm"),
}


def compilers(machine: str, language: str = C) -> tuple[str, ...]:
    """Names of compilers that link for a machine."""
    if machine == platform.machine():
        return _NATIVE[language]
    return (f"{MACHINES[machine].triple}-{_CROSS[language]}",) if machine in MACHINES else ()


def find_linker(machine: str = "", language: str = C) -> list[str] | None:
    """The command that links for a machine (default: this one): $CC or $CXX, a compiler on the path, or the
    zig of PyPI. For another machine it is tried first: a host's $CC is no cross compiler."""
    machine = machine or platform.machine()
    if machine == platform.machine():
        return next(_commands(machine, language), None)
    return next((found for found in _commands(machine, language) if links(tuple(found), machine)), None)


def _commands(machine: str, language: str) -> Iterator[list[str]]:
    """What there is on this machine, the user's own choice first."""
    named = os.environ.get(_VARIABLE[language])
    native = machine == platform.machine()
    names = (named,) if named and native else (named or "", *compilers(machine, language))
    yield from ([path] for name in names if (path := shutil.which(name)))
    if importlib.util.find_spec("ziglang") is not None:
        where = () if native or machine not in MACHINES else ("-target", MACHINES[machine].triple)
        yield [sys.executable, "-m", "ziglang", _ZIG[language], *where]


@cache
def links(command: tuple[str, ...], machine: str) -> bool:
    """Whether a command makes a shared library for a machine: it is tried on a line of C."""
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "line.c", Path(folder) / "line.so"
        source.write_text("int line;\n")
        tried = [*command, "-shared", "-fPIC", "-o", str(made), str(source)]
        done = subprocess.run(tried, capture_output=True, check=False)
        return done.returncode == 0 and elf_machine(made) == MACHINES[machine].elf


def elf_machine(path: Path) -> int:
    """e_machine of an ELF file; 0 for any other."""
    head = path.read_bytes()[: _ELF_MACHINE + 2] if path.exists() else b""
    return int.from_bytes(head[_ELF_MACHINE:], "little") if head.startswith(b"\x7fELF") else 0


def demand_linker(machine: str = "", language: str = C) -> list[str]:
    """Raises CompileError where nothing links for a machine, naming what to install."""
    linker = find_linker(machine, language)
    if linker is not None:
        return linker
    machine, variable = machine or platform.machine(), _VARIABLE[language]
    there = f"there is none of {', '.join(compilers(machine, language)) or 'any known name'}"
    if machine == platform.machine():
        other = "; --backend onnx needs neither" if language == C else ""
        raise CompileError(
            f"nothing here links a shared library: {there}",
            hint=f"install a {language.upper()} compiler or `pip install ziglang`, or set {variable}{other}",
        )
    package = f"`apt-get install {MACHINES[machine].package}`" if machine in MACHINES else "a cross compiler"
    raise CompileError(
        f"nothing here links for {machine}: {there} that works",
        hint=f"{package} or `pip install ziglang`, or set {variable} to a cross compiler",
    )


def demand_archiver(machine: str) -> list[str]:
    """The command that makes static libraries for a machine: $AR, the one of its compiler, LLVM's or zig's.

    Raises CompileError without one, naming what to install.
    """
    native = machine == platform.machine()
    usual = "ar" if native else f"{MACHINES[machine].triple}-ar"
    found = next(filter(None, map(shutil.which, (os.environ.get("AR", ""), usual, "llvm-ar"))), None)
    if found is not None:
        return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "ar"]
    package = "binutils" if native else f"binutils-{MACHINES[machine].triple.replace('_', '-')}"
    raise CompileError(
        f"nothing here makes a static library for {machine}: there is no {usual}",
        hint=f"`apt-get install {package}` or `pip install ziglang`, or set AR",
    )


def find_emulator(machine: str) -> str | None:
    """qemu-user for a machine, if it is installed."""
    if machine not in MACHINES:
        return None
    name = MACHINES[machine].qemu
    return shutil.which(f"{name}-static") or shutil.which(name)
