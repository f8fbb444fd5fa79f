"""A Relax module to a shared library: TVM's passes, LLVM, and the machine's own linker."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from gammac.diagnostics import CompileError
from gammac.targets.tvm.kernels.isa import Isa

LINKERS: Final = ("cc", "gcc", "clang")
# machine → what its compilers are called, and zig's name for it
TRIPLES: Final = {
    "x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu", "riscv64": "riscv64-linux-gnu",
    "armv7l": "arm-linux-gnueabihf",
}  # fmt: skip
# no identifier and no symbols of use to nobody: equal modules are equal files
LINK_FLAGS: Final = ("-shared", "-fPIC", "-Wl,--build-id=none", "-s")


def linkers(machine: str) -> tuple[str, ...]:
    """Names of C compilers that link for a machine."""
    return LINKERS if machine == platform.machine() else (f"{TRIPLES.get(machine, machine)}-gcc",)


def find_linker(machine: str = "") -> list[str] | None:
    """The command that links a shared library for a machine (default: this one): $CC, a C compiler on the
    path, or the zig of PyPI."""
    machine = machine or platform.machine()
    names = (os.environ["CC"],) if os.environ.get("CC") else linkers(machine)
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found:
        return [found]
    if importlib.util.find_spec("ziglang") is None:
        return None
    foreign = () if machine == platform.machine() else ("-target", TRIPLES.get(machine, machine))
    return [sys.executable, "-m", "ziglang", "cc", *foreign]


def demand_linker(machine: str = "") -> list[str]:
    """Raises CompileError where nothing links: a TVM artifact is a shared library."""
    linker = find_linker(machine)
    if linker is None:
        names = ", ".join(linkers(machine or platform.machine()))
        raise CompileError(
            f"nothing here links a shared library: there is none of {names}",
            hint="install a C compiler or `pip install ziglang`, or set CC; --backend onnx needs neither",
        )
    return linker


def build_library(module: Any, isa: Isa, path: Path) -> None:
    """Compile a Relax module for an instruction set into a shared library at `path`.

    Raises CompileError with the linker's words when it fails.
    """
    build_for(isa.llvm_target(), module, isa.machine, path)


def build_for(target: dict[str, Any], module: Any, machine: str, path: Path) -> None:
    """As `build_library`, for a target as TVM spells it and a linker of `machine`."""
    import tvm  # type: ignore[import-untyped]
    from tvm import relax
    from tvm.target import Target  # type: ignore[import-untyped]

    from gammac.targets.tvm.kernels.lowering import lowering

    built_for = Target(target)
    # what generates device code asks for the target that it is within
    with lowering(), built_for:
        executable = relax.build(module, target=built_for, relax_pipeline=_pipeline(tvm, relax))
    executable.export_library(str(path), fcompile=partial(_link, machine))


def _pipeline(tvm: Any, relax: Any) -> Any:
    """From calls of kernels to the VM's instructions. Nothing is legalized: every kernel is ours."""
    names = (
        "ToNonDataflow", "RemovePurityChecking", "CallTIRRewrite", "StaticPlanBlockMemory",
        "LowerAllocTensor", "LowerRuntimeBuiltin", "ComputePrimValue", "VMShapeLower",
    )  # fmt: skip
    passes = [getattr(relax.transform, name)() for name in names]
    in_order = tvm.transform.module_pass(lambda module, _: _sizes_in_order(tvm, module), opt_level=0)
    return tvm.transform.Sequential([*passes, in_order, relax.transform.AttachGlobalSymbol()])


def _sizes_in_order(tvm: Any, module: Any) -> Any:
    """The function that computes sizes for a number of rows, its stores by place: TVM writes them by the
    order of addresses, which differs from run to run. None reads what another one writes."""
    for name, function in module.functions.items():
        body = getattr(function, "body", None)
        if isinstance(body, tvm.tirx.SeqStmt) and "tirx.is_host_func" in (function.attrs or {}):
            stores = sorted(body, key=lambda store: int(store.indices[0]))
            module.update_func(name, function.with_body(tvm.tirx.SeqStmt(stores)))
    return module


def _link(machine: str, output: str, objects: Sequence[str], **_: Any) -> None:
    command = [*demand_linker(machine), *LINK_FLAGS, "-o", output, *objects]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{command[0]} does not link the model:\n{done.stderr}", hint="set CC to another")
