"""From an exported program to a function of the IR, node by node, by the table in aten.py."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from gammac.diagnostics import CompileError
from gammac.frontend import aten, aten_shapes
from gammac.frontend.lowering import ADD_A_ROW, Lowering, Row
from gammac.ir import Dim, Function, Operand, Sym, TensorType, Value, WeightRef, drop_dead

LOWERINGS: Final[Mapping[str, Row]] = {**aten.ROWS, **aten_shapes.ROWS}
"""The name of an OpOverload → what makes IR of it."""


@dataclass(frozen=True)
class Use:
    """A weight that a function mentions, and where its numbers come from."""

    type: TensorType
    parameter: str
    """The model's name for it."""
    shape: torch.Size
    """The shape it has there."""
    is_transposed: bool
    value: Tensor | None
    """The numbers, where it is a buffer or a constant and not a parameter."""


@dataclass(frozen=True)
class Lowered:
    """A function, and its weights in the order of their first use."""

    function: Function
    uses: Mapping[str, Use]


def lower(
    program: ExportedProgram,
    inputs: Sequence[str],
    canonical: Mapping[str, str],
    buffers: Mapping[str, Tensor],
) -> Lowered:
    """`@forward` of a program that was exported from a wrapper around the model.

    `inputs` names the parameters, each [batch, seq]; `canonical` maps parameter names to the one that
    stands for a tied tensor; `buffers` has the real values of buffers, which may be on the meta device.
    Raises CompileError for an op that the table lacks.
    """
    nodes = list(_live(program.graph.output_node()))
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    arguments = [placeholders[name] for name in program.graph_signature.user_inputs]
    constants = {**_constants(program), **buffers}
    lowering = Lowering(_sizes(arguments, inputs), constants)
    params = [Value(lowering.type(node), name) for node, name in zip(arguments, inputs, strict=True)]
    lowering.env.update(zip(arguments, params, strict=True))
    for node, name in _weight_names(program, placeholders, canonical):
        lowering.env[node] = WeightRef(name, lowering.type(node))
    for node in nodes:
        if node.op == "call_function":
            _lower_node(lowering, node)
    output: Any = program.graph.output_node().args[0]
    returned = lowering.exact(output[0])
    names = tuple(program.call_spec.out_spec.unflatten([None]))
    function = drop_dead(Function("forward", tuple(params), tuple(lowering.builder.ops), (returned,), names))
    shapes = {name: tuple(n.meta["val"].shape) for n, name in _weight_names(program, placeholders, canonical)}
    return Lowered(function, dict(_uses(function, lowering, shapes)))


def _lower_node(lowering: Lowering, node: Node) -> None:
    lowering.loc, kind = module_of(node)
    target = "getitem" if node.target is operator.getitem else str(node.target)
    row = LOWERINGS.get(target)
    if row is None:
        raise CompileError(
            f"PyTorch's {target}, in a {kind}, has no counterpart in the IR", loc=lowering.loc, hint=ADD_A_ROW
        )
    lowering.env[node] = row(lowering, node)


def module_of(node: Node) -> tuple[str, str]:
    """The path and the class of the innermost PyTorch module that a node comes from."""
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(list(stack.values())), ("", "function"))
    kind = kind if isinstance(kind, str) else kind.__name__
    # the first component is our own wrapper's
    return str(path).partition(".")[2], kind.rsplit(".", 1)[-1]


def _live(output: Node) -> Iterator[Node]:
    """The nodes that the output needs, in order; what only checks or is never read is left out."""
    needed = {output}
    for node in reversed(output.graph.nodes):
        if node in needed and not _is_size(node):
            needed.update(node.all_input_nodes)
    return (node for node in output.graph.nodes if node in needed and not _is_size(node))


def _is_size(node: Node) -> bool:
    # sizes are taken from the result's type, not from the nodes that compute them
    return not isinstance(node.meta.get("val"), Tensor | list | tuple) and node.op == "call_function"


def _sizes(arguments: Sequence[Node], names: Sequence[str]) -> dict[str, Dim]:
    sizes: dict[str, Dim] = {}
    for node, name in zip(arguments, names, strict=True):
        for size, dim in zip(node.meta["val"].shape, ("batch", "seq"), strict=True):
            if not isinstance(size, torch.SymInt):
                raise CompileError(
                    f"the model fixes the {dim} dimension of {name} at {size}",
                    hint="gammac needs a model that takes any batch and length",
                )
            sizes[str(size.node.expr)] = Sym.named(dim)
    return sizes


def _strip(path: str) -> str:
    return path.partition(".")[2]


def _constants(program: ExportedProgram) -> dict[str, Tensor]:
    """Tensors that the model makes from Python numbers while it runs."""
    named = program.graph_signature.inputs_to_lifted_tensor_constants.values()
    return {name: program.constants[name] for name in named}


def _weight_names(
    program: ExportedProgram, placeholders: Mapping[str, Node], canonical: Mapping[str, str]
) -> Iterator[tuple[Node, str]]:
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT or spec.target is None:
            continue
        name = spec.target if spec.kind == InputKind.CONSTANT_TENSOR else _strip(spec.target)
        yield placeholders[spec.arg.name], canonical.get(name, name)


def _uses(
    function: Function, lowering: Lowering, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Use]]:
    mentioned: dict[str, Operand] = {
        o.name: o for op in function.ops for o in op.operands if isinstance(o, WeightRef)
    }
    for name, ref in mentioned.items():
        parameter = lowering.transposed_weights.get(name, name)
        is_transposed = name in lowering.transposed_weights
        shape = torch.Size(shapes[parameter])
        yield name, Use(ref.type, parameter, shape, is_transposed, lowering.constants.get(name))
