"""A GPU for a TVM session: whether there is one that the artifact's code fits, and tensors in its memory."""

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gammac.diagnostics import CompileError
from gammac.runtime.tvm_memory import HOST
from gammac.targets.tvm.cuda.loader import load_cuda
from gammac.targets.tvm.cuda.toolkit import REAL, VIRTUAL

CUDA: Final = 2  # DLPack's device type
POOLED_ALLOCATOR: Final = 2
"""Asking a GPU for memory takes longer than most kernels."""

EXISTS, COMPUTE_VERSION = 0, 4  # TVM's numbers of device attributes


def lacking_gpu(archs: Sequence[str]) -> str:
    """Why code for these architectures can't run here; nothing if it can."""
    wanted = f"the artifact is for NVIDIA GPUs ({', '.join(archs)})"
    found = compute_version()
    if found is None:
        return f"{wanted}, and this machine has none, or lacks its driver or CUDA 13's runtime"
    if not any(fits(arch, found) for arch in archs):
        return f"{wanted}, and that of this machine has compute capability {found[0]}.{found[1]}"
    return ""


def fits(arch: str, version: tuple[int, int]) -> bool:
    """Whether a GPU of a compute capability runs code: machine code of its generation, any older PTX."""
    number = arch.removeprefix(REAL).removeprefix(VIRTUAL)
    major, minor = int(number[:-1]), int(number[-1])
    if arch.startswith(VIRTUAL):
        return (major, minor) <= version
    return major == version[0] and minor <= version[1]


def compute_version() -> tuple[int, int] | None:
    """The compute capability of this machine's first GPU; None without one."""
    import tvm_ffi

    try:
        load_cuda()
    except CompileError:
        return None
    attribute = tvm_ffi.get_global_func("runtime.GetDeviceAttr")
    if not attribute(CUDA, 0, EXISTS):
        return None
    major, minor = str(attribute(CUDA, 0, COMPUTE_VERSION)).split(".")
    return int(major), int(minor)


class GpuMemory:
    """Tensors in a GPU's memory, by `tvm_ffi`."""

    def __init__(self, ffi: Any, device: tuple[int, int] = (CUDA, 0)) -> None:
        self._ffi, self._device = ffi, ffi.Device(*device)
        self._new = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._from_bytes = ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        self._to_bytes = ffi.get_global_func("runtime.TVMTensorCopyToBytes")

    @property
    def devices(self) -> tuple[int, ...]:
        """What the virtual machine is initialized with: the GPU, and the processor, which works out sizes."""
        return (CUDA, 0, POOLED_ALLOCATOR, *HOST)

    def tensor(self, array: npt.NDArray[Any]) -> Any:
        """A copy of an array."""
        made = self._new(self._ffi.Shape(array.shape), self._ffi.dtype(str(array.dtype)), self._device, None)
        self.write(made, array)
        return made

    def write(self, tensor: Any, array: npt.NDArray[Any]) -> None:
        """Change what a tensor holds."""
        values = np.ascontiguousarray(array)
        self._from_bytes(tensor, values.ctypes.data_as(ctypes.c_void_p), values.nbytes)

    def read(self, tensor: Any) -> npt.NDArray[Any]:
        """A copy of what it holds, when all that was launched has ended."""
        values = np.empty(tuple(tensor.shape), str(tensor.dtype))
        self._to_bytes(tensor, values.ctypes.data_as(ctypes.c_void_p), values.nbytes)
        return values
