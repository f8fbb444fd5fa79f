"""What the driver asks of an emitter: whether it can work here, whether it knows the model, the files."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from gammac.diagnostics import CompileError
from gammac.ir import Module
from gammac.passes.fold_constants import FoldConstants
from gammac.passes.insert_kv_cache import InsertKvCache
from gammac.passes.legalize_tvm import raised
from gammac.passes.raise_patterns import RaisePatterns
from gammac.pipeline import Context, Pipeline
from gammac.processor import CPU
from gammac.targets.onnx.any_bits import find_compiler
from gammac.targets.onnx.library import library_builder
from gammac.targets.target import Target
from gammac.targets.tvm.names import ACTIVATIONS, FLOAT, INSTALL, INT8
from gammac.weights import WeightStore

if TYPE_CHECKING:
    from gammac.targets.tvm.kernels.isa import Isa

TVM_VERSION: Final = "0.27."
TVM_TOOLS: Final = ("apache-tvm", "apache-tvm-ffi")


class Backend(Protocol):
    """An emitter, set up for a target and a user's wishes."""

    @property
    def every_width(self) -> bool:
        """Whether each width has a kernel of its own, so that rows need no splitting."""
        ...

    @property
    def activations(self) -> str:
        """int8 or float: what products with quantized weights take."""
        ...

    @property
    def tools(self) -> tuple[str, ...]:
        """Packages whose versions decide what the emitter writes, besides those of every artifact."""
        ...

    @property
    def elsewhere(self) -> str:
        """Why what is emitted can't run on this machine, or nothing."""
        ...

    @property
    def code(self) -> Mapping[str, str]:
        """What native code is made for: its triple, core and features; nothing where there is none."""
        ...

    def stand_in(self) -> "Backend | None":
        """The same emitter for this machine, to try what was emitted for another; None without one."""
        ...

    def demand(self, module: Module, ctx: Context) -> None:
        """Raise CompileError for a captured module that can't be emitted, before any long work."""
        ...

    def emit(self, module: Module, store: WeightStore, folder: Path) -> list[Path]:
        """Write the files of a legalized module's model into `folder`."""
        ...

    def emulate(self, module: Module, store: WeightStore, folder: Path, scratch: Path) -> Path | None:
        """A folder, made in `scratch`, whose model computes here what that in `folder` does elsewhere; None
        if there is no such thing."""
        ...


@dataclass(frozen=True)
class OnnxBackend:
    """ONNX Runtime; `cache` keeps the operator library."""

    target: Target
    every_width: bool
    cache: Path
    activations: str = INT8
    tools: tuple[str, ...] = ()
    elsewhere: str = ""
    code: Mapping[str, str] = field(default_factory=dict)

    def stand_in(self) -> Backend | None:
        """There is no other machine."""
        return None

    def demand(self, module: Module, ctx: Context) -> None:
        """Whatever is captured has a form in ONNX, or says so when it is lowered."""

    def emit(self, module: Module, store: WeightStore, folder: Path) -> list[Path]:
        """See `gammac.targets.onnx.emit`."""
        from gammac.targets.onnx.emit import emit

        return emit(
            module, store, folder, target=self.target, compiler=self.every_width,
            build=library_builder(self.cache / "library"),
        )  # fmt: skip

    def emulate(self, module: Module, store: WeightStore, folder: Path, scratch: Path) -> Path | None:
        """It runs here."""
        return None


@dataclass(frozen=True)
class TvmBackend:
    """Kernels compiled by TVM for an instruction set."""

    target: Target
    isa: "Isa"
    activations: str
    every_width: bool = True
    tools: tuple[str, ...] = TVM_TOOLS
    static_library: bool = False

    @property
    def elsewhere(self) -> str:
        """Processors differ."""
        from gammac.runtime.tvm_session import lacking

        return lacking(self.isa.name, self.isa.machine, self.isa.cpu_flags)

    @property
    def code(self) -> Mapping[str, str]:
        """What LLVM is told."""
        return self.isa.code

    def stand_in(self) -> Backend | None:
        """This machine's instruction set, if there are kernels for it."""
        from gammac.targets.tvm.kernels.isa import host_isa

        try:
            return replace(self, isa=host_isa(), static_library=False)
        except CompileError:
            return None

    def demand(self, module: Module, ctx: Context) -> None:
        """Lower a copy of the module as far as its ops are concerned."""
        _demand_kernels(module, ctx)

    def emit(self, module: Module, store: WeightStore, folder: Path) -> list[Path]:
        """See `gammac.targets.tvm.emit`."""
        from gammac.targets.tvm.emit import emit

        return emit(module, store, folder, self.isa, self.activations, static_library=self.static_library)

    def emulate(self, module: Module, store: WeightStore, folder: Path, scratch: Path) -> Path | None:
        """Another processor's code says nothing here."""
        return None


