"""Lowering of `linear` and `embedding`: packed codes for quantized weights, panels of floats for others."""

from typing import Any

from gammac.diagnostics import CompileError
from gammac.formats import load_float, load_quantized, stored_format
from gammac.ir import Op, Weight, WeightRef
from gammac.targets.tvm.kernels import (
    Layout,
    decode_linear,
    pack,
    prefill_linear,
    quantize_activations,
    rms_norm_quantize,
)  # fmt: skip
from gammac.targets.tvm.lowering import Lowering
from gammac.targets.tvm.program import Node, Normed, Tensor, apply, one_row, whole
from gammac.targets.tvm.tir import tables
from gammac.targets.tvm.tir.packed_rows import packed_rows
from gammac.targets.tvm.tir.panels import float_linear, pack_panels


def weight_of(at: Lowering, op: Op) -> Weight:
    """The weight of a linear or an embedding. Raises CompileError where it is computed."""
    ref = op.operands[1]
    if not isinstance(ref, WeightRef):
        raise CompileError(
            f"{op.name} by a computed matrix has no TVM kernel", loc=op.loc, hint="--backend onnx runs it"
        )
    return at.module.weights[ref.name]


def _sizes(weight: Weight) -> tuple[int, int]:
    rows, columns = weight.type.shape
    assert isinstance(rows, int) and isinstance(columns, int)
    return rows, columns


def _layout(weight: Weight) -> Layout | None:
    format_ = stored_format(weight)
    return Layout(format_, *_sizes(weight)) if format_ else None


# ---- parameters ---------------------------------------------------------------------------------


def _panels(at: Lowering, weight: Weight, *, whole: bool = True) -> Any:
    """A float weight in panels of 16 rows."""
    name = f"{weight.name}.panels"
    return at.f.param(name, lambda: pack_panels(load_float(weight, at.store).numpy()), whole=whole)


def _packed(at: Lowering, weight: Weight, *, whole: bool = True) -> list[Any]:
    """Codes, scales and zeros, packed when the first of them is written."""
    arrays: dict[str, Any] = {}

    def array(kind: str) -> Any:
        if not arrays:
            arrays.update(pack(load_quantized(weight, at.store), at.isa))
        return arrays[kind]

    layout = _layout(weight)
    assert layout is not None
    kinds = ("codes", "scales") if layout.format.symmetric else ("codes", "scales", "zeros")
    return [
        at.f.param(f"{weight.name}.{kind}", lambda kind=kind: array(kind), whole=whole)  # type: ignore[misc]
        for kind in kinds
    ]


# ---- linear -------------------------------------------------------------------------------------


def lower_linear(at: Lowering, op: Op) -> Node:
    """x @ weight.T + bias"""
    x, weight = at.node(op.operands[0]), weight_of(at, op)
    bias = [at.floats(o) for o in op.operands[2:]]
    layout = _layout(weight)
    if layout is None:
        return whole(_float_product(at, at.f.tensor(x), weight, bias))
    y = whole(_packed_product(at, x, weight, layout))
    return apply("add", y, one_row(bias[0], y)) if bias else y


def _float_product(at: Lowering, x: Tensor, weight: Weight, bias: list[Any]) -> Tensor:
    outputs, inputs = _sizes(weight)
    key = (x.rows, outputs, inputs, bool(bias))
    args = [x.var, _panels(at, weight), *bias]
    out = at.f.type_of(x.rows, outputs)
    return Tensor(at.f.call("float_linear", key, lambda: float_linear(*key), args, out), x.rows, outputs)


def _packed_product(at: Lowering, x: Node, weight: Weight, layout: Layout) -> Tensor:
    make = decode_linear if x.rows == 1 else prefill_linear
    kind = f"{'decode' if x.rows == 1 else 'prefill'}_{layout.format.name.replace('-', '_')}"
    inputs = _quantized(at, x, layout) if at.integer else [at.f.tensor(x).var]
    args = [*inputs, *_packed(at, weight)]
    var = at.f.call(
        kind, layout,
        lambda: make(layout.format, layout.rows, layout.columns, at.isa, integer=at.integer).func,
        args, at.f.type_of(x.rows, layout.rows),
    )  # fmt: skip
    return Tensor(var, x.rows, layout.rows)


def _quantized(at: Lowering, x: Node, layout: Layout) -> list[Any]:
    """Codes, scales and sums of a product's inputs in int8, made once for all that read them alike."""
    group, tokens = layout.segment, x.rows or "m"

    def make() -> list[Any]:
        if isinstance(x, Normed):
            made = rms_norm_quantize(x.width, group, tokens, x.eps)
            args = [x.x.var, x.weight]
        else:
            made = quantize_activations(x.width, group, tokens)
            args = [at.f.tensor(x).var]
        types = [at.f.type_of(x.rows, int(o.shape[1]), o.dtype) for o in made.outputs]
        eps = x.eps if isinstance(x, Normed) else None
        kind = "quantize" if eps is None else "rms_norm_quantize"
        out: list[Any] = at.f.call(kind, (x.rows, x.width, group, eps), lambda: made.func, args, types)
        return out

    of = x if isinstance(x, Normed) else at.f.tensor(x).var
    found: list[Any] = at.f.shared(("int8", of, group), make)
    return found


# ---- embedding ----------------------------------------------------------------------------------


def lower_embedding(at: Lowering, op: Op) -> Node:
    """Rows of a table."""
    ids, weight = at.tensor(op.operands[0]), weight_of(at, op)
    layout, (entries, width) = _layout(weight), _sizes(weight)
    out = at.f.type_of(ids.rows, width)
    if layout is None:
        key = (ids.rows, entries, width)
        args = [ids.var, _panels(at, weight, whole=False)]
        var = at.f.call("embedding", key, lambda: tables.embedding(*key), args, out)
    else:
        args = [ids.var, *_packed(at, weight, whole=False)]
        var = at.f.call(
            "packed_rows", (ids.rows, layout), lambda: packed_rows(ids.rows, layout, at.isa), args, out
        )
    return whole(Tensor(var, ids.rows, width))
