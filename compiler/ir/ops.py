"""The table of ops. An op is its type rule: operand types and attributes in, result types out.

A rule raises TypeRuleError when its operands don't fit; the verifier needs nothing else. A rule
whose parameter is named `attrs` receives the attributes. `@op(name=type)` lists the attributes that
an op must carry; an attribute with a default in the rule's text is optional. `compute` (the type
that an op computes in) is allowed everywhere.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gammac.ir.core import Attrs
from gammac.ir.types import FLOATS, Dim, Sym, TensorType

Types = tuple[TensorType, ...]


class TypeRuleError(Exception):
    """The operands of an op don't fit together."""


@dataclass(frozen=True)
class OpSpec:
    """What the table knows of an op: required and optional attributes, and its rule."""

    name: str
    rule: Callable[..., Types]
    required: Mapping[str, type]
    optional: Mapping[str, type]
    min_operands: int
    max_operands: int | None
    doc: str

    def infer(self, operands: Types, attrs: Attrs) -> Types:
        """Result types. Raises TypeRuleError."""
        if len(operands) < self.min_operands or (
            self.max_operands is not None and len(operands) > self.max_operands
        ):
            raise TypeRuleError(f"{self.name} takes {_arity_text(self)} operands, not {len(operands)}")
        missing = [name for name in self.required if name not in attrs]
        if missing:
            raise TypeRuleError(f"{self.name} needs the attribute {', '.join(missing)}")
        if "attrs" in inspect.signature(self.rule).parameters:
            return self.rule(*operands, attrs=attrs)
        return self.rule(*operands)


OPS: Final[dict[str, OpSpec]] = {}
ANYWHERE: Final[Mapping[str, type]] = {"compute": str}


def _arity_text(spec: OpSpec) -> str:
    if spec.max_operands is None:
        return f"at least {spec.min_operands}"
    if spec.min_operands == spec.max_operands:
        return str(spec.min_operands)
    return f"{spec.min_operands} to {spec.max_operands}"


def op(
    optional: Mapping[str, type] | None = None, **required: type
) -> Callable[[Callable[..., Types]], Callable[..., Types]]:
    """Put a type rule into the table under its own name; a name may be taken once."""

    def register(rule: Callable[..., Types]) -> Callable[..., Types]:
        name = rule.__name__.rstrip("_")
        assert name not in OPS, f"the op {name} is defined twice"
        parameters = [p for p in inspect.signature(rule).parameters.values() if p.name != "attrs"]
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        needed = sum(p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in parameters)
        OPS[name] = OpSpec(
            name, rule, required, {**(optional or {}), **ANYWHERE}, needed,
            None if variadic else len(parameters), inspect.getdoc(rule) or "",
        )  # fmt: skip
        return rule

    return register


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise TypeRuleError(message)


def _float(x: TensorType) -> None:
    _require(x.dtype in FLOATS, f"{x} is not a float tensor")


