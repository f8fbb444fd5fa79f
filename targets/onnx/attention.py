"""Lowering of attention: GroupQueryAttention where legalization found it, plain operators elsewhere."""

from collections.abc import Sequence
from typing import Final

import onnx_ir as ir

from gammac.diagnostics import CompileError
from gammac.ir import Function, Op, Operand, WeightRef
from gammac.targets.onnx.graph import INT32, MICROSOFT, GraphWriter

FLOAT: Final = ir.DataType.FLOAT
BOOL: Final = ir.DataType.BOOL
HIDDEN: Final = -1e30
MASK: Final = "attention_mask"


def set_decoder_sizes(g: GraphWriter, ids: ir.Value, mask: ir.Value) -> None:
    """Sizes from the ids [batch, seq] and the mask [batch, total]; a cache may be longer than `past`."""
    g.sizes |= {
        "batch": g.op("Shape", ids, start=0, end=1),
        "seq": g.op("Shape", ids, start=1, end=2),
    }
    total = g.op("Shape", mask, start=1, end=2)
    g.sizes |= {"total": total, "past": g.op("Sub", total, g.sizes["seq"])}


def positions(g: GraphWriter, mask: ir.Value) -> ir.Value:
    """Position of each new token [batch, seq]: how many visible tokens stand before it."""
    counted = g.op("Sub", g.op("CumSum", mask, g.const(1)), g.const(1))
    first = g.op("Neg", g.sizes["seq"])
    return g.op("Slice", counted, first, g.const([2**31 - 1]), g.const([1]))


def lower_gqa(g: GraphWriter, op: Op) -> Sequence[ir.Value]:
    """com.microsoft::GroupQueryAttention: rotary positions, cache and causal attention in one.

    CUDA's takes halves only: there its operands and the cache are f16, and its sums f32 all the same.
    """
    attrs = op.attrs
    key, value, *rows = (g.operand(o) for o in op.operands[: len(op.operands) - bool(attrs["rotary"])])
    tables = _rotary_tables(g, op) if attrs["rotary"] else ()
    mask = g.by_name[MASK]
    counted = g.shared("mask sum", "ReduceSum", mask, g.const([1]), keepdims=0)
    less = g.shared("mask sum - 1", "Sub", counted, g.const(1))
    last = g.shared("seqlens_k", "Cast", less, to=INT32)
    scalar = g.shared("total", "Squeeze", g.sizes["total"], g.const([0]))
    total = g.shared("total_sequence_length", "Cast", scalar, to=INT32)
    apart: list[ir.Value | None] = [*rows, None, None]
    window = attrs.get("window", 0)
    made = g.ops(
        "GroupQueryAttention", *(_half(g, row) for row in apart[:3]), key, value, last, total,
        *(_half(g, table) for table in tables), outputs=3, domain=MICROSOFT,
        num_heads=attrs["heads"], kv_num_heads=attrs["kv_heads"], scale=attrs["scale"],
        do_rotary=1 if tables else None, softcap=attrs.get("softcap"), local_window_size=window or None,
    )  # fmt: skip
    return (g.op("Cast", made[0], to=FLOAT), *made[1:]) if g.on_gpu else made


def caches_in_halves(function: Function) -> set[Operand]:
    """The values that CUDA's GroupQueryAttention keeps in f16."""
    found = [op for op in function.ops if op.name == "gqa"]
    return {value for op in found for value in (*op.operands[:2], *op.results[1:])}


def _half(g: GraphWriter, value: ir.Value | None) -> ir.Value | None:
    if value is None or not g.on_gpu:
        return value
    return g.shared(f"{value.name} as f16", "Cast", value, to=ir.DataType.FLOAT16)


def _rotary_tables(g: GraphWriter, op: Op) -> tuple[ir.Value, ir.Value]:
    """cos and sin [positions, width / 2]: not stored, ONNX Runtime computes them when it loads the model."""
    inv_freq = op.operands[-1]
    assert isinstance(inv_freq, WeightRef)
    length, scaling = g.module.attrs.get("max_positions"), op.attrs.get("scaling", 1.0)
    if not isinstance(length, int):
        raise CompileError(
            "the module doesn't say its context length", hint="set max_positions on the module"
        )
    key = f"{inv_freq.name}*{scaling}"
    indices = g.shared("positions", "Range", g.const(0), g.const(length), g.const(1))
    as_float = g.shared("positions f32", "Cast", indices, to=FLOAT)
    column = g.shared("positions column", "Unsqueeze", as_float, g.const([1]))
    angles = g.shared(f"{key} angles", "Mul", column, g.float_weight(inv_freq))
    tables = tuple(g.shared(f"{key} {kind}", kind, angles) for kind in ("Cos", "Sin"))
    if scaling != 1.0:
        by = g.const(float(str(scaling)), "f32")
        tables = tuple(g.shared(f"{key} scaled {i}", "Mul", table, by) for i, table in enumerate(tables))
    return tables[0], tables[1]


