"""Lowering of `linear` and `embedding`: packed codes for quantized weights, panels of floats for others."""

from collections.abc import Callable, Sequence
from typing import Any

from gammac.diagnostics import CompileError
from gammac.formats import load_float, load_quantized, stored_format
from gammac.ir import Op, Operand, Value, Weight, WeightRef
from gammac.passes.add_adapters import FIRST, SECOND, factor_of
from gammac.targets.tvm.kernels import (
    Branch,
    Layout,
    Packable,
    layout_of,
)  # fmt: skip
from gammac.targets.tvm.lowering import Lowering, function_of
from gammac.targets.tvm.names import PANELS
from gammac.targets.tvm.nodes import Deferred, Node, Normed, Part, Tensor, whole
from gammac.targets.tvm.rounding import rounded, rounded_with


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
    return layout_of(format_, *_sizes(weight))


# ---- parameters ---------------------------------------------------------------------------------


def _floats(at: Lowering, weight: Weight, *, whole: bool = True) -> Any:
    """A float weight as products and embeddings read it."""
    name = f"{weight.name}{PANELS}"
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
    zeros, offsets = layout.same_zero is None, layout.around
    kinds = ["codes", "scales", *(["zeros"] if zeros else []), *(["offsets"] if offsets else [])]
    return [
        at.f.param(f"{weight.name}.{kind}", lambda kind=kind: array(kind), whole=whole)  # type: ignore[misc]
        for kind in kinds
    ]


# ---- linear -------------------------------------------------------------------------------------


class SecondFactor(Deferred):
    """low @ b.T for a few columns `low` of a tensor: the product of a packed weight can add it on its way."""

    def __init__(self, at: Lowering, low: Part, weight: Weight) -> None:
        super().__init__(low.rows, _sizes(weight)[0], self._alone)
        self.at, self.low, self.weight = at, low, weight

    def _alone(self) -> Tensor:
        return _float_product(self.at, self.at.f.tensor(self.low), self.weight, [])

    @property
    def branch(self) -> Branch:
        """What a kernel reads of it."""
        return Branch(self.low.width, self.low.column, self.low.tensor.width)

    def panels(self) -> Any:
        """b, as a parameter."""
        return _floats(self.at, self.weight)


