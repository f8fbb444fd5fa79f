"""TVM's CUDA library, which writes device code into an artifact, on a machine that has no CUDA driver.

TVM writes a fat binary only when its library for CUDA is loaded, and that asks for the driver's library and
for the CUDA runtime. Where one of them is missing, an empty library of its name stands in, every function of
which fails: enough to write an artifact, and to be told that there is no GPU.
"""

import ctypes
import importlib.util
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gammac.diagnostics import CompileError
from gammac.targets.tvm.names import INSTALL

DRIVER, RUNTIME, LIBRARY = "libcuda.so.1", "libcudart.so.13", "libtvm_runtime_cuda.so"
# the error of a machine without a GPU, cudaErrorNoDevice and CUDA_ERROR_NO_DEVICE
NO_DEVICE: Final = 100
CREATE: Final = "ffi.Module.create.cuda"
FUNCTIONS: Final = {
    DRIVER: (
        "cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString", "cuLaunchKernelEx",
        "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeTiled",
    ),
    RUNTIME: (
        "cudaDeviceGetAttribute", "cudaEventCreate", "cudaEventDestroy", "cudaEventElapsedTime",
        "cudaEventRecord", "cudaEventSynchronize", "cudaFree", "cudaFreeHost", "cudaGetDevice",
        "cudaGetDeviceCount", "cudaGetDeviceProperties", "cudaGetErrorName", "cudaGetErrorString",
        "cudaGetLastError", "cudaGraphDestroy", "cudaGraphExecDestroy", "cudaGraphInstantiate",
        "cudaGraphLaunch", "cudaMalloc", "cudaMallocHost", "cudaMemGetInfo", "cudaMemcpyAsync",
        "cudaMemcpyPeerAsync", "cudaPeekAtLastError", "cudaSetDevice", "cudaStreamBeginCapture",
        "cudaStreamCreate", "cudaStreamCreateWithFlags", "cudaStreamDestroy", "cudaStreamEndCapture",
        "cudaStreamSynchronize", "cudaStreamWaitEvent",
    ),
}  # fmt: skip
_TEXTS: Final = ("cudaGetErrorName", "cudaGetErrorString")


def load_cuda(linker: Sequence[str] | None = None) -> None:
    """Load TVM's library for CUDA. `linker` makes what stands in for missing libraries; without one, they
    must be there.

    Raises CompileError when it can't be loaded.
    """
    import tvm_ffi

    if tvm_ffi.get_global_func(CREATE, allow_missing=True) is not None:
        return
    for name in FUNCTIONS:
        if not _loads(name) and linker is not None:
            _stand_in(name, linker)
    place = importlib.util.find_spec("tvm")
    assert place is not None and place.submodule_search_locations, "its version was found"
    library = Path(place.submodule_search_locations[0]) / "lib" / LIBRARY
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise CompileError(f"TVM's library for CUDA can't be loaded: {error}", hint=INSTALL) from error


def _loads(name: str) -> bool:
    """Whether a library is there: by its name, or in a package of PyPI."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    for place in (name, *map(str, sorted(packages.glob(f"*/lib/{name}")))):
        try:
            ctypes.CDLL(place, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False


def _stand_in(name: str, linker: Sequence[str]) -> None:
    """Load an empty library that is taken for `name`."""
    functions = "".join(_function(f) for f in FUNCTIONS[name])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "stand_in.c").write_text(functions)
        # the runtime's functions have its name as their version, the driver's have none
        (folder / "versions").write_text(
            f"{name} {{ global: *; }};\n" if name == RUNTIME else "{ global: *; };\n"
        )
        command = [*linker, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-Wl,--version-script,versions"]
        command += ["-o", "stand_in.so", "stand_in.c"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CompileError(f"{linker[0]} does not link a stand-in for {name}:\n{done.stderr}")
        ctypes.CDLL(str(folder / "stand_in.so"), ctypes.RTLD_GLOBAL)


def _function(name: str) -> str:
    if name in _TEXTS:
        return f'const char *{name}(void) {{ return "no CUDA device"; }}\n'
    return f"int {name}(void) {{ return {NO_DEVICE}; }}\n"