def broadcast(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The shape of an elementwise result, by numpy's rule. Raises TypeRuleError."""
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    shape: list[Dim] = []
    for left, right in zip(a, b, strict=True):
        _require(left == right or 1 in (left, right), f"sizes {left} and {right} don't broadcast")
        shape.append(right if left == 1 else left)
    return tuple(shape)


def _elementwise(x: TensorType, y: TensorType) -> Types:
    _require(x.dtype == y.dtype, f"element types {x.dtype} and {y.dtype} differ")
    return (TensorType(x.dtype, broadcast(x.shape, y.shape)),)


# ---- weights ------------------------------------------------------------------------------------


@op()
def linear(x: TensorType, weight: TensorType, bias: TensorType | None = None) -> Types:
    """y = x @ weight.T + bias; x [..., in], weight [out, in], bias [out]."""
    _float(x)
    _require(weight.rank == 2, f"the weight of a linear has two dimensions, not {weight}")
    out_features, in_features = weight.shape
    _require(x.shape[-1] == in_features, f"x has {x.shape[-1]} features, the weight wants {in_features}")
    if bias is not None:
        _require(bias.shape == (out_features,), f"the bias is {bias}, the weight has {out_features} rows")
    return (x.with_shape(*x.shape[:-1], out_features),)


@op()
def embedding(ids: TensorType, weight: TensorType) -> Types:
    """Rows of weight [rows, width] at ids (any shape, integers): [*ids, width]."""
    _require(ids.dtype in ("i64", "i32"), f"ids are integers, not {ids}")
    _require(weight.rank == 2, f"an embedding has two dimensions, not {weight}")
    return (weight.with_shape(*ids.shape, weight.shape[1]),)


@op({"scale": float}, bits=int)
def fake_quantize(x: TensorType, *, attrs: Attrs) -> Types:
    """x rounded to integers of `bits` bits, -top to top with top = 2^(bits-1) - 1, and multiplied back by
    their step: `scale`, or without it the largest magnitude along the last dimension over top."""
    _float(x)
    bits, scale = attrs["bits"], attrs.get("scale", 1.0)
    _require(bits in range(2, 9), f"integers have 2 to 8 bits, not {bits}")
    _require(isinstance(scale, float) and 0 < scale < float("inf"), f"a step is above zero, not {scale!r}")
    return (x,)


# ---- norms and attention ------------------------------------------------------------------------


@op(eps=float)
def rms_norm(x: TensorType, weight: TensorType) -> Types:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""
    _float(x)
    _require(weight.shape == x.shape[-1:], f"the weight is {weight}, x ends in {x.shape[-1]}")
    return (x,)


@op(eps=float)
def layer_norm(x: TensorType, weight: TensorType, bias: TensorType) -> Types:
    """(x - mean) / sqrt(var + eps) * weight + bias, over the last dimension."""
    _float(x)
    _require(weight.shape == bias.shape == x.shape[-1:], f"weight {weight} or bias {bias} don't fit {x}")
    return (x,)


@op({"scaling": float})
def rotary_table(position_ids: TensorType, inv_freq: TensorType) -> Types:
    """cos and sin of position * inv_freq, times scaling: two [batch, seq, 2*len(inv_freq)] tables,
    the second half a copy of the first."""
    _require(inv_freq.rank == 1, f"inv_freq is a vector, not {inv_freq}")
    table = TensorType("f32", (*position_ids.shape, inv_freq.shape[0] * 2))
    return (table, table)


@op()
def rope(x: TensorType, cos: TensorType, sin: TensorType) -> Types:
    """x * cos + rotate_half(x) * sin on the first cos.shape[-1] features; x [batch, heads, seq, dim]."""
    _float(x)
    _require(x.rank == 4 and cos.rank == 3 and cos.shape == sin.shape, f"rope of {x} by {cos} and {sin}")
    _require(cos.shape[1] == x.shape[2], f"tables for {cos.shape[1]} positions, x has {x.shape[2]}")
    return (x,)


@op({"window": int, "softcap": float}, scale=float, causal=bool)
def attention(q: TensorType, k: TensorType, v: TensorType, mask: TensorType | None = None) -> Types:
    """softmax(cap(scale * q k^T) + mask) v, softmax in f32. q [batch, heads, seq, dim],
    k and v [batch, kv_heads, total, dim]; query i sees keys up to total - seq + i when causal, and
    only the last `window` of them when window > 0. mask (bool, true = visible) broadcasts to
    [batch, heads, seq, total]."""
    _require(q.rank == k.rank == v.rank == 4, "attention takes [batch, heads, seq, dim] tensors")
    _require(q.shape[3] == k.shape[3], f"q has {q.shape[3]} features a head, k has {k.shape[3]}")
    _require(k.shape[:3] == v.shape[:3], f"k is {k}, v is {v}")
    heads, kv_heads = q.shape[1], k.shape[1]
    grouped = isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads == 0
    _require(grouped, f"{heads} heads don't share {kv_heads} key heads evenly")
    return (q.with_shape(*q.shape[:3], v.shape[3]),)


@op()
def kv_append(past: TensorType, new: TensorType) -> Types:
    """The cache [batch, kv_heads, past, dim] with new rows [batch, kv_heads, seq, dim] behind it."""
    fits = past.rank == new.rank == 4 and past.shape[:2] == new.shape[:2] and past.shape[3] == new.shape[3]
    _require(fits and past.dtype == new.dtype, f"can't append {new} to {past}")
    return (new.with_shape(*new.shape[:2], past.shape[2] + new.shape[2], new.shape[3]),)


@op(dim=int)
def softmax(x: TensorType) -> Types:
    """exp(x - max) / sum over `dim`."""
    _float(x)
    return (x,)


# ---- elementwise --------------------------------------------------------------------------------


def _unary(name: str, doc: str, optional: Mapping[str, type] | None = None, **required: type) -> None:
    def rule(x: TensorType) -> Types:
        return (x,)

    rule.__name__, rule.__doc__ = name, doc
    op(optional, **required)(rule)


_unary("silu", "x * sigmoid(x)")
_unary("gelu", "x * Phi(x); approximate = tanh for the tanh form", {"approximate": str})
_unary("relu", "max(x, 0)")
_unary("tanh", "tanh(x)")
_unary("sigmoid", "1 / (1 + exp(-x))")
_unary("exp", "e^x")
_unary("cos", "cos(x)")
_unary("sin", "sin(x)")
_unary("neg", "-x")
_unary("rsqrt", "1 / sqrt(x)")
_unary("pow", "x^exponent", exponent=float)
_unary("scale", "x * by", by=float)
_unary("shift", "x + by", by=float)


@op()
def add(x: TensorType, y: TensorType) -> Types:
    """x + y, broadcast."""
    return _elementwise(x, y)


@op()
def sub(x: TensorType, y: TensorType) -> Types:
    """x - y, broadcast."""
    return _elementwise(x, y)


@op()
def mul(x: TensorType, y: TensorType) -> Types:
    """x * y, broadcast."""
    return _elementwise(x, y)


@op()
def div(x: TensorType, y: TensorType) -> Types:
    """x / y, broadcast."""
    return _elementwise(x, y)


@op()
def residual_add(x: TensorType, y: TensorType) -> Types:
    """x + y on the residual stream: kept in high precision from capture to artifact."""
    _require(x.shape == y.shape, f"a residual is {x}, what is added is {y}")
    return _elementwise(x, y)


@op(dtype=str)
def cast(x: TensorType, *, attrs: Attrs) -> Types:
    """x in another element type."""
    return (TensorType(str(attrs["dtype"]), x.shape),)


# ---- shapes -------------------------------------------------------------------------------------


def _dims(value: object) -> tuple[Dim, ...]:
    _require(isinstance(value, tuple), "a shape is a list of sizes")
    assert isinstance(value, tuple)
    return tuple(d for d in value if isinstance(d, int | Sym))


def _size(shape: tuple[Dim, ...]) -> Dim:
    total: Dim = 1
    for dim in shape:
        total = total * dim
    return total


@op(shape=tuple)
def reshape(x: TensorType, *, attrs: Attrs) -> Types:
    """The same elements, in order, in another shape."""
    shape = _dims(attrs["shape"])
    _require(_size(shape) == _size(x.shape), f"{x} has no reshape to {list(map(str, shape))}")
    return (x.with_shape(*shape),)


@op(shape=tuple)
def expand(x: TensorType, *, attrs: Attrs) -> Types:
    """x broadcast to a shape."""
    shape = _dims(attrs["shape"])
    _require(broadcast(x.shape, shape) == shape, f"{x} doesn't broadcast to {list(map(str, shape))}")
    return (x.with_shape(*shape),)


@op(perm=tuple)
def transpose(x: TensorType, *, attrs: Attrs) -> Types:
    """Dimensions in another order."""
    perm: Any = attrs["perm"]
    _require(sorted(perm) == list(range(x.rank)), f"{list(perm)} is no order of {x.rank} dimensions")
    return (x.with_shape(*(x.shape[i] for i in perm)),)


@op(dim=int, start=int, end=int)
def slice_(x: TensorType, *, attrs: Attrs) -> Types:
    """x[start:end] along `dim`; both bounds fixed and inside the dimension."""
    dim, start, end = (attrs[k] for k in ("dim", "start", "end"))
    assert isinstance(dim, int) and isinstance(start, int) and isinstance(end, int)
    _require(0 <= dim < x.rank, f"{x} has no dimension {dim}")
    size = x.shape[dim]
    inside = 0 <= start <= end and (not isinstance(size, int) or end <= size)
    _require(inside, f"{start}:{end} is not inside {size}")
    return (x.with_shape(*x.shape[:dim], end - start, *x.shape[dim + 1 :]),)


@op(dim=int)
def last(x: TensorType, *, attrs: Attrs) -> Types:
    """The last element along `dim`, which stays with size one: a slice of a dimension of unknown size."""
    dim = int(str(attrs["dim"]))
    _require(0 <= dim < x.rank, f"{x} has no dimension {dim}")
    return (x.with_shape(*x.shape[:dim], 1, *x.shape[dim + 1 :]),)


@op(dim=int)
def concat(*xs: TensorType, attrs: Attrs) -> Types:
    """Tensors joined along `dim`."""
    dim = attrs["dim"]
    assert isinstance(dim, int)
    _require(len(xs) > 0 and 0 <= dim < xs[0].rank, f"nothing to join along {dim}")
    for x in xs:
        rest = x.shape[:dim] + x.shape[dim + 1 :]
        fits = x.dtype == xs[0].dtype and rest == xs[0].shape[:dim] + xs[0].shape[dim + 1 :]
        _require(fits, f"{x} doesn't join {xs[0]} along {dim}")
    total = sum(x.shape[dim] for x in xs)
    return (xs[0].with_shape(*xs[0].shape[:dim], total, *xs[0].shape[dim + 1 :]),)


@op()
def matmul(x: TensorType, y: TensorType) -> Types:
    """x @ y on the last two dimensions, the others broadcast."""
    _require(x.rank >= 2 and y.rank >= 2, "matmul takes matrices")
    _require(x.shape[-1] == y.shape[-2], f"{x} @ {y}: {x.shape[-1]} is not {y.shape[-2]}")
    return (x.with_shape(*broadcast(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1]),)


@op({"keepdim": bool}, dim=int)
def mean(x: TensorType, *, attrs: Attrs) -> Types:
    """Mean over `dim`, kept as size 1."""
    dim = attrs["dim"]
    assert isinstance(dim, int)
    return (x.with_shape(*x.shape[:dim], 1, *x.shape[dim + 1 :]),)


@op(shape=tuple, dtype=str, value=float)
def full(*, attrs: Attrs) -> Types:
    """A tensor of one value."""
    return (TensorType(str(attrs["dtype"]), _dims(attrs["shape"])),)


# ---- what legalization makes --------------------------------------------------------------------


@op(dim=int, sizes=tuple)
def split(x: TensorType, *, attrs: Attrs) -> Types:
    """x cut along `dim` into parts of the given sizes, which add up to the whole."""
    dim, sizes = attrs["dim"], _dims(attrs["sizes"])
    assert isinstance(dim, int)
    _require(0 <= dim < x.rank and sum(sizes) == x.shape[dim], f"{list(sizes)} is no cut of {x} along {dim}")
    return tuple(x.with_shape(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes)


@op(
    {"window": int, "softcap": float, "scaling": float},
    heads=int, kv_heads=int, scale=float, rotary=bool,
)  # fmt: skip
def gqa(past_key: TensorType, past_value: TensorType, *rows: TensorType, attrs: Attrs) -> Types:
    """Rotary positions, cache and causal attention in one: the rows' attention, the two longer caches.

    past [batch, kv_heads, past, dim]; rows are q [batch, seq, heads*dim], k and v [batch, seq,
    kv_heads*dim], or one tensor with the three side by side; with `rotary`, inv_freq comes last: row i
    is turned by (past + i) * inv_freq, its tables times `scaling`. Otherwise as `attention`."""
    heads, kv_heads, rotary = attrs["heads"], attrs["kv_heads"], attrs["rotary"]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    rows = rows[: len(rows) - bool(rotary)]
    fits = past_key == past_value and past_key.rank == 4 and past_key.shape[1] == kv_heads
    _require(fits and len(rows) in (1, 3), "gqa takes two caches and q, k, v, apart or as one")
    dim = past_key.shape[3]
    widths = [heads * dim, kv_heads * dim, kv_heads * dim]
    expected = widths if len(rows) == 3 else [sum(widths)]
    _require([x.shape[-1] for x in rows] == expected, f"rows of gqa are {expected} wide")
    batch, seq, _ = rows[0].shape
    present = past_key.with_shape(batch, kv_heads, past_key.shape[2] + seq, dim)
    return (rows[0].with_shape(batch, seq, heads * dim), present, present)
