"""Running a TVM artifact: its own code, its parameters mapped, TVM's small runtime library and no compiler.

The runtime library is loaded without `import tvm`, which would bring in 260 MB of compiler. Its threads are
set up at their first use in a process: how many there can be is settled by then.
"""

import ctypes
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from gammac.diagnostics import CompileError
from gammac.processor import host_flags
from gammac.runtime.adapters import Factors, demand_shape
from gammac.runtime.imports import without_torch
from gammac.runtime.session import Logits, Tokens, check_room, default_threads
from gammac.runtime.tvm_cuda import GpuMemory, lacking_gpu
from gammac.runtime.tvm_memory import HostMemory, zeros
from gammac.targets.tvm.description import FUNCTIONS, Description, Entry, parse_description
from gammac.targets.tvm.names import DESCRIPTION_NAME, INSTALL, LIBRARY_NAME, PANELS, PARAMS_NAME
from gammac.targets.tvm.panels import pack_panels
from gammac.targets.tvm.params import Array, MappedParams

BIG_CORES: Final = 1


class TvmSession:
    """A decoder in a folder with model.so, model.params, model.json; `factors` stand for those of its
    adapters. Raises CompileError when it was built by another TVM or for another processor, or can't be
    loaded."""

    kind = "decoder"

    def __init__(
        self, folder: Path, threads: int | None = None, spinning: bool = True, factors: Factors | None = None
    ) -> None:
        self.folder = folder
        self._about = _description(folder)
        demand_versions(self._about)
        demand_processor(self._about)
        self._ffi = _runtime(threads or default_threads(), spinning)
        demand_gpu(self._about)
        self._memory = GpuMemory(self._ffi) if self._about.gpus else HostMemory(self._ffi)
        self._functions = _load(self._ffi, folder / LIBRARY_NAME, self._memory.devices)
        self._params = _params(self._ffi, folder / PARAMS_NAME, self._about, self._memory, factors or {})
        self._token, self._past = (zeros((1, 1), np.int64), zeros((1,), np.int64))
        self._step = [self._memory.tensor(a) for a in (self._token, self._past)]
        self._caches = self._scratch = None
        self._length, self._capacity = 0, self.context

    @property
    def vocab_size(self) -> int:
        """Numbers in a row of the output."""
        return self._about.vocab_size

    @property
    def context(self) -> int:
        """The longest sequence, in tokens: what the caches were made for."""
        return self._about.context

    @property
    def activations(self) -> str:
        """int8 or float: what products with packed weights take."""
        return self._about.activations

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, all layers."""
        return sum(4 * prod(shape) for shape in self._about.caches) // self._about.capacity

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of the parameters that a decode step reads."""
        return self._about.read_per_token

    def logits(self, tokens: Tokens) -> Logits:
        """Output f32 [batch, seq, vocab] of tokens i64 [batch, seq]; the cache is not touched."""
        check_room(tokens.shape[1], self.context)
        if self._scratch is None:
            self._scratch = self._new_caches()
        rows = [self._run("logits", row, 0, self._scratch) for row in tokens]
        return rows[0][None] if len(rows) == 1 else np.stack(rows)

    def prefill(self, tokens: Tokens) -> Logits:
        """Append tokens i64 [seq] to the cache; logits f32 [vocab] after the last of them."""
        if self._caches is None:
            self._caches = self._new_caches()
        check_room(self._length + len(tokens), self._capacity)
        name = "decode" if len(tokens) == 1 else "prefill"
        out = self._run(name, tokens, self._length, self._caches)
        self._length += len(tokens)
        last: Logits = out[0]
        return last

    def decode(self, token: int) -> Logits:
        """Append one token to the cache; logits f32 [vocab] after it."""
        return self.prefill(np.array([token], np.int64))

    def reset(self, capacity: int | None = None) -> None:
        """Empty the cache and make room for `capacity` tokens (default: the context)."""
        self._length = 0
        self._capacity = min(capacity or self.context, self.context)

    def _new_caches(self) -> Any:
        # the system gives pages only when they are written
        return self._ffi.Array([self._memory.tensor(zeros(s, np.float32)) for s in self._about.caches])

    def _run(self, name: str, tokens: Tokens, past: int, caches: Any) -> Logits:
        self._past[0] = past
        ids, length = self._step
        self._memory.write(length, self._past)
        if name == "decode":
            self._token[0, 0] = tokens[0]
            self._memory.write(ids, self._token)
        else:
            row = zeros((len(tokens), 1), np.int64)
            row[:, 0] = tokens
            ids = self._memory.tensor(row)
        logits: Logits = self._memory.read(self._functions[name](ids, length, caches, self._params))
        return logits