@dataclass(frozen=True)
class CudaBackend:
    """Kernels compiled by TVM and nvcc for GPUs."""

    target: Target
    activations: str = FLOAT
    every_width: bool = True
    tools: tuple[str, ...] = TVM_TOOLS

    @property
    def elsewhere(self) -> str:
        """There may be no such GPU."""
        from gammac.runtime.tvm_cuda import lacking_gpu

        return lacking_gpu(self.target.archs)

    def demand(self, module: Module, ctx: Context) -> None:
        """Lower a copy of the module as far as its ops are concerned."""
        _demand_kernels(module, ctx)

    def emit(self, module: Module, store: WeightStore, folder: Path) -> list[Path]:
        """See `gammac.targets.tvm.cuda.emit`."""
        from gammac.targets.tvm.cuda.emit import emit

        return emit(module, store, folder, self.target.archs)

    @property
    def code(self) -> Mapping[str, str]:
        """Architectures stand in the description."""
        return {}

    def stand_in(self) -> Backend | None:
        """See `emulate`."""
        return None

    def emulate(self, module: Module, store: WeightStore, folder: Path, scratch: Path) -> Path | None:
        """The same kernels as loops for this processor."""
        from gammac.targets.tvm.cuda.emit import emulate

        emulate(module, store, folder, scratch)
        return scratch


def _demand_kernels(module: Module, ctx: Context) -> None:
    from gammac.targets.tvm.emit import refuse_unknown

    first = Pipeline((FoldConstants(), RaisePatterns(), InsertKvCache()))
    refuse_unknown(raised(first.run(module, ctx)))


def backend_of(
    target: Target, cache: Path, *, portable: bool = False, product_inputs: str = "",
    static_library: bool = False,
) -> Backend:  # fmt: skip
    """The backend of a target's emitter. Raises CompileError where something that it needs is missing."""
    if static_library and (target.emitter != "tvm" or target.archs):
        raise CompileError(
            "a static library holds kernels that TVM compiles for a processor",
            hint="leave --static-library out" if target.archs else "--backend tvm writes one",
        )
    if product_inputs not in ("", *ACTIVATIONS):
        raise CompileError(f"product inputs are {' or '.join(ACTIVATIONS)}, not {product_inputs!r}")
    if target.emitter == "tvm":
        return _tvm(target, portable, product_inputs, static_library)
    return _onnx(target, cache, portable, product_inputs)


def _onnx(target: Target, cache: Path, portable: bool, product_inputs: str) -> OnnxBackend:
    if target.provider != CPU:
        if product_inputs == INT8:
            raise CompileError("CUDA's operators multiply floats", hint="leave --product-inputs out")
        return OnnxBackend(target, True, cache, FLOAT)
    if product_inputs == FLOAT:
        raise CompileError(
            "ONNX Runtime's kernels for few bits round activations to 8 bits",
            hint="--backend tvm has float ones",
        )
    return OnnxBackend(target, not portable and find_compiler() is not None, cache)


def _tvm(target: Target, portable: bool, product_inputs: str, static_library: bool) -> Backend:
    missing = [name for name in ("tvm", "tvm_ffi") if importlib.util.find_spec(name) is None]
    if missing:
        raise CompileError("the TVM backend needs TVM", hint=INSTALL)
    if not version("apache-tvm").startswith(TVM_VERSION):
        found = version("apache-tvm")
        raise CompileError(
            f"the TVM backend is written for TVM {TVM_VERSION}x, here is {found}", hint=INSTALL
        )
    if portable:
        raise CompileError("a TVM artifact is native code for a processor", hint="leave --portable out")
    if target.archs:
        return _cuda(target, product_inputs)
    from gammac.targets.tvm.build import demand_core
    from gammac.targets.tvm.kernels.isa import isa_of
    from gammac.targets.tvm.static import demand_static
    from gammac.targets.tvm.toolchain import demand_linker

    isa = isa_of(target)
    demand_linker(isa.machine)
    demand_core(isa)
    if static_library:
        demand_static(isa.machine)
    return TvmBackend(target, isa, product_inputs or INT8, static_library=static_library)


def _cuda(target: Target, product_inputs: str) -> CudaBackend:
    if product_inputs == INT8:
        raise CompileError(
            "the kernels for GPUs multiply floats", hint="leave --product-inputs out, or say float"
        )
    from gammac.targets.tvm.cuda.emit import launcher_isa
    from gammac.targets.tvm.cuda.toolkit import check_archs, demand_nvcc
    from gammac.targets.tvm.toolchain import demand_linker

    check_archs(target.archs)
    demand_linker(launcher_isa().machine)
    demand_nvcc()
    return CudaBackend(target)
