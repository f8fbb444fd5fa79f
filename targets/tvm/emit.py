"""Write a legalized decoder as `model.so`, `model.params` and `model.json`.

Weights are loaded, packed and written one at a time. The same module gives the same bytes.
"""

import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from gammac.diagnostics import CompileError, Diagnostic
from gammac.ir import Function, Module, Op, Value, WeightRef
from gammac.targets.tvm.build import build_library
from gammac.targets.tvm.cpu import CpuDevice
from gammac.targets.tvm.description import FUNCTIONS, Description
from gammac.targets.tvm.device import Device
from gammac.targets.tvm.kernels.isa import Isa
from gammac.targets.tvm.lowering import Lowering
from gammac.targets.tvm.lowerings import LOWERINGS, heads_of
from gammac.targets.tvm.names import FLOAT, INT8, MODEL_FILES
from gammac.targets.tvm.nodes import INTEGER, Tensor, whole
from gammac.targets.tvm.params import ParamFile, Places
from gammac.targets.tvm.program import FunctionWriter, Program
from gammac.targets.tvm.static import build_static
from gammac.targets.tvm.tir.attention import BLOCK
from gammac.targets.tvm.toolchain import demand_linker
from gammac.weights import WeightStore

IDS: Final = "input_ids"
POSITIONS: Final = "position_ids"


def emit(
    module: Module, store: WeightStore, folder: Path, isa: Isa, activations: str, *,
    static_library: bool = False,
) -> list[Path]:  # fmt: skip
    """The files of the artifact's model, in `folder`; if wished a static library, too, with a header and an
    example.

    `activations` is `int8` (products with packed weights round them to 8 bits) or `float`.
    Raises CompileError for an op that has no kernel, and where there is no linker.
    """
    refuse_unknown(module)
    demand_linker(isa.machine)
    paths = [folder / name for name in MODEL_FILES]
    with ParamFile(paths[1]) as data:
        written = write_program(module, store, data, CpuDevice(isa, activations == INT8))
    described = replace(
        written.description, isa=isa.name, cpu_flags=isa.cpu_flags, arch=isa.machine,
        activations=activations, code=isa.code,
    )  # fmt: skip
    paths[2].write_text(described.to_json(), encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        build_library(written.module, isa, paths[0], work if static_library else None)
        if static_library:
            paths += build_static(written.module, described, isa, paths[1], work, module.name)
    return paths


@dataclass(frozen=True, eq=False)
class Written:
    """A Relax module, not built yet, and what a runtime must know of it but for the device."""

    module: Any
    description: Description


def write_program(module: Module, store: WeightStore, data: Places, device: Device) -> Written:
    """The functions of an artifact in a device's kernels; parameters go where `data` places them."""
    function, capacity = module.functions["decode"], capacity_of(module)
    program, writers = Program(data, device), {}
    for name in FUNCTIONS:
        rows = 1 if name == "decode" else None
        writers[name] = FunctionWriter(program, rows, last_only=name == "prefill")
        _write(name, writers[name], module, store, capacity)
    description = Description(
        tvm=version("apache-tvm"),
        tvm_ffi=version("apache-tvm-ffi"),
        isa="",
        cpu_flags=(),
        arch="",
        activations=FLOAT,
        vocab_size=int(str(function.returns[0].type.shape[-1])),
        context=int(str(module.attrs["max_positions"])),
        capacity=capacity,
        caches=_cache_shapes(module, function, capacity),
        read_per_token=sum(data.entries[i].nbytes for i in writers["decode"].read),
        params=tuple(data.entries),
    )
    return Written(program.builder.get(), description)


def refuse_unknown(module: Module) -> None:
    """Raise CompileError for ops that have no kernel, naming them and where they come from."""
    if "decode" not in module.functions:
        raise CompileError(
            f"{module.name} is an encoder, TVM artifacts are decoders", hint="--backend onnx runs it"
        )
    unknown = [op for op in module.functions["decode"].ops if op.name not in LOWERINGS]
    if unknown:
        found = [Diagnostic(f"{op.name} has no TVM kernel", op.loc) for op in _once(unknown)]
        raise CompileError.from_diagnostics("TVM can't run the module; --backend onnx can", found)


def _once(ops: list[Op]) -> list[Op]:
    """The first op of each name."""
    return list({op.name: op for op in reversed(ops)}.values())[::-1]


def capacity_of(module: Module) -> int:
    """Rows of the caches: the module's context, rounded up to whole blocks."""
    return -(-int(str(module.attrs["max_positions"])) // BLOCK) * BLOCK


def _cache_shapes(module: Module, function: Function, capacity: int) -> tuple[tuple[int, ...], ...]:
    shapes: dict[int, tuple[int, ...]] = {}
    for op in function.ops:
        if op.name == "gqa":
            h = heads_of(op, None, capacity)
            for i, shape in enumerate((h.key_shape, h.value_shape)):
                assert isinstance(op.operands[i], Value)
                shapes[2 * int(op.operands[i].name.split(".")[1]) + i] = shape
    return tuple(shapes[i] for i in range(len(shapes)))


def _write(name: str, f: FunctionWriter, module: Module, store: WeightStore, capacity: int) -> None:
    function = module.functions["decode"]
    users = Counter(o for op in function.ops for o in op.operands if isinstance(o, Value))
    users.update(o for o in function.returns if isinstance(o, Value))
    at = Lowering(module, store, f, capacity, users, function.producers())
    builder = f.program.builder
    with builder.function(name, f.arguments):
        with builder.dataflow():
            _bind_parameters(at, function)
            head = _head(function) if f.last_only else None
            for op in function.ops:
                if op is head:
                    _keep_last_row(at, op)
                at.values.update(zip(op.results, LOWERINGS[op.name](at, op), strict=True))
            result = f.tensor(at.node(function.returns[0]))
            if f.last_only and head is None:
                result = _last_row(at, result)
            out = builder.emit_output(result.var)
        builder.emit_func_output(out)


def _bind_parameters(at: Lowering, function: Function) -> None:
    for param in function.params:
        if param.name == POSITIONS and at.users.get(param):
            at.values[param] = whole(_positions(at.f))
        else:
            # caches are known by their names; nothing reads their values but attention
            at.values[param] = whole(at.f.ids)


def _positions(f: FunctionWriter) -> Tensor:
    out = f.type_of(f.rows, 1, INTEGER)
    var = f.call("positions", f.rows, lambda: f.program.device.positions(f.rows), [f.past, f.ids.var], out)
    return Tensor(var, f.rows, 1, INTEGER)


def _head(function: Function) -> Op | None:
    """The last product, if all that follows it is made of its result alone."""
    head = next((op for op in reversed(function.ops) if op.name == "linear"), None)
    if head is None:
        return None
    behind = function.ops[function.ops.index(head) + 1 :]
    made = {head.result, *(r for op in behind for r in op.results)}
    alone = all(isinstance(o, WeightRef) or o in made for op in behind for o in op.operands)
    return head if alone and function.returns[0] in made else None


def _keep_last_row(at: Lowering, head: Op) -> None:
    x = head.operands[0]
    assert isinstance(x, Value)
    at.values[x] = whole(_last_row(at, at.tensor(x)))


def _last_row(at: Lowering, x: Tensor) -> Tensor:
    width = x.width
    var = at.f.call("last_row", width, lambda: at.device.last_row(width), [x.var], at.f.type_of(1, width))
    return Tensor(var, 1, width)
