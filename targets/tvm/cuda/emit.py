"""Write a legalized decoder for NVIDIA GPUs: a fat binary of its kernels in model.so, and beside it, in
`kernels.json`, what is known of each kernel without a GPU.

`emulate` writes the same kernels as loops for this machine's processor, on the same parameters.
"""

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from gammac.diagnostics import CompileError
from gammac.ir import Module
from gammac.targets.tvm.build import build_for, build_library
from gammac.targets.tvm.cuda.kernels import CudaDevice
from gammac.targets.tvm.cuda.loader import load_cuda
from gammac.targets.tvm.cuda.report import KernelReport, read_report, to_json
from gammac.targets.tvm.cuda.toolkit import REAL, VIRTUAL, compile_source
from gammac.targets.tvm.description import parse_description
from gammac.targets.tvm.emit import refuse_unknown, write_program
from gammac.targets.tvm.kernels.isa import ISAS, Isa, host_isa
from gammac.targets.tvm.names import DESCRIPTION_NAME, KERNELS_NAME, LIBRARY_NAME, MODEL_FILES, PARAMS_NAME
from gammac.targets.tvm.params import ParamFile, WrittenParams
from gammac.targets.tvm.toolchain import demand_linker
from gammac.weights import WeightStore

CALLBACK: Final = "tvm_callback_cuda_compile"
# the functions that launch the kernels: any processor of the machine that compiles
_HOSTS: Final = {"x86_64": "generic", "aarch64": "neon"}
_LIMITS: Final = {
    "max_threads_per_block": 1024, "max_shared_memory_per_block": 49152, "thread_warp_size": 32,
}  # fmt: skip


def launcher_isa() -> Isa:
    """Raises CompileError for a machine that no GPU artifact is written for."""
    machine = platform.machine()
    if machine not in _HOSTS:
        raise CompileError(
            f"CUDA artifacts run beside a processor of {' or '.join(_HOSTS)}, this is {machine}",
            hint="compile on such a machine",
        )
    return ISAS[_HOSTS[machine]]


def emit(module: Module, store: WeightStore, folder: Path, archs: Sequence[str]) -> list[Path]:
    """The files of the artifact's model, in `folder`, for CUDA architectures such as sm_80 and compute_90.

    Raises CompileError for an op that has no kernel, and where there is no nvcc or no linker.
    """
    refuse_unknown(module)
    host = launcher_isa()
    load_cuda(demand_linker(host.machine))
    paths = [folder / name for name in (*MODEL_FILES, KERNELS_NAME)]
    with ParamFile(paths[1]) as data:
        written = write_program(module, store, data, CudaDevice(gpu=True))
    with device_compiler(archs) as reports:
        build_for(target_for(archs, host), written.module, host.machine, paths[0])
    described = replace(written.description, isa=host.name, arch=host.machine, gpus=tuple(archs))
    paths[2].write_text(described.to_json(), encoding="utf-8")
    paths[3].write_text(to_json(tuple(reports)), encoding="utf-8")
    return paths


def emulate(module: Module, store: WeightStore, artifact: Path, folder: Path) -> None:
    """Into `folder`, a model for this processor on the parameters of an artifact for a GPU: the same
    kernels, a thread after the other."""
    isa = host_isa()
    about = parse_description((artifact / DESCRIPTION_NAME).read_text(encoding="utf-8"))
    written = write_program(module, store, WrittenParams(about.params), CudaDevice(gpu=False))
    build_library(written.module, isa, folder / LIBRARY_NAME)
    described = replace(written.description, isa=isa.name, cpu_flags=isa.cpu_flags, arch=isa.machine)
    (folder / DESCRIPTION_NAME).write_text(described.to_json(), encoding="utf-8")
    (folder / PARAMS_NAME).symlink_to((artifact / PARAMS_NAME).absolute())


@contextmanager
def device_compiler(archs: Sequence[str]) -> Iterator[list[KernelReport]]:
    """Within, TVM has device code compiled for these architectures; what is known of it fills the list."""
    import tvm_ffi

    reports: list[KernelReport] = []
    failed: list[CompileError] = []

    def compile_kernels(source: str, *_: Any) -> bytes:
        try:
            compiled = compile_source(source, archs)
        except CompileError as error:
            failed.append(error)
            raise
        reports.extend(read_report(compiled))
        return compiled.binary

    before = tvm_ffi.get_global_func(CALLBACK, allow_missing=True)
    tvm_ffi.register_global_func(CALLBACK, compile_kernels, override=True)
    try:
        yield reports
    except RuntimeError as error:
        # TVM makes an error of its own of one in a callback
        if not failed:
            raise
        raise failed[0] from error
    finally:
        if before is not None:
            tvm_ffi.register_global_func(CALLBACK, before, override=True)


def target_for(archs: Sequence[str], host: Isa) -> dict[str, Any]:
    """What TVM is told: the least of the architectures, for what it writes must run on all."""
    numbers = [a.removeprefix(REAL).removeprefix(VIRTUAL) for a in archs]
    least = min(numbers, key=int)
    return {"kind": "cuda", "arch": f"{REAL}{least}", **_LIMITS, "host": host.llvm_target()}
