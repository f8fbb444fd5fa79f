"""A Relax module to a shared library: TVM's passes, LLVM, and a linker for the target's machine."""

import shutil
import subprocess
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Final

from gammac.diagnostics import CompileError
from gammac.targets.tvm.kernels.isa import Isa
from gammac.targets.tvm.toolchain import demand_linker

# no identifier and no symbols of use to nobody: equal modules are equal files
LINK_FLAGS: Final = ("-shared", "-fPIC", "-Wl,--build-id=none", "-s")

BYTECODE: Final = "devc.o"  # TVM's name for what its virtual machine reads


def demand_core(isa: Isa) -> None:
    """Raise CompileError for a core that LLVM doesn't know, or that lacks what the kernels count on."""
    from tvm.target import Target, codegen  # type: ignore[import-untyped]

    told = isa.llvm_target()
    core = str(told.pop("mcpu"))
    known = [str(name) for name in codegen.llvm_get_cpu_archlist(Target({**told, "mattr": []}))]
    if core not in known:
        near = get_close_matches(core, known, 3) or known
        raise CompileError(
            f"there is no core {core!r} for {told['mtriple']}", hint=f"LLVM knows {', '.join(near)}"
        )
    lacks = sorted(isa.features - core_features(isa))
    if lacks:
        raise CompileError(
            f"{core} lacks {', '.join(lacks)}, which the kernels of {isa.name} use",
            hint=f"choose another arch, or write features = {[f'+{name}' for name in lacks]} if it has them",
        )


def core_features(isa: Isa) -> frozenset[str]:
    """What LLVM takes the core to have, in its own names."""
    from tvm.target import Target, codegen

    return frozenset(str(name) for name in codegen.llvm_get_cpu_features(Target(isa.llvm_target())))


def build_library(module: Any, isa: Isa, path: Path, kept: Path | None = None) -> None:
    """Compile a Relax module for an instruction set into a shared library at `path`.

    Object files of the kernels stay in the folder `kept`, if there is one.
    Raises CompileError with the linker's words when it fails.
    """
    build_for(isa.llvm_target(), module, isa.machine, path, kept)


def build_for(
    target: dict[str, Any], module: Any, machine: str, path: Path, kept: Path | None = None
) -> None:
    """As `build_library`, for a target as TVM spells it and a linker of `machine`."""
    import tvm  # type: ignore[import-untyped]
    from tvm import relax
    from tvm.target import Target

    from gammac.targets.tvm.kernels.lowering import lowering

    built_for = Target(target)
    # what generates device code asks for the target that it is within
    with lowering(), built_for:
        executable = relax.build(module, target=built_for, relax_pipeline=_pipeline(tvm, relax))
    executable.export_library(str(path), fcompile=partial(_link, machine, kept))


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


def _link(machine: str, kept: Path | None, output: str, objects: Sequence[str], **_: Any) -> None:
    command = [*demand_linker(machine), *LINK_FLAGS, "-o", output, *objects]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{command[0]} does not link the model:\n{done.stderr}", hint="set CC to another")
    if kept is not None:
        for kernels in (path for path in objects if Path(path).name != BYTECODE):
            shutil.copy(kernels, kept)
