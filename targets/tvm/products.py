"""Lowering of `linear` and `embedding`: packed codes for quantized weights, panels of floats for others."""

from collections.abc import Callable, Sequence
from typing import Any

from gammac.diagnostics import CompileError
from gammac.formats import load_float, load_quantized, stored_format
from gammac.ir import Op, Operand, Value, Weight, WeightRef
from gammac.targets.tvm.kernels import (
    Layout,
    Packable,
    quantize_activations,
    rms_norm_quantize,
)  # fmt: skip
from gammac.targets.tvm.kernels.operands import TOKENS
from gammac.targets.tvm.lowering import Lowering, function_of
from gammac.targets.tvm.nodes import Deferred, Node, Normed, Tensor, whole


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


def _layout(at: Lowering, weight: Weight) -> Layout | None:
    format_ = stored_format(weight)
    if format_ is None:
        return None
    if not at.device.takes(format_):
        raise CompileError(
            f"{format_.name} has no TVM kernel for this target", loc=weight.name, hint="w3g64 has one"
        )
    return Layout(format_, *_sizes(weight))


# ---- parameters ---------------------------------------------------------------------------------


def _floats(at: Lowering, weight: Weight, *, whole: bool = True) -> Any:
    """A float weight as products and embeddings read it."""
    name = f"{weight.name}.floats"
    return at.f.param(name, lambda: at.device.floats(load_float(weight, at.store).numpy()), whole=whole)


def _packed(at: Lowering, weight: Weight, *, whole: bool = True) -> list[Any]:
    """Codes, scales and zeros, packed when the first of them is written."""
    arrays: dict[str, Any] = {}

    def array(kind: str) -> Any:
        if not arrays:
            arrays.update(at.device.packed(load_quantized(weight, at.store)))
        return arrays[kind]

    layout = _layout(at, weight)
    assert layout is not None
    kinds = ("codes", "scales") if layout.same_zero is not None else ("codes", "scales", "zeros")
    return [
        at.f.param(f"{weight.name}.{kind}", lambda kind=kind: array(kind), whole=whole)  # type: ignore[misc]
        for kind in kinds
    ]


# ---- linear -------------------------------------------------------------------------------------


