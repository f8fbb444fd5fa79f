"""Lowering of `linear` and `embedding`: packed codes for quantized weights, panels of floats for others."""

from typing import Any

from gammac.formats import load_float, stored_format
from gammac.ir import Op, Value, Weight, WeightRef
from gammac.targets.tvm.lowerings import Lowering, refuse
from gammac.targets.tvm.program import Node, Tensor, whole
from gammac.targets.tvm.tir import tables
from gammac.targets.tvm.tir.panels import float_linear, pack_panels


def weight_of(at: Lowering, op: Op) -> Weight:
    """The weight of a linear or an embedding. Raises CompileError where it is computed."""
    ref = op.operands[1]
    if not isinstance(ref, WeightRef):
        raise refuse(f"TVM kernels multiply by weights only, and {op.name} gets a computed one", op.loc)
    return at.module.weights[ref.name]


def panels(at: Lowering, weight: Weight, *, whole: bool = True) -> Any:
    """A float weight in panels of 16 rows, as a parameter."""
    return at.f.param(
        f"{weight.name}.panels", lambda: pack_panels(load_float(weight, at.store).numpy()), whole=whole
    )


def lower_linear(at: Lowering, op: Op, x: Tensor) -> Node:
    """x @ weight.T + bias"""
    weight = weight_of(at, op)
    outputs, inputs = (int(str(size)) for size in weight.type.shape)
    bias = [at.floats(o) for o in op.operands[2:]]
    key = (x.rows, outputs, inputs, bool(bias))
    args = [x.var, panels(at, weight), *bias]
    y = at.f.call("float_linear", key, lambda: float_linear(*key), args, at.f.type_of(x.rows, outputs))
    return whole(Tensor(y, x.rows, outputs))


def lower_embedding(at: Lowering, op: Op, ids: Tensor) -> Tensor:
    """Rows of a table."""
    weight = weight_of(at, op)
    key = (ids.rows, *(int(str(size)) for size in weight.type.shape))
    out = at.f.type_of(ids.rows, key[2])
    args = [ids.var, panels(at, weight, whole=False)]
    return Tensor(at.f.call("embedding", key, lambda: tables.embedding(*key), args, out), ids.rows, key[2])


__all__ = ["Value", "lower_embedding", "lower_linear", "stored_format"]
