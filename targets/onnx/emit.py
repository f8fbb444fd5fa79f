"""Write a legalized module as `model.onnx` and `model.onnx.data`.

Weights are loaded, packed and written one at a time; the graph only points at them. The same module
gives the same bytes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir

from gammac.diagnostics import CompileError, Diagnostic
from gammac.ir import Function, Module, Operand, Sym, TensorType, WeightRef
from gammac.processor import CPU
from gammac.targets.onnx.any_bits import OP_ZEROS, build_library, find_compiler, function_proto
from gammac.targets.onnx.attention import MASK, caches_in_halves, positions, set_decoder_sizes
from gammac.targets.onnx.genai import write_genai_config
from gammac.targets.onnx.graph import DATA_NAME, OPSET, DataFile, GraphWriter
from gammac.targets.onnx.lowerings import LOWERINGS
from gammac.targets.target import Target
from gammac.weights import WeightStore

MODEL_NAME: Final = "model.onnx"
IDS: Final = "input_ids"
POSITIONS: Final = "position_ids"
RENAMED: Final = {
    "past_key": "past_key_values.{}.key",
    "past_value": "past_key_values.{}.value",
    "present_key": "present.{}.key",
    "present_value": "present.{}.value",
}


def emit(
    module: Module,
    store: WeightStore,
    folder: Path,
    *,
    target: Target | None = None,
    compiler: bool = True,
    build: Callable[[Path], Path] = build_library,
) -> list[Path]:
    """The files of the artifact's model, in `folder`.

    A decoder's inputs are input_ids and attention_mask [batch, total] (1: a token) and its cache; an
    encoder's are those of `forward`. `target` chooses between operators that run the same format. Where
    weights need the operator library, `build` puts it into the folder; without `compiler`, or where none
    is found, they run expanded to floats.
    Raises CompileError for an op or a weight format that ONNX Runtime has no fast kernel for.
    """
    function = emitted_function(module)
    _demand_lowerings(function)
    compiler = compiler and find_compiler() is not None
    with DataFile(folder / DATA_NAME) as data:
        g = GraphWriter(module, store, data, target, compiler)
        g.halves = caches_in_halves(function) if g.on_gpu else set()
        inputs = _declare_inputs(g, function)
        _lower(g, function)
        outputs = _declare_outputs(g, function)
        model = g.finish(
            module.name, inputs, outputs, [_model_function(name) for name in sorted(g.library_ops)]
        )
    path = folder / MODEL_NAME
    ir.save(model, path)
    onnx.checker.check_model(str(path))
    library = build(folder) if g.library_ops and compiler else None
    files = [path, data.path, *([library] if library else [])]
    if function.name == "decode":
        name = library.name if library else None
        files.append(
            write_genai_config(module, folder, library=name, provider=target.provider if target else CPU)
        )
    return files


def emitted_function(module: Module) -> Function:
    """`decode`, or `forward` for an encoder."""
    return module.functions.get("decode") or module.functions["forward"]


def _demand_lowerings(function: Function) -> None:
    unknown = [op for op in function.ops if op.name not in LOWERINGS]
    if unknown:
        found = [Diagnostic(f"{op.name} has no form in ONNX", op.loc) for op in unknown]
        raise CompileError.from_diagnostics("the module can't be emitted as ONNX", found)


def _model_function(name: str) -> ir.Function:
    proto = function_proto(asymmetric=name == OP_ZEROS)
    # one version of the standard operators in a file; those of the function are the same in both
    proto.opset_import[0].version = OPSET
    return ir.serde.deserialize_function(proto)


# ---- inputs and outputs -------------------------------------------------------------------------


def outer_name(name: str) -> str:
    """What a parameter or a result is called outside: `past_key.3` is `past_key_values.3.key`."""
    kind, _, index = name.partition(".")
    return RENAMED[kind].format(index) if index and kind in RENAMED else name


def _input(g: GraphWriter, name: str, type_: TensorType) -> ir.Value:
    value = ir.Value(name=name)
    g.set_type(value, type_)
    g.by_name[name] = value
    return value


def _declare_inputs(g: GraphWriter, function: Function) -> list[ir.Value]:
    used: set[Operand] = {o for op in function.ops for o in op.operands}
    inputs: list[ir.Value] = []
    decoder = function.name == "decode"
    for param in function.params:
        if param in used and not (decoder and param.name == POSITIONS):
            g.values[param] = _input(g, outer_name(param.name), g.type_of(param))
            inputs.append(g.values[param])
    if not decoder:
        _bind_sizes(g, function)
        return inputs
    batch, total = Sym.named("batch"), Sym.named("total")
    mask = _input(g, MASK, TensorType("i64", (batch, total)))
    inputs.insert(1, mask)
    set_decoder_sizes(g, g.by_name[IDS], mask)
    for param in function.params:
        if param.name == POSITIONS and param in used:
            g.values[param] = positions(g, mask)
    return inputs


def _bind_sizes(g: GraphWriter, function: Function) -> None:
    for param in function.params:
        for axis, dim in enumerate(param.type.shape):
            if str(dim).isidentifier() and str(dim) not in g.sizes and param in g.values:
                g.sizes[str(dim)] = g.op("Shape", g.values[param], start=axis, end=axis + 1)


def _lower(g: GraphWriter, function: Function) -> None:
    for op in function.ops:
        g.at = op.loc
        for value, lowered in zip(op.results, LOWERINGS[op.name](g, op), strict=True):
            if lowered.type is None:
                g.set_type(lowered, g.type_of(value))
            g.values[value] = lowered
    g.at = ""


def _declare_outputs(g: GraphWriter, function: Function) -> list[ir.Value]:
    outputs: list[ir.Value] = []
    taken: set[ir.Value] = set()
    for name, operand in zip(function.return_names, function.returns, strict=True):
        value = g.operand(operand)
        if value in taken or isinstance(operand, WeightRef) or value.is_graph_input():
            value = g.op("Identity", value)
            g.set_type(value, g.type_of(operand))
        taken.add(value)
        value.name = outer_name(name)
        outputs.append(value)
    return outputs
