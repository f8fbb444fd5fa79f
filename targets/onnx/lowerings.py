"""The table from gammac's ops to ONNX. An op that it lacks can't be emitted."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import onnx_ir as ir

from gammac.ir import Op
from gammac.targets.onnx.attention import lower_attention, lower_gqa, lower_rope, lower_rotary_table
from gammac.targets.onnx.graph import DTYPES, MICROSOFT, GraphWriter
from gammac.targets.onnx.integers import lower_fake_quantize
from gammac.targets.onnx.linear import lower_embedding, lower_linear

Lowering = Callable[[GraphWriter, Op], Sequence[ir.Value]]
OPEN_END: Final = 2**63 - 1  # of a slice

LOWERINGS: Final[dict[str, Lowering]] = {
    "attention": lower_attention,
    "embedding": lower_embedding,
    "fake_quantize": lower_fake_quantize,
    "gqa": lower_gqa,
    "linear": lower_linear,
    "rope": lower_rope,
    "rotary_table": lower_rotary_table,
}


def _node(kind: str, domain: str = "", **fixed: Any) -> Lowering:
    """One node that takes the operands as they are."""
    return lambda g, op: [g.op(kind, *map(g.operand, op.operands), domain=domain, **fixed)]


LOWERINGS.update(
    add=_node("Add"), sub=_node("Sub"), mul=_node("Mul"), div=_node("Div"), residual_add=_node("Add"),
    matmul=_node("MatMul"), relu=_node("Relu"), tanh=_node("Tanh"), sigmoid=_node("Sigmoid"),
    exp=_node("Exp"), cos=_node("Cos"), sin=_node("Sin"), neg=_node("Neg"),
    kv_append=_node("Concat", axis=2), silu=_node("QuickGelu", MICROSOFT, alpha=1.0),
)  # fmt: skip


def _lowering(function: Callable[[GraphWriter, Op], ir.Value]) -> Callable[[GraphWriter, Op], ir.Value]:
    """Put a lowering with one result into the table, under its own name."""
    LOWERINGS[function.__name__.strip("_")] = lambda g, op: [function(g, op)]
    return function


def _number(g: GraphWriter, op: Op, attr: str) -> ir.Value:
    """A numeric attribute as a constant of the operand's element type."""
    return g.const(float(str(op.attrs[attr])), op.operands[0].type.dtype)


def _first(g: GraphWriter, op: Op) -> ir.Value:
    return g.operand(op.operands[0])


@_lowering
def _rms_norm(g: GraphWriter, op: Op) -> ir.Value:
    # NOTE fused with the add before it (SkipSimplifiedLayerNormalization) it takes 1.1 to 1.7 times as long
    # for one token, and twice as long for 256
    x, weight = map(g.operand, op.operands)
    return g.op("RMSNormalization", x, weight, axis=-1, epsilon=op.attrs["eps"])


@_lowering
def _layer_norm(g: GraphWriter, op: Op) -> ir.Value:
    x, weight, bias = map(g.operand, op.operands)
    return g.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=op.attrs["eps"])


@_lowering
def _gelu(g: GraphWriter, op: Op) -> ir.Value:
    return g.op("Gelu", _first(g, op), approximate=op.attrs.get("approximate", "none"))


@_lowering
def _softmax(g: GraphWriter, op: Op) -> ir.Value:
    return g.op("Softmax", _first(g, op), axis=op.attrs["dim"])


@_lowering
def _rsqrt(g: GraphWriter, op: Op) -> ir.Value:
    return g.op("Reciprocal", g.op("Sqrt", _first(g, op)))


@_lowering
def _pow(g: GraphWriter, op: Op) -> ir.Value:
    return g.op("Pow", _first(g, op), _number(g, op, "exponent"))


@_lowering
def _scale(g: GraphWriter, op: Op) -> ir.Value:
    return g.op("Mul", _first(g, op), _number(g, op, "by"))


@_lowering
def _shift(g: GraphWriter, op: Op) -> ir.Value:
    return g.op("Add", _first(g, op), _number(g, op, "by"))


@_lowering
def _cast(g: GraphWriter, op: Op) -> ir.Value:
    return g.op("Cast", _first(g, op), to=DTYPES[str(op.attrs["dtype"])])


@_lowering
def _reshape(g: GraphWriter, op: Op) -> ir.Value:
    like = op.operands[0].type.shape
    return g.op("Reshape", _first(g, op), g.shape(op.result.type.shape, like))


@_lowering
def _expand(g: GraphWriter, op: Op) -> ir.Value:
    return g.op("Expand", _first(g, op), g.shape(op.result.type.shape))


@_lowering
def _transpose(g: GraphWriter, op: Op) -> ir.Value:
    return g.op("Transpose", _first(g, op), perm=op.attrs["perm"])


@_lowering
def _slice(g: GraphWriter, op: Op) -> ir.Value:
    start, end, dim = (g.const([int(str(op.attrs[k]))]) for k in ("start", "end", "dim"))
    return g.op("Slice", _first(g, op), start, end, dim)


@_lowering
def _last(g: GraphWriter, op: Op) -> ir.Value:
    start, end, dim = (g.const([i]) for i in (-1, OPEN_END, int(str(op.attrs["dim"]))))
    return g.op("Slice", _first(g, op), start, end, dim)


@_lowering
def _concat(g: GraphWriter, op: Op) -> ir.Value:
    return g.op("Concat", *map(g.operand, op.operands), axis=op.attrs["dim"])


@_lowering
def _mean(g: GraphWriter, op: Op) -> ir.Value:
    return g.op("ReduceMean", _first(g, op), g.const([int(str(op.attrs["dim"]))]), keepdims=1)


@_lowering
def _full(g: GraphWriter, op: Op) -> ir.Value:
    value = g.const(float(str(op.attrs["value"])), op.result.type.dtype)
    return g.op("Expand", value, g.shape(op.result.type.shape))


def _split(g: GraphWriter, op: Op) -> Sequence[ir.Value]:
    dim = int(str(op.attrs["dim"]))
    sizes = g.shape([value.type.shape[dim] for value in op.results])
    return g.ops("Split", _first(g, op), sizes, outputs=len(op.results), axis=dim)


LOWERINGS["split"] = _split
