"""A model as a static library and a C header: kernels, tables of calls, a runtime in C11; nothing of TVM's.

libmodel.a holds machine code for one core and belongs to one model.params, which it maps. What its runtime
does stands in `runtime.c` and `backend.c`, its interface in `gammac_model.h.in`.
"""

import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib import resources
from math import prod
from pathlib import Path
from string import Template
from typing import Any, Final

from gammac.diagnostics import CompileError
from gammac.targets.tvm.description import Description
from gammac.targets.tvm.kernels.isa import Isa
from gammac.targets.tvm.names import EXAMPLE_NAME, HEADER_NAME, STATIC_FILES, STATIC_NAME
from gammac.targets.tvm.params import ALIGNMENT
from gammac.targets.tvm.toolchain import demand_archiver, demand_linker

RUNTIME: Final = ("backend.c", "processor.c", "runtime.c")
FLAGS: Final = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden")
JOIN: Final = ("-r", "-nostdlib", "-Wl,--strip-debug", "-Wl,--discard-all", "-Wl,--build-id=none")
OBJECT: Final = "gammac_model.o"
MAGIC: Final = b"!<arch>\n"  # the first member of an archive that can be linked is its index, named /
CHUNK: Final = 128
"""Rows of a prefill at most: longer prompts are read in parts."""

# as in runtime.c
SAMPLES: Final = 256
FNV_START: Final = 0xCBF29CE484222325
FNV_PRIME: Final = 0x100000001B3


def demand_static(machine: str) -> None:
    """Raise CompileError, naming what to install, unless a static library can be made for a machine: the part
    that is the same for all models is made."""
    with tempfile.TemporaryDirectory() as folder:
        _archive(machine, Path(folder), RUNTIME[:2])


def build_static(
    module: Any, description: Description, isa: Isa, params: Path, work: Path, name: str
) -> list[Path]:
    """Write a Relax module as a static library, with its header and an example, beside its parameter file.

    The folder `work` holds the kernels' object files and takes others. `name` is the model's.
    Raises CompileError with the compiler's words where it fails.
    """
    from gammac.targets.tvm.static.plan import cache_places, padded, plan
    from gammac.targets.tvm.static.source import File, model_source

    chunk = min(CHUNK, description.context)
    plans = {f: plan(module[f], description, rows) for f, rows in (("decode", 1), ("prefill", chunk))}
    caches = sum(padded(4 * prod(place.shape)) for place in cache_places(description))
    file = File(params.stat().st_size, fingerprint(params))
    source = model_source(plans, chunk, isa.cpu_flags, file, caches)
    (work / "model.c").write_text(source, encoding="ascii")
    (work / HEADER_NAME).write_text(_header(description, isa, name), encoding="utf-8")
    (work / EXAMPLE_NAME).write_bytes(_shipped(EXAMPLE_NAME))
    _archive(isa.machine, work, (*RUNTIME, "model.c"))
    return [Path(shutil.copy(work / made, params.parent)) for made in STATIC_FILES]


def fingerprint(path: Path) -> int:
    """FNV-1a, in 64 bits, of SAMPLES blocks that lie evenly in a file."""
    blocks, digest = -(-path.stat().st_size // ALIGNMENT), FNV_START
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(blocks * i // SAMPLES * ALIGNMENT)
            for byte in file.read(ALIGNMENT):
                digest = (digest ^ byte) * FNV_PRIME % 2**64
    return digest


def _header(description: Description, isa: Isa, name: str) -> str:
    return Template(_shipped(f"{HEADER_NAME}.in").decode()).substitute(
        model=name, triple=isa.code["triple"], cpu=isa.code["cpu"], vocab_size=description.vocab_size,
        context=description.context,
    )  # fmt: skip


def _shipped(name: str) -> bytes:
    return resources.files("gammac.targets.tvm.static").joinpath(name).read_bytes()


def _archive(machine: str, work: Path, sources: Sequence[str]) -> None:
    """Compile sources in `work`, by bare names so that objects hold no path, and make STATIC_NAME of all
    objects there, as one, without TVM's debug information."""
    compiler, archiver = demand_linker(machine), demand_archiver(machine)
    for name in (*RUNTIME, "tables.h"):
        (work / name).write_bytes(_shipped(name))
    _run([*compiler, *FLAGS, "-c", f"-I{_headers()}", *sources], work)
    objects = sorted(path.name for path in work.glob("*.o"))
    _run([*compiler, *JOIN, "-o", OBJECT, *objects], work)
    # D: no times and no users
    _run([*archiver, "rcsD", STATIC_NAME, OBJECT], work)
    if (work / STATIC_NAME).read_bytes()[len(MAGIC) : len(MAGIC) + 1] != b"/":
        raise CompileError(
            f"{archiver[0]} finds no symbols in objects for {machine}",
            hint="set AR to the archiver of a cross compiler, or unset it",
        )


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(
            f"{Path(command[0]).name} does not make the static library:\n{done.stderr}",
            hint="is the C library of the machine installed? Or set CC and AR to another compiler's",
        )


def _headers() -> Path:
    """TVM's declarations of tensors and arguments: they are read here, and not where the library is used."""
    return Path(sysconfig.get_path("platlib")) / "tvm_ffi" / "include"
