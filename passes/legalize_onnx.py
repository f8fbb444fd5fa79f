"""Write the function that the ONNX artifact runs in the shapes that ONNX Runtime is fastest at.

    %1 = transpose %0 {perm = [0, 2, 1, 3]}                        %0 is a reshape of %qkv's first slice
    %2 = rope %1, %cos, %sin                                       and k alike
    %3 = kv_append %past_key.0, %k                                 and v
    %4 = attention %2, %3, %v {scale = 0.125, causal = true}
    %5 = transpose %4 {perm = [0, 2, 1, 3]}
    %6 = reshape %5 {shape = [batch, seq, 576]}
->
    %6, %7, %8 = gqa %past_key.0, %past_value.0, %qkv, @inv_freq {heads = 9, kv_heads = 3, …}

Before that, linears that read the same value are fused; after it, slices that cut a whole value up become
one `split`. Of a decoder only `decode` is kept: with an
empty cache it is the prefill. What does not have these shapes stays as it is, and is emitted op by op.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

from gammac.diagnostics import CompileError
from gammac.ir import Attr, Builder, Function, Module, Op, Operand, TensorType, Value, WeightRef, rewrite
from gammac.ir.core import Attrs
from gammac.passes.fuse_parallel_linears import FuseParallelLinears
from gammac.pipeline import Context, Invariant

SWAP_HEADS = (0, 2, 1, 3)


@dataclass(frozen=True)
class Sizes:
    """What an attention kernel asks of its sizes: what a head's features, a turned head's features and
    the features that are turned are multiples of."""

    head: int
    rotary_head: int
    rotary: int


GROUP_QUERY_ATTENTION = Sizes(head=8, rotary_head=16, rotary=16)


@dataclass(frozen=True)
class LegalizeOnnx:
    """Raise attention with its cache to `gqa`, slices to `split`, and drop what is not emitted. `context` is
    the longest sequence of tokens that the artifact takes (0: what the model was trained on)."""

    name: ClassVar[str] = "legalize_onnx"
    reads: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()
    context: int = 0

    def run(self, module: Module, ctx: Context) -> Module:
        """The module with one function, `decode` or, for an encoder, `forward`."""
        module = within_context(module, self.context)
        name = "decode" if "decode" in module.functions else "forward"
        module = replace(module, functions={name: module.functions[name]})
        module = FuseParallelLinears().run(module, ctx)
        function = cancel_layouts(raise_attention(module.functions[name]))
        return module.with_functions(raise_splits(pack_rows(function))).without_unused_weights()


def within_context(module: Module, context: int) -> Module:
    """The module for sequences of `context` tokens (0: as it is). Raises CompileError for more."""
    most = module.attrs.get("max_positions")
    if context and isinstance(most, int) and context > most:
        raise CompileError(
            f"a context of {context} tokens is more than the {most} that {module.name} takes",
            hint=f"give --context {most} or less",
        )
    return module.with_attrs(max_positions=context) if context else module


# ---- attention ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attention:
    """An attention over cached keys and values, as found in the function under construction."""

    q: Value
    k: Value
    v: Value
    key_append: Op
    value_append: Op
    rotary: tuple[WeightRef, Attrs] | None


def raise_attention(function: Function, sizes: Sizes = GROUP_QUERY_ATTENTION) -> Function:
    """Causal attention over a cache that is a parameter becomes `gqa` where the sizes fit its kernel."""
    users = function.users()
    presents: dict[Value, Value] = {}

    def rule(b: Builder, op: Op, operands: tuple[Operand, ...]) -> Sequence[Operand] | None:
        if op.name != "attention" or any(
            users.get(o) != [op] for o in op.operands[1:] if isinstance(o, Value)
        ):
            return None
        found = _match(op, operands, _producers(b), function.params, sizes)
        return None if found is None else (_emit_gqa(b, op, found, presents),)

    raised = rewrite(function, rule)
    returns = tuple(presents.get(o, o) if isinstance(o, Value) else o for o in raised.returns)
    return rewrite(replace(raised, returns=returns), lambda b, op, operands: None) if presents else raised


def _producers(b: Builder) -> dict[Value, Op]:
    return {value: op for op in b.ops for value in op.results}


def _match(
    op: Op, operands: tuple[Operand, ...], made_by: Mapping[Value, Op], params: Sequence[Value], sizes: Sizes
) -> _Attention | None:
    if len(operands) != 3 or not op.attrs["causal"]:
        return None
    q, *cached = operands
    appends = [made_by[o] for o in cached if isinstance(o, Value) and o in made_by]
    if len(appends) != 2 or any(a.name != "kv_append" or a.operands[0] not in params for a in appends):
        return None
    k, v = (a.operands[1] for a in appends)
    assert isinstance(q, Value) and isinstance(k, Value) and isinstance(v, Value)
    dim = q.type.shape[3]
    if v.type.shape[3] != dim or not isinstance(dim, int) or dim % sizes.head:
        return None
    turned = _shared_rotation(q, k, made_by, params, sizes)
    if turned is None:
        return _Attention(q, k, v, appends[0], appends[1], None)
    q, k, table = turned
    inv_freq = table.operands[1]
    assert isinstance(inv_freq, WeightRef)
    return _Attention(q, k, v, appends[0], appends[1], (inv_freq, table.attrs))


def _shared_rotation(
    q: Value, k: Value, made_by: Mapping[Value, Op], params: Sequence[Value], sizes: Sizes
) -> tuple[Value, Value, Op] | None:
    """q and k before their rotation and its table, if GroupQueryAttention can do it itself."""
    ropes = [made_by.get(q), made_by.get(k)]
    tables = {
        made_by.get(o)
        for r in ropes
        if r and r.name == "rope"
        for o in r.operands[1:]
        if isinstance(o, Value)
    }
    q_rope, k_rope = ropes
    if q_rope is None or k_rope is None or q_rope.name != k_rope.name or len(tables) != 1:
        return None
    (table,) = tables
    if table is None or table.name != "rotary_table" or not isinstance(table.operands[1], WeightRef):
        return None
    positions, inv_freq = table.operands
    width, dim = inv_freq.type.shape[0] * 2, q.type.shape[3]
    assert isinstance(width, int) and isinstance(dim, int)
    standard = all(r.operands[1:] == table.results for r in (q_rope, k_rope)) and positions in params
    if not standard or dim % sizes.rotary_head or width % sizes.rotary or width > dim:
        return None
    q, k = q_rope.operands[0], k_rope.operands[0]  # type: ignore[assignment]
    return q, k, table


def _emit_gqa(b: Builder, op: Op, found: _Attention, presents: dict[Value, Value]) -> Value:
    batch, heads, seq, dim = found.q.type.shape
    kv_heads = found.k.type.shape[1]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    rows = [_rows(b, x, _producers(b)) for x in (found.q, found.k, found.v)]
    attrs: dict[str, Attr] = {"heads": heads, "kv_heads": kv_heads, "rotary": found.rotary is not None}
    attrs |= {k: v for k, v in op.attrs.items() if k in ("scale", "window", "softcap", "compute") and v}
    tables: tuple[WeightRef, ...] = ()
    if found.rotary is not None:
        tables = (found.rotary[0],)
        attrs |= {k: v for k, v in found.rotary[1].items() if k == "scaling"}
    pasts = (found.key_append.operands[0], found.value_append.operands[0])
    out, key, value = b.emit_all("gqa", *pasts, *rows, *tables, loc=op.loc, **attrs)
    presents[found.key_append.result], presents[found.value_append.result] = key, value
    by_head = b.emit("reshape", out, loc=op.loc, shape=(batch, seq, heads, dim))
    return b.emit("transpose", by_head, loc=op.loc, perm=SWAP_HEADS)


def _rows(b: Builder, x: Value, made_by: Mapping[Value, Op]) -> Value:
    """[batch, heads, seq, dim] as [batch, seq, heads*dim]."""
    batch, heads, seq, dim = x.type.shape
    return b.emit("reshape", _by_position(b, x, made_by), shape=(batch, seq, heads * dim))


def _by_position(b: Builder, x: Value, made_by: Mapping[Value, Op]) -> Value:
    """[batch, heads, seq, dim] as [batch, seq, heads, dim]; a norm of each head stays a norm of each head."""
    op = made_by.get(x)
    if op is not None and op.name == "rms_norm" and isinstance(op.operands[0], Value):
        inner = _by_position(b, op.operands[0], made_by)
        return b.emit("rms_norm", inner, op.operands[1], loc=op.loc, **op.attrs)
    return b.emit("transpose", x, loc=op.loc if op else "", perm=SWAP_HEADS)


# ---- layouts and slices -------------------------------------------------------------------------


def cancel_layouts(function: Function) -> Function:
    """Without transposes that undo each other and reshapes of reshapes."""
    made_by: dict[Value, Op] = {}

    def rule(b: Builder, op: Op, operands: tuple[Operand, ...]) -> Sequence[Operand] | None:
        if b.ops:
            made_by.update({value: b.ops[-1] for value in b.ops[-1].results})
        if op.name == "concat" and (whole := _rejoined(b, op, operands, made_by)) is not None:
            return (whole,)
        if op.name not in ("reshape", "transpose"):
            return None
        x = operands[0]
        inner = made_by.get(x) if isinstance(x, Value) else None
        if inner is not None and inner.name == op.name and (short := _shortened(b, op, inner)) is not None:
            return (short,)
        return (x,) if x.type == op.result.type and op.name == "reshape" else None

    return rewrite(function, rule)


def _shortened(b: Builder, op: Op, inner: Op) -> Operand | None:
    """What `op` makes, straight from the operand of `inner`, an op of the same kind."""
    source = inner.operands[0]
    if op.name == "reshape":
        if source.type == op.result.type:
            return source
        return b.emit("reshape", source, loc=op.loc, **op.attrs)
    outer, first = op.attrs["perm"], inner.attrs["perm"]
    assert isinstance(outer, tuple) and isinstance(first, tuple)
    both = tuple(first[i] for i in outer if isinstance(i, int))
    return source if both == tuple(range(len(both))) else None


def _rejoined(
    b: Builder, op: Op, operands: tuple[Operand, ...], made_by: Mapping[Value, Op]
) -> Operand | None:
    """The one slice that slices side by side, joined again, are."""
    slices = [made_by[o] for o in operands if isinstance(o, Value) and o in made_by]
    if len(slices) != len(operands) or any(s.name != "slice" for s in slices):
        return None
    source, dim = slices[0].operands[0], slices[0].attrs["dim"]
    apart = any(one.attrs["end"] != next_.attrs["start"] for one, next_ in pairwise(slices))
    if (
        apart
        or op.attrs["dim"] != dim
        or any(s.operands[0] is not source or s.attrs["dim"] != dim for s in slices)
    ):
        return None
    start, end = slices[0].attrs["start"], slices[-1].attrs["end"]
    if start == 0 and end == source.type.shape[int(str(dim))]:
        return source
    return b.emit("slice", source, loc=op.loc, dim=dim, start=start, end=end)


def pack_rows(function: Function) -> Function:
    """`gqa` of three slices that lie side by side reads what they are slices of."""
    made_by = function.producers()

    def rule(b: Builder, op: Op, operands: tuple[Operand, ...]) -> Sequence[Operand] | None:
        if op.name != "gqa" or len(op.operands) < 5:
            return None
        slices = [made_by[o] for o in op.operands[2:5] if isinstance(o, Value) and o in made_by]
        side_by_side = len(slices) == 3 and all(s.name == "slice" for s in slices) and _tiles(slices)
        if not side_by_side or slices != sorted(slices, key=_start):
            return None
        whole = _producers(b)[operands[2]].operands[0]  # type: ignore[index]
        return b.emit_all("gqa", *operands[:2], whole, *operands[5:], loc=op.loc, **op.attrs)

    return rewrite(function, rule)


def raise_splits(function: Function) -> Function:
    """Slices that together are the whole of a value become one `split`."""
    slices: dict[tuple[Operand, Attr], list[Op]] = {}
    for op in function.ops:
        if op.name == "slice":
            slices.setdefault((op.operands[0], op.attrs["dim"]), []).append(op)
    first = {found[0]: found for found in slices.values() if _tiles(found)}
    replaced: dict[Op, Value] = {}

    def rule(b: Builder, op: Op, operands: tuple[Operand, ...]) -> Sequence[Operand] | None:
        if op in first:
            parts = sorted(first[op], key=_start)
            dim = op.attrs["dim"]
            sizes = tuple(part.result.type.shape[int(str(dim))] for part in parts)
            values = b.emit_all("split", operands[0], loc=op.loc, dim=dim, sizes=sizes)
            replaced.update(zip(parts, values, strict=True))
        return (replaced[op],) if op in replaced else None

    return rewrite(function, rule)


def _start(op: Op) -> int:
    start = op.attrs["start"]
    assert isinstance(start, int)
    return start


def _tiles(slices: list[Op]) -> bool:
    """Whether slices, two or more, cut one value up from its start to its end."""
    if len({(op.operands[0], op.attrs["dim"]) for op in slices}) > 1:
        return False
    ordered = sorted(slices, key=_start)
    dim = ordered[0].attrs["dim"]
    assert isinstance(dim, int)
    whole: TensorType = ordered[0].operands[0].type
    ends = [0, *(op.attrs["end"] for op in ordered)]
    return len(ordered) > 1 and [*map(_start, ordered), whole.shape[dim]] == ends