class Product(Deferred):
    """A product with a packed weight: what is added to it, or what it gates, can be part of its kernel."""

    def __init__(self, at: Lowering, x: Node, weight: Weight, layout: Layout, bias: list[Any]) -> None:
        super().__init__(x.rows, layout.rows, self.plus)
        self.at, self.x, self.weight, self.layout, self.bias = at, x, weight, layout, bias

    def plus(self, residual: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias + residual"""
        at, layout, rows = self.at, self.layout, self.rows
        more = (bool(self.bias), residual is not None)
        added = [*self.bias, *([residual.var] if residual is not None else [])]
        self._made = _call(
            at, "linear", layout.format, (layout, *more), self.x, layout,
            [*_packed(at, self.weight), *added],
            lambda: at.device.linear(rows, layout.format, layout.rows, layout.columns, *more),
        )  # fmt: skip
        return self._made


def lower_linear(at: Lowering, op: Op) -> Node:
    """x @ weight.T + bias"""
    x, weight = at.node(op.operands[0]), weight_of(at, op)
    bias = [at.floats(o) for o in op.operands[2:]]
    layout = _layout(at, weight)
    if layout is None:
        return whole(_float_product(at, at.f.tensor(x), weight, bias))
    return Product(at, x, weight, layout, bias)


def lower_sum(at: Lowering, op: Op) -> Node | None:
    """A product plus a tensor; None for other sums."""
    for product, other in (op.operands[::-1], op.operands):
        node = at.values.get(product) if isinstance(product, Value) else None
        fits = isinstance(node, Product) and node.pending and at.alone(product)
        if fits and isinstance(other, Value) and other.type == op.result.type:
            assert isinstance(node, Product)
            return whole(node.plus(at.tensor(other)))
    return None


def lower_gated(at: Lowering, op: Op) -> Node | None:
    """activation(x @ gate.T) * (x @ up.T), in one kernel; None for other products of elements."""
    for activated, other in (op.operands, op.operands[::-1]):
        act = at.producers.get(activated) if isinstance(activated, Value) else None
        if act is None or act.name not in ("silu", "gelu") or not at.alone(activated):
            continue
        gate, up = (at.values.get(o) if isinstance(o, Value) and at.alone(o) else None
                    for o in (act.operands[0], other))  # fmt: skip
        if isinstance(gate, Product) and isinstance(up, Product) and _join(at, gate, up):
            return whole(_gated(at, gate, up, function_of(act)))
    return None


def _join(at: Lowering, gate: Product, up: Product) -> bool:
    """Whether one kernel can compute both."""
    a, b = gate.layout, up.layout
    plain = gate.pending and up.pending and not gate.bias and not up.bias
    return plain and gate.x is up.x and a.rows == b.rows and (not at.device.integer or a.segment == b.segment)


def stacked(at: Lowering, operands: Sequence[Operand]) -> Tensor | None:
    """Products that nothing else reads, in one kernel and side by side; None for what is otherwise."""
    make = at.device.stacked
    if make is None:
        return None
    nodes = [at.values.get(o) if isinstance(o, Value) and at.alone(o) else None for o in operands]
    parts = [node for node in nodes if isinstance(node, Product) and node.pending and not node.bias]
    if len(parts) < len(nodes) or len(parts) < 2:
        return None
    first, layouts = parts[0], [part.layout for part in parts]
    alike = len({layout.segment for layout in layouts}) == 1 or not at.device.integer
    if not alike or any(part.x is not first.x for part in parts):
        return None
    formats, rows = tuple(layout.format for layout in layouts), tuple(layout.rows for layout in layouts)
    inputs = _quantized(at, first.x, layouts[0]) if at.device.integer else [at.f.tensor(first.x).var]
    weights = [array for part in parts for array in _packed(at, part.weight)]
    var = at.f.call(
        f"stacked{'' if first.x.rows == 1 else '_many'}", (first.x.rows, formats, rows, layouts[0].columns),
        lambda: make(first.x.rows, formats, rows, layouts[0].columns),
        [*inputs, *weights], at.f.type_of(first.x.rows, sum(rows)),
    )  # fmt: skip
    return Tensor(var, first.x.rows, sum(rows))


def _gated(at: Lowering, gate: Product, up: Product, activation: str) -> Tensor:
    a, b = gate.layout, up.layout
    return _call(
        at, "gated", a.format, (a, b, activation), gate.x, a,
        [*_packed(at, gate.weight), *_packed(at, up.weight)],
        lambda: at.device.gated(gate.x.rows, (a.format, b.format), a.rows, a.columns, activation),
    )  # fmt: skip


def _call(
    at: Lowering, kind: str, format_: Packable, key: tuple[Any, ...], x: Node, layout: Layout,
    more: list[Any], make: Callable[[], Any],
) -> Tensor:  # fmt: skip
    """A kernel of `layout.rows` outputs that reads x, in int8 where products do."""
    inputs = _quantized(at, x, layout) if at.device.integer else [at.f.tensor(x).var]
    name = f"{kind}_{format_.name.replace('-', '_')}{'' if x.rows == 1 else '_many'}"
    var = at.f.call(name, (x.rows, *key), make, [*inputs, *more], at.f.type_of(x.rows, layout.rows))
    return Tensor(var, x.rows, layout.rows)


def _float_product(at: Lowering, x: Tensor, weight: Weight, bias: list[Any]) -> Tensor:
    outputs, inputs = _sizes(weight)
    key = (x.rows, outputs, inputs, bool(bias))
    args = [x.var, _floats(at, weight), *bias]
    out = at.f.type_of(x.rows, outputs)
    return Tensor(
        at.f.call("float_linear", key, lambda: at.device.float_linear(*key), args, out), x.rows, outputs
    )


def _quantized(at: Lowering, x: Node, layout: Layout) -> list[Any]:
    """Codes, scales and sums of a product's inputs in int8, made once for all that read them alike."""
    group, tokens = layout.segment, x.rows or TOKENS
    of: Any = x if isinstance(x, Normed) else at.f.tensor(x).var

    def make() -> list[Any]:
        if isinstance(x, Normed):
            made = rms_norm_quantize(x.width, group, tokens, x.eps)
            args = [x.x.var, x.weight]
        else:
            made = quantize_activations(x.width, group, tokens)
            args = [of]
        types = [at.f.type_of(x.rows, int(o.shape[1]), o.dtype) for o in made.outputs]
        eps = x.eps if isinstance(x, Normed) else None
        kind = "quantize" if eps is None else "rms_norm_quantize"
        out: list[Any] = at.f.call(kind, (x.rows, x.width, group, eps), lambda: made.func, args, types)
        return out

    found: list[Any] = at.f.shared(("int8", of, group), make)
    return found


# ---- embedding ----------------------------------------------------------------------------------


def lower_embedding(at: Lowering, op: Op) -> Node:
    """Rows of a table."""
    ids, weight = at.tensor(op.operands[0]), weight_of(at, op)
    layout, (entries, width) = _layout(at, weight), _sizes(weight)
    out = at.f.type_of(ids.rows, width)
    if layout is None:
        key = (ids.rows, entries, width)
        args = [ids.var, _floats(at, weight, whole=False)]
        var = at.f.call("embedding", key, lambda: at.device.embedding(*key), args, out)
    elif layout.levels:
        raise CompileError(
            f"tables in {layout.format.name} have no TVM kernel", loc=weight.name, hint="w8g64 has one"
        )
    else:
        args = [ids.var, *_packed(at, weight, whole=False)]
        var = at.f.call(
            "packed_rows", (ids.rows, layout),
            lambda: at.device.packed_rows(ids.rows, layout.format, entries, width), args, out,
        )  # fmt: skip
    return whole(Tensor(var, ids.rows, width))
