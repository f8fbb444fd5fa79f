"""nvcc: found, or what is missing named; CUDA source to a fat binary, with what the assembler says of it."""

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gammac.diagnostics import CompileError

FOLDERS: Final = ("CUDA_HOME", "CUDA_PATH")
USUAL: Final = "/usr/local/cuda"
INSTALL: Final = "pip install 'gammac[cuda]', which brings it from PyPI, or install the CUDA toolkit"
# FMA contraction is on by default; divisions and roots stay exact
FLAGS: Final = (
    "-O3",
    "--fatbin",
    "-Xptxas=-v",
    "--threads=0",
    "--disable-warnings",
    "--keep",
    "--keep-dir=.",
)
SOURCE, BINARY = "kernels.cu", "kernels.fatbin"
# an architecture is sm_80 (machine code) or compute_90 (PTX, which later GPUs' drivers translate)
REAL, VIRTUAL = "sm_", "compute_"
_PTX_OF: Final = re.compile(r"^\.target sm_(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """A fat binary, the words of the assembler, and the PTX by virtual architecture."""

    binary: bytes
    said: str
    ptx: Mapping[str, str]


def find_nvcc() -> Path | None:
    """$CUDACXX, nvcc on the path, in $CUDA_HOME or the usual place, or in a package of PyPI."""
    named = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if named:
        return Path(named)
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    folders = [Path(os.environ[name]) for name in FOLDERS if os.environ.get(name)]
    folders += [Path(USUAL), packages / "cuda_nvcc", *sorted(packages.glob("cu[0-9]*"), reverse=True)]
    found = (folder / "bin" / "nvcc" for folder in folders)
    return next((path for path in found if path.is_file()), None)


def demand_nvcc() -> Path:
    """Raises CompileError where device code can't be compiled."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise CompileError("a CUDA artifact needs nvcc, and there is none", hint=INSTALL)
    return nvcc


def check_archs(archs: Sequence[str]) -> None:
    """Raise CompileError for what is no architecture, and for none at all."""
    wrong = [a for a in archs if not re.fullmatch(rf"({REAL}|{VIRTUAL})\d\d+", a)]
    if wrong or not archs:
        said = f"{', '.join(wrong)} is no GPU architecture" if wrong else "no GPU architecture is asked for"
        raise CompileError(said, hint="write sm_80 for machine code, compute_90 for PTX")


def compile_source(source: str, archs: Sequence[str]) -> Compiled:
    """CUDA C++ to a fat binary for some architectures. Raises CompileError with nvcc's words."""
    command = [str(demand_nvcc()), *FLAGS, *(f"-gencode={_gencode(a)}" for a in archs), "-o", BINARY, SOURCE]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / SOURCE).write_text(source, encoding="utf-8")
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CompileError(
                f"{command[0]} does not compile the kernels:\n{done.stderr.strip()}",
                hint="it needs a C++ compiler, and must know the architectures",
            )
        texts = [path.read_text() for path in sorted(Path(folder).glob("*.ptx"))]
        ptx = {f"{VIRTUAL}{found[1]}": text for text in texts if (found := _PTX_OF.search(text))}
        return Compiled((Path(folder) / BINARY).read_bytes(), done.stderr, ptx)


def _gencode(arch: str) -> str:
    number = arch.removeprefix(REAL).removeprefix(VIRTUAL)
    return f"arch={VIRTUAL}{number},code={arch}"