# ---- checks -------------------------------------------------------------------------------------


def _description(folder: Path) -> Description:
    path = folder / DESCRIPTION_NAME
    try:
        return parse_description(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompileError(f"{path} can't be read: {error}", hint="compile the model again") from error


def demand_versions(about: Description) -> None:
    """Raise CompileError unless the installed TVM is the one that built the artifact."""
    wanted = {"apache-tvm": about.tvm, "apache-tvm-ffi": about.tvm_ffi}
    for package, built in wanted.items():
        try:
            found = version(package)
        except PackageNotFoundError as error:
            raise CompileError(f"{package} is not installed", hint=INSTALL) from error
        if found != built:
            raise CompileError(
                f"the artifact was built by {package} {built}, here is {found}: their code doesn't mix",
                hint=f"pip install {package}=={built}, or compile the model again",
            )


def demand_processor(about: Description) -> None:
    """Raise CompileError when this machine can't run the artifact's instructions."""
    lacks = lacking(about.isa, about.arch, about.cpu_flags)
    if lacks:
        raise CompileError(lacks, hint="compile the model again on this machine, or for its target")


def demand_gpu(about: Description) -> None:
    """Raise CompileError where an artifact for GPUs finds none that it fits."""
    lacks = lacking_gpu(about.gpus) if about.gpus else ""
    if lacks:
        raise CompileError(
            lacks,
            hint="run it where there is such a GPU and its driver; --target cpu compiles for this processor",
        )


def lacking(isa: str, machine: str, cpu_flags: Sequence[str]) -> str:
    """Why code for an instruction set can't run here; nothing if it can."""
    if platform.machine() != machine:
        return f"the artifact is for {machine}, this machine is {platform.machine()}"
    flags = host_flags()
    # where a system doesn't say what its processor has, only trying shows it
    missing = [flag for flag in cpu_flags if flag not in flags] if flags else []
    return f"the artifact uses {isa}, this processor lacks {', '.join(missing)}" if missing else ""


# ---- loading ------------------------------------------------------------------------------------


def _runtime(threads: int, spinning: bool) -> Any:
    """tvm_ffi, with TVM's runtime loaded and its threads counted."""
    cores = os.cpu_count() or 1
    # NOTE read when the threads are made: half the cores, and pinned to them, unless one says otherwise
    os.environ.setdefault("TVM_NUM_THREADS", str(max(threads, cores)))
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    if not spinning:
        os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")
    with without_torch():
        import tvm_ffi
    if tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is None:
        place = importlib.util.find_spec("tvm")
        assert place is not None and place.submodule_search_locations, "its version was found"
        library = Path(place.submodule_search_locations[0]) / "lib" / _library_name()
        try:
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise CompileError(f"TVM's runtime can't be loaded: {error}", hint=INSTALL) from error
    tvm_ffi.get_global_func("runtime.config_threadpool")(BIG_CORES, threads)
    return tvm_ffi


def _library_name() -> str:
    names = {"darwin": "libtvm_runtime.dylib", "win32": "tvm_runtime.dll"}
    return names.get(sys.platform, "libtvm_runtime.so")


def _load(ffi: Any, path: Path, devices: Sequence[int]) -> dict[str, Any]:
    try:
        # a path with a folder in it: the loader would look for a bare name elsewhere
        machine = ffi.load_module(str(path.absolute()))["vm_load_executable"]()
        machine["vm_initialization"](*devices)
        return {name: machine[name] for name in FUNCTIONS}
    except (RuntimeError, AttributeError, OSError, ValueError) as error:
        raise CompileError(f"{path.name} can't be loaded: {error}", hint="compile the model again") from error


def _params(
    ffi: Any, path: Path, about: Description, memory: HostMemory | GpuMemory, factors: Factors
) -> Any:
    try:
        arrays = list(MappedParams(path, about.params).arrays())
    except (OSError, ValueError) as error:
        raise CompileError(f"{path} is damaged: {error}", hint="compile the model again") from error
    for i, entry in enumerate(about.params):
        name = entry.name.removesuffix(PANELS)
        if name in factors:
            arrays[i] = _in_place_of(entry, name, factors[name])
    return ffi.Array([memory.tensor(array) for array in arrays])


def _in_place_of(entry: Entry, name: str, factor: Array) -> Array:
    """A factor as the kernels read the one that it stands for: as it is, or in panels."""
    if len(entry.shape) > factor.ndim:
        factor = pack_panels(factor)
    demand_shape(name, factor, entry.shape)
    made = zeros(entry.shape, np.float32)
    made[...] = factor
    return made