class Product(Deferred):
    """A product with a packed weight: what is added to it, or what it gates, can be part of its kernel."""

    def __init__(
        self, at: Lowering, x: Node, weight: Weight, layout: Layout, bias: list[Any],
        second: SecondFactor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(x.rows, layout.rows, self.plus)
        self.at, self.x, self.weight, self.layout, self.bias = at, x, weight, layout, bias
        self.second = second

    @property
    def branch(self) -> Branch | None:
        """Its low-rank branch, if there is one."""
        return self.second.branch if self.second is not None else None

    def weights(self) -> list[Any]:
        """What a kernel reads of it, in order."""
        second = [] if self.second is None else [self.second.panels()]
        return [*_packed(self.at, self.weight), *second, *self.bias]

    def beside(self, second: SecondFactor) -> "Product":
        """The same with a branch, not computed either."""
        return Product(self.at, self.x, self.weight, self.layout, self.bias, second)

    def plus(self, residual: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias + residual, and the branch"""
        at, layout, rows, branch = self.at, self.layout, self.rows, self.branch
        more = (bool(self.bias), residual is not None, branch)
        added = [residual.var] if residual is not None else []
        self._made = _call(
            at, "linear", layout.format, (layout, *more), self.x, layout,
            [*_lows([self]), *self.weights(), *added],
            lambda: at.device.linear(rows, layout.format, layout.rows, layout.columns, *more),
        )  # fmt: skip
        return self._made


def lower_linear(at: Lowering, op: Op) -> Node:
    """x @ weight.T + bias"""
    x, weight = at.node(op.operands[0]), weight_of(at, op)
    bias = [at.floats(o) for o in op.operands[2:]]
    layout = _layout(at, weight)
    if layout is not None:
        return Product(at, x, weight, layout, bias)
    if at.device.low_rank is not None and factor_of(weight) == FIRST:
        return whole(_first_factor(at, x, op.operands[1]))
    if at.device.low_rank is not None and factor_of(weight) == SECOND and isinstance(x, Part):
        return SecondFactor(at, x, weight)
    return whole(_float_product(at, at.f.tensor(x), weight, bias))


def lower_sum(at: Lowering, op: Op) -> Node | None:
    """A product plus a tensor, or with its low-rank branch; None for other sums."""
    for product, other in (op.operands[::-1], op.operands):
        node = at.values.get(product) if isinstance(product, Value) else None
        fits = isinstance(node, Product) and node.pending and at.alone(product)
        if fits and isinstance(other, Value) and other.type == op.result.type:
            assert isinstance(node, Product)
            second = at.values[other]
            if isinstance(second, SecondFactor) and second.pending and node.second is None:
                return node.beside(second)
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
    plain = gate.pending and up.pending and not gate.bias and not up.bias
    return plain and gate.layout.rows == up.layout.rows and _share(at, [gate, up])


def _share(at: Lowering, products: list[Product]) -> bool:
    """Whether products read the same input in the same way, and their branches the same first factor."""
    alike = len({product.layout.segment for product in products}) == 1 or not at.device.integer
    return alike and all(p.x is products[0].x for p in products) and len(_lows(products)) <= 1


def _lows(products: list[Product]) -> list[Any]:
    """The first factors that branches read, each once."""
    seconds = [product.second for product in products if product.second is not None]
    return list({id(s.low.tensor): s.low.tensor.var for s in seconds}.values())


def stacked(at: Lowering, operands: Sequence[Operand]) -> Tensor | None:
    """Products that nothing else reads, in one kernel and side by side; None for what is otherwise."""
    make = at.device.stacked
    if make is None:
        return None
    nodes = [at.values.get(o) if isinstance(o, Value) and at.alone(o) else None for o in operands]
    parts = [node for node in nodes if isinstance(node, Product) and node.pending]
    if len(parts) < len(nodes) or len(parts) < 2 or not _share(at, parts):
        return None
    first, layouts = parts[0], [part.layout for part in parts]
    formats, rows = tuple(layout.format for layout in layouts), tuple(layout.rows for layout in layouts)
    branches, biased = tuple(part.branch for part in parts), tuple(bool(part.bias) for part in parts)
    key = (first.x.rows, formats, rows, layouts[0].columns, branches, biased)
    inputs = rounded(at, first.x, layouts[0].segment) if at.device.integer else [at.f.tensor(first.x).var]
    weights = [array for part in parts for array in part.weights()]
    var = at.f.call(
        f"stacked{'' if first.x.rows == 1 else '_many'}", key, lambda: make(*key),
        [*inputs, *_lows(parts), *weights], at.f.type_of(first.x.rows, sum(rows)),
    )  # fmt: skip
    return Tensor(var, first.x.rows, sum(rows))


def _gated(at: Lowering, gate: Product, up: Product, activation: str) -> Tensor:
    a, b, branches = gate.layout, up.layout, (gate.branch, up.branch)
    return _call(
        at, "gated", a.format, (a, b, activation, branches), gate.x, a,
        [*_lows([gate, up]), *gate.weights(), *up.weights()],
        lambda: at.device.gated(gate.x.rows, (a.format, b.format), a.rows, a.columns, activation, branches),
    )  # fmt: skip


def _call(
    at: Lowering, kind: str, format_: Packable, key: tuple[Any, ...], x: Node, layout: Layout,
    more: list[Any], make: Callable[[], Any],
) -> Tensor:  # fmt: skip
    """A kernel of `layout.rows` outputs that reads x, in int8 where products do."""
    inputs = rounded(at, x, layout.segment) if at.device.integer else [at.f.tensor(x).var]
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


def _first_factor(at: Lowering, x: Node, a: Operand) -> Tensor:
    """x @ a.T, of a norm that is computed on the way; for one token, where x is rounded to int8 if it is."""
    rank, inputs = _sizes(at.module.weights[a.name])
    reader = _reader(at, x) if at.device.integer and x.rows == 1 else None
    low = None if reader is None else rounded_with(at, x, reader.layout.segment, at.floats(a), rank)
    if low is None:
        low_rank, eps = at.device.low_rank, x.eps if isinstance(x, Normed) else None
        assert low_rank is not None
        args = [x.x.var, x.weight] if isinstance(x, Normed) else [at.f.tensor(x).var]
        kind = f"low_rank{'' if eps is None else '_normed'}{'' if x.rows == 1 else '_many'}"
        key = (x.rows, rank, inputs, eps)
        low = at.f.call(kind, key, lambda: low_rank(*key), [*args, at.floats(a)], at.f.type_of(x.rows, rank))
    return Tensor(low, x.rows, rank)


def _reader(at: Lowering, x: Node) -> Product | None:
    """The last product so far that reads x, which stands before its adapter."""
    readers = (v for v in reversed(at.values.values()) if isinstance(v, Product) and v.x is x)
    return next(readers, None)


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
    elif layout.levels or layout.computed:
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
