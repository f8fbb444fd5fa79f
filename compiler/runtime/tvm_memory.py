"""Tensors of a TVM session in the machine's own memory: arrays are tensors, nothing is copied."""

from collections.abc import Sequence
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gammac.targets.tvm.params import ALIGNMENT

CPU: Final = 1  # DLPack's device type
NAIVE_ALLOCATOR: Final = 1
"""What a call needs is given back when it ends; the other one keeps what every length of prompt took."""

HOST: Final = (CPU, 0, NAIVE_ALLOCATOR)
"""What the virtual machine is initialized with: type, number and allocator of each device."""


class HostMemory:
    """Tensors of `tvm_ffi` on arrays at multiples of 64 bytes, as `zeros` makes them."""

    devices = HOST

    def __init__(self, ffi: Any) -> None:
        self._ffi = ffi

    def tensor(self, array: npt.NDArray[Any]) -> Any:
        """The array as a tensor: a change to one is a change to the other."""
        return self._ffi.from_dlpack(array)

    def write(self, tensor: Any, array: npt.NDArray[Any]) -> None:
        """Nothing: the tensor is the array."""

    def read(self, tensor: Any) -> Any:
        """The tensor as an array."""
        return np.from_dlpack(tensor)


def zeros(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros at a multiple of 64 bytes, as kernels want all tensors."""
    size = prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