# ---- plain operators ----------------------------------------------------------------------------


def lower_rotary_table(g: GraphWriter, op: Op) -> Sequence[ir.Value]:
    """cos and sin of position * inv_freq, [batch, seq, width]."""
    column = g.op("Unsqueeze", g.op("Cast", g.operand(op.operands[0]), to=FLOAT), g.const([2]))
    half = g.op("Mul", column, g.operand(op.operands[1]))
    angles = g.op("Concat", half, half, axis=2)
    scaling = g.const(float(str(op.attrs.get("scaling", 1.0))), "f32")
    return [g.op("Mul", g.op(kind, angles), scaling) for kind in ("Cos", "Sin")]


def lower_rope(g: GraphWriter, op: Op) -> Sequence[ir.Value]:
    """x * cos + rotate_half(x) * sin on the first features, the others as they are."""
    x, cos, sin = (g.operand(o) for o in op.operands)
    width, dim = op.operands[1].type.shape[-1], op.operands[0].type.shape[-1]
    assert isinstance(width, int) and isinstance(dim, int)
    rest: list[ir.Value] = []
    if width < dim:
        x, *rest = g.ops("Split", x, g.const([width, dim - width]), outputs=2, axis=3)
    left, right = g.ops("Split", x, g.const([width // 2, width // 2]), outputs=2, axis=3)
    half = g.op("Concat", g.op("Neg", right), left, axis=3)
    cos, sin = (g.op("Unsqueeze", t, g.const([1])) for t in (cos, sin))
    turned = g.op("Add", g.op("Mul", x, cos), g.op("Mul", half, sin))
    return [g.op("Concat", turned, *rest, axis=3) if rest else turned]


def lower_attention(g: GraphWriter, op: Op) -> Sequence[ir.Value]:
    """softmax(cap(scale * q k^T) + mask) v, the key heads repeated for the queries that share them."""
    q, k, v = (g.operand(o) for o in op.operands[:3])
    heads, kv_heads = op.operands[0].type.shape[1], op.operands[1].type.shape[1]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    if heads != kv_heads:
        k, v = (_repeat_heads(g, x, heads // kv_heads) for x in (k, v))
    scaled = g.op("Mul", q, g.const(float(str(op.attrs["scale"])), "f32"))
    scores = g.op("MatMul", scaled, g.op("Transpose", k, perm=[0, 1, 3, 2]))
    if softcap := op.attrs.get("softcap"):
        cap = g.const(float(str(softcap)), "f32")
        scores = g.op("Mul", g.op("Tanh", g.op("Div", scores, cap)), cap)
    seen = _seen(g, op, q, k)
    if seen is not None:
        scores = g.op("Where", seen, scores, g.const(HIDDEN, "f32"))
    return [g.op("MatMul", g.op("Softmax", scores, axis=-1), v)]


def _repeat_heads(g: GraphWriter, x: ir.Value, times: int) -> ir.Value:
    tiled = g.op("Tile", g.op("Unsqueeze", x, g.const([2])), g.const([1, 1, times, 1, 1]))
    dims = [g.op("Shape", x, start=i, end=i + 1) for i in range(4)]
    dims[1] = g.op("Mul", dims[1], g.const([times]))
    return g.op("Reshape", tiled, g.op("Concat", *dims, axis=0))


def _seen(g: GraphWriter, op: Op, q: ir.Value, k: ir.Value) -> ir.Value | None:
    """Which keys each query sees, or None when it sees all."""
    masks = [g.operand(o) for o in op.operands[3:]]
    padding = g.by_name.get(MASK)
    if padding is not None and not masks:
        masks.append(g.op("Unsqueeze", g.op("Cast", padding, to=BOOL), g.const([1, 2])))
    causal, window = op.attrs["causal"], op.attrs.get("window", 0)
    if causal or window:
        seq, total = (g.op("Squeeze", g.op("Shape", x, start=2, end=3), g.const([0])) for x in (q, k))
        key = g.op("Range", g.const(0), total, g.const(1))
        query = g.op("Unsqueeze", g.op("Range", g.op("Sub", total, seq), total, g.const(1)), g.const([1]))
        if causal:
            masks.append(g.op("LessOrEqual", key, query))
        if window:
            masks.append(g.op("Greater", key, g.op("Sub", query, g.const(int(str(window))))))
            if not causal:
                masks.append(g.op("Less", key, g.op("Add", query, g.const(int(str(window))))))
    while len(masks) > 1:
        masks = [g.op("And", masks[0], masks[1]), *masks[2:]]
    return masks[0] if masks else None
