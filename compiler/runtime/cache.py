"""Key-value caches of an ONNX decoder: one buffer written in place, or one that grows.

A graph of GroupQueryAttention takes the same buffer as past and as present and works on its true
length only; other graphs return a new, longer cache at every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]

PAST: Final = "past_key_values."
PRESENT: Final = "present."
CPU_PROVIDER: Final = "CPUExecutionProvider"
CUDA_PROVIDER: Final = "CUDAExecutionProvider"
NUMPY_TYPES: Final = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class CacheInput:
    """A past_key_values input of the graph."""

    name: str
    heads: int
    dim: int
    dtype: npt.DTypeLike

    @property
    def output(self) -> str:
        """The output that holds the longer cache."""
        return self.name.replace(PAST, PRESENT)

    def zeros(self, batch: int, length: int) -> npt.NDArray[Any]:
        """Zeros [batch, kv_heads, length, dim]; the system gives pages only when they are written."""
        return np.zeros((batch, self.heads, length, self.dim), self.dtype)


def cache_inputs(session: ort.InferenceSession, head_size: int) -> list[CacheInput]:
    """The cache inputs of a graph; `head_size` counts where the graph leaves it open."""
    found = [value for value in session.get_inputs() if value.name.startswith(PAST)]
    dims = [value.shape[3] if isinstance(value.shape[3], int) else head_size for value in found]
    return [
        CacheInput(value.name, value.shape[1], dim, NUMPY_TYPES[value.type])
        for value, dim in zip(found, dims, strict=True)
    ]


def device_of(session: ort.InferenceSession) -> tuple[str, int]:
    """Where its first provider keeps what it works on, as OrtValue spells it."""
    return ("cuda" if session.get_providers()[0] == CUDA_PROVIDER else "cpu", 0)


class Cache(Protocol):
    """Where a decoder keeps keys and values of the `length` tokens it has read, at most `capacity`."""

    length: int
    capacity: int

    def bind(self) -> ort.IOBinding:
        """A binding for the next run, caches in and out."""
        ...

    def advance(self, tokens: int) -> None:
        """The run of that binding appended this many tokens."""
        ...


class SharedCache:
    """One buffer a tensor, bound once as past and as present."""

    def __init__(self, session: ort.InferenceSession, past: Sequence[CacheInput], capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self._binding = session.io_binding()
        for value in past:
            buffer = ort.OrtValue.ortvalue_from_numpy(value.zeros(1, capacity), *device_of(session))
            self._binding.bind_ortvalue_input(value.name, buffer)
            self._binding.bind_ortvalue_output(value.output, buffer)

    def bind(self) -> ort.IOBinding:
        """The binding that holds the buffers."""
        return self._binding

    def advance(self, tokens: int) -> None:
        """Only the length changes."""
        self.length += tokens


class GrowingCache:
    """The outputs of a run are the inputs of the next; a step costs a copy of the whole cache."""

    def __init__(self, session: ort.InferenceSession, past: Sequence[CacheInput], capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self._session = session
        self._past = past
        self._values = [ort.OrtValue.ortvalue_from_numpy(value.zeros(1, 0)) for value in past]
        self._binding: ort.IOBinding | None = None

    def bind(self) -> ort.IOBinding:
        """A fresh binding whose cache outputs onnxruntime allocates."""
        self._binding = self._session.io_binding()
        for cache, value in zip(self._past, self._values, strict=True):
            self._binding.bind_ortvalue_input(cache.name, value)
            self._binding.bind_output(cache.output)
        return self._binding

    def advance(self, tokens: int) -> None:
        """Keep what the run returned."""
        assert self._binding is not None, "advance follows a run"
        self.length += tokens
        self._values = self._binding.get_outputs()[: len(self._past)]
        self._binding = None
