"""The table from gammac's ops to nodes of a Relax function. An op that it lacks can't be emitted."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Final

from gammac.ir import Op, Operand, Value, WeightRef
from gammac.targets.tvm.lowering import Lowering, function_of
from gammac.targets.tvm.nodes import Lazy, Node, Normed, Part, Tensor, apply, number, one_row, whole
from gammac.targets.tvm.products import lower_embedding, lower_gated, lower_linear, lower_sum, stacked
from gammac.targets.tvm.tir.attention import Heads, Rows

Lower = Callable[[Lowering, Op], Sequence[Node]]
LOWERINGS: Final[dict[str, Lower]] = {}


def _lowering(function: Callable[[Lowering, Op], Node]) -> Callable[[Lowering, Op], Node]:
    """Put a lowering with one result into the table, under its own name."""
    LOWERINGS[function.__name__.strip("_")] = lambda at, op: [function(at, op)]
    return function


def width_of(operand: Operand) -> int:
    """Elements of a row: of everything behind batch and seq."""
    sizes = operand.type.shape[2:]
    return prod(size for size in sizes if isinstance(size, int))


# ---- elementwise --------------------------------------------------------------------------------


def _tree(function: str) -> Lower:
    """An op that becomes part of a tree."""

    def lower(at: Lowering, op: Op) -> Sequence[Node]:
        like = next(at.node(o) for o in op.operands if isinstance(o, Value))
        operands = [
            one_row(at.floats(o), like) if isinstance(o, WeightRef) else at.node(o) for o in op.operands
        ]
        return [settled(at, op, apply(function, *operands))]

    return lower


def settled(at: Lowering, op: Op, node: Lazy) -> Node:
    """A tree that several ops read is computed once."""
    return node if at.users.get(op.result, 0) == 1 else whole(at.f.tensor(node))


AS_NAMED: Final = ("sub", "div", "neg", "relu", "exp", "sigmoid", "tanh", "silu")
LOWERINGS.update({name: _tree(name) for name in AS_NAMED})


def _first_of(special: Callable[[Lowering, Op], Node | None], otherwise: Lower) -> Lower:
    """A lowering that knows a shorter way for some operands."""

    def lower(at: Lowering, op: Op) -> Sequence[Node]:
        found = special(at, op)
        return otherwise(at, op) if found is None else [found]

    return lower


LOWERINGS["add"] = LOWERINGS["residual_add"] = _first_of(lower_sum, _tree("add"))
LOWERINGS["mul"] = _first_of(lower_gated, _tree("mul"))


@_lowering
def _gelu(at: Lowering, op: Op) -> Node:
    return settled(at, op, apply(function_of(op), at.node(op.operands[0])))


@_lowering
def _scale(at: Lowering, op: Op) -> Node:
    x = at.node(op.operands[0])
    return settled(at, op, apply("mul", x, number(float(str(op.attrs["by"])), x)))


@_lowering
def _shift(at: Lowering, op: Op) -> Node:
    x = at.node(op.operands[0])
    return settled(at, op, apply("add", x, number(float(str(op.attrs["by"])), x)))


# ---- shapes: rows stay rows, so nothing moves ---------------------------------------------------


@_lowering
def _reshape(at: Lowering, op: Op) -> Node:
    return at.node(op.operands[0])


@_lowering
def _slice(at: Lowering, op: Op) -> Node:
    return _columns(at, op, int(str(op.attrs["start"])), width_of(op.result))


def _split(at: Lowering, op: Op) -> Sequence[Node]:
    starts = [sum(width_of(r) for r in op.results[:i]) for i in range(len(op.results))]
    return [_columns(at, op, start, width_of(r)) for start, r in zip(starts, op.results, strict=True)]


LOWERINGS["split"] = _split


def _columns(at: Lowering, op: Op, start: int, width: int) -> Node:
    x = at.node(op.operands[0])
    part = x if isinstance(x, Part) else whole(at.f.tensor(x))
    return Part(part.tensor, part.column + start, width)


# ---- norms, tables, products --------------------------------------------------------------------


@_lowering
def _rms_norm(at: Lowering, op: Op) -> Node:
    x = at.tensor(op.operands[0])
    if op.operands[1].type.shape != (x.width,):
        return whole(_norm(at, op, x, "rms_norm", at.device.rms_norm))
    weight, eps = at.floats(op.operands[1]), float(str(op.attrs["eps"]))
    return Normed(x, weight, eps, lambda: _norm(at, op, x, "rms_norm", at.device.rms_norm))


@_lowering
def _layer_norm(at: Lowering, op: Op) -> Node:
    return whole(_norm(at, op, at.tensor(op.operands[0]), "layer_norm", at.device.layer_norm))


def _norm(at: Lowering, op: Op, x: Tensor, kind: str, make: Callable[..., Any]) -> Tensor:
    (inner,) = op.operands[1].type.shape
    key = (x.rows, x.width, inner, float(str(op.attrs["eps"])))
    args = [x.var, *map(at.floats, op.operands[1:])]
    var = at.f.call(kind, key, lambda: make(*key), args, at.f.type_of(x.rows, x.width))
    return Tensor(var, x.rows, x.width)


LOWERINGS["embedding"] = lambda at, op: [lower_embedding(at, op)]
LOWERINGS["linear"] = lambda at, op: [lower_linear(at, op)]


# ---- attention ----------------------------------------------------------------------------------


def _gqa(at: Lowering, op: Op) -> Sequence[Node]:
    key, value, *rest = op.operands
    inv_freq = rest.pop() if op.attrs["rotary"] else None
    h = heads_of(op, inv_freq, at.capacity)
    assert isinstance(key, Value) and isinstance(value, Value)
    caches = [at.f.cache(int(c.name.split(".")[1]) * 2 + i, shape)
              for i, (c, shape) in enumerate(((key, h.key_shape), (value, h.value_shape)))]  # fmt: skip
    packed = stacked(at, rest)
    nodes: list[Node] = [at.node(o) for o in rest] if packed is None else [whole(packed)]
    tensors, rows = _sources(nodes, h, at)
    turn = [] if inv_freq is None else _rotary(at, op, inv_freq, h.rotary // 2)
    args = [at.f.past, *(t.var for t in tensors), *turn]
    width, n = h.heads * h.dim, at.f.rows
    out = at.f.type_of(n, width)
    q = at.f.call_inplace("append", (n, h, rows), lambda: at.device.append(n, h, rows), args, caches, out)
    y = at.f.call("attention", (n, h), lambda: at.device.attention(n, h), [at.f.past, q, *caches], out)
    return [whole(Tensor(y, n, width)), at.node(key), at.node(value)]


LOWERINGS["gqa"] = _gqa


def heads_of(op: Op, inv_freq: Operand | None, capacity: int) -> Heads:
    """The sizes of an attention."""
    a = {
        name: float(str(op.attrs.get(name) or 0))
        for name in ("heads", "kv_heads", "scale", "window", "softcap")
    }
    dim = op.operands[0].type.shape[3]
    half = inv_freq.type.shape[0] if inv_freq is not None else 0
    assert isinstance(dim, int) and isinstance(half, int)
    return Heads(
        int(a["heads"]),
        int(a["kv_heads"]),
        dim,
        capacity,
        a["scale"],
        2 * half,
        int(a["window"]),
        a["softcap"],
    )


def _sources(nodes: list[Node], h: Heads, at: Lowering) -> tuple[list[Tensor], Rows]:
    """The tensors that hold q, k and v, and where in them: one packed value, or three."""
    parts = [n if isinstance(n, Part) else whole(at.f.tensor(n)) for n in nodes]
    if len(parts) == 1:
        (x,) = parts
        starts = (0, h.heads * h.dim, (h.heads + h.kv_heads) * h.dim)
        parts = [Part(x.tensor, x.column + start, 0) for start in starts]
    tensors = list({id(p.tensor): p.tensor for p in parts}.values())
    q, k, v = ((next(i for i, t in enumerate(tensors) if t is p.tensor), p.column) for p in parts)
    return tensors, Rows(tuple(t.width for t in tensors), (q, k, v))


def _rotary(at: Lowering, op: Op, inv_freq: Operand, half: int) -> list[Any]:
    """cos and sin of the function's positions, computed once for all layers that share the frequencies."""
    assert isinstance(inv_freq, WeightRef)
    scaling, n = float(str(op.attrs.get("scaling", 1.0))), at.f.rows

    def make() -> list[Any]:
        key = (n, half, scaling)
        args = [at.f.past, at.f.ids.var, at.floats(inv_freq)]
        types = [at.f.type_of(n, half)] * 2
        both: list[Any] = at.f.call("rotary_table", key, lambda: at.device.rotary_table(*key), args, types)
        return both

    made: list[Any] = at.f.shared(f"rotary {inv_freq.name} {scaling}", make)
    return made
