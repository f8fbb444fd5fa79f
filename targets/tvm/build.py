"""A Relax module to a shared library: TVM's passes, LLVM, and the machine's own linker."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gammac.diagnostics import CompileError
from gammac.targets.tvm.kernels.isa import Isa

LINKERS: Final = ("cc", "gcc", "clang")
# no identifier and no symbols of use to nobody: equal modules are equal files
LINK_FLAGS: Final = ("-shared", "-fPIC", "-Wl,--build-id=none", "-s")


def find_linker() -> list[str] | None:
    """The command that links a shared library: $CC, a C compiler on the path, or the zig of PyPI."""
    names = (os.environ["CC"],) if os.environ.get("CC") else LINKERS
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found:
        return [found]
    return [sys.executable, "-m", "ziglang", "cc"] if importlib.util.find_spec("ziglang") else None


def demand_linker() -> list[str]:
    """Raises CompileError where nothing links: a TVM artifact is a shared library."""
    linker = find_linker()
    if linker is None:
        raise CompileError(
            f"nothing here links a shared library: there is none of {', '.join(LINKERS)}",
            hint="install a C compiler or `pip install ziglang`, or set CC; --backend onnx needs neither",
        )
    return linker


def build_library(module: Any, isa: Isa, path: Path) -> None:
    """Compile a Relax module for an instruction set into a shared library at `path`.

    Raises CompileError with the linker's words when it fails.
    """
    import tvm  # type: ignore[import-untyped]
    from tvm import relax
    from tvm.target import Target  # type: ignore[import-untyped]

    from gammac.targets.tvm.kernels.lowering import lowering

    with lowering():
        pipeline = _pipeline(tvm, relax)
        executable = relax.build(module, target=Target(isa.llvm_target()), relax_pipeline=pipeline)
    executable.export_library(str(path), fcompile=_link)


def _pipeline(tvm: Any, relax: Any) -> Any:
    """From calls of kernels to the VM's instructions. Nothing is legalized: every kernel is ours."""
    names = (
        "ToNonDataflow", "RemovePurityChecking", "CallTIRRewrite", "StaticPlanBlockMemory",
        "LowerAllocTensor", "LowerRuntimeBuiltin", "ComputePrimValue", "VMShapeLower", "AttachGlobalSymbol",
    )  # fmt: skip
    return tvm.transform.Sequential([getattr(relax.transform, name)() for name in names])


def _link(output: str, objects: Sequence[str], **_: Any) -> None:
    command = [*demand_linker(), *LINK_FLAGS, "-o", output, *objects]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{command[0]} does not link the model:\n{done.stderr}", hint="set CC to another")
