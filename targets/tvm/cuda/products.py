"""Products with packed weights: a warp takes four rows of the weight, its threads chunks of 32 inputs.

    y[row] = Σ_group scale (factor Σ x f − offset Σ x)

What f is, the number that a code is unpacked to, is told in `chunks`. Inputs are read through shared memory,
for a tile of tokens at once; sums are f32 and end in shuffles. A tile of a prompt has 8 tokens, and a code
that was unpacked once is used for each of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gammac.formats import IntegerFormat, TwoFourFormat
from gammac.targets.tvm.cuda.chunks import PITCH, Staged, chunk_type, table_of
from gammac.targets.tvm.cuda.grid import WARP, Grid, Registers, blocks, over_lanes, when
from gammac.targets.tvm.cuda.layout import CHUNK, FOUR, WARPS, Layout
from gammac.targets.tvm.tir.elementwise import FUNCTIONS
from gammac.targets.tvm.tir.tables import clamped
from gammac.targets.tvm.tir.vectors import T, add, kernel, rows_of

Expr = Any

TOKENS: Final = 8
GATED_TOKENS: Final = 4  # two weights' sums
SPARSE_TOKENS: Final = 2  # of 2:4 weights, which take more registers to unpack
# chunks of inputs in shared memory at once: 18 kB for a token, 36 kB for eight
CHUNKS_OF_ONE, CHUNKS_OF_MANY = 128, 32


def linear(rows: int | None, layout: Layout, bias: bool, residual: bool, *, device: bool) -> Any:
    """(x [rows, columns], codes, scales, zeros, bias, residual) → y = x @ weight.T + bias + residual"""
    with kernel() as k:
        n = rows_of(rows)
        x, parts = k.arg("x", (n, layout.columns)), _parts(k, layout)
        added = k.arg("bias", (layout.rows,)) if bias else None
        stream = k.arg("residual", (n, layout.rows)) if residual else None
        y = k.arg("y", (n, layout.rows))

        def write(token: Expr, row: Expr, sums: list[Expr]) -> None:
            (value,) = sums
            value = value if added is None else value + added[row]
            T.buffer_store(y, value if stream is None else value + stream[token, row], [token, row])

        job = Job(layout.rows, 1 if rows == 1 else _tokens([layout], TOKENS))
        _product(job, x, n, [(layout, parts)], write, device)
    return k.primfunc


def gated(rows: int | None, layouts: tuple[Layout, Layout], activation: str, *, device: bool) -> Any:
    """(x, gate's codes, scales, zeros, those of up) → y = activation(x @ gate.T) * (x @ up.T)"""
    with kernel() as k:
        n = rows_of(rows)
        x = k.arg("x", (n, layouts[0].columns))
        weights = [(layout, _parts(k, layout, str(i))) for i, layout in enumerate(layouts)]
        y = k.arg("y", (n, layouts[0].rows))

        def write(token: Expr, row: Expr, sums: list[Expr]) -> None:
            T.buffer_store(y, FUNCTIONS[activation](sums[0], lanes=1) * sums[1], [token, row])

        job = Job(layouts[0].rows, 1 if rows == 1 else _tokens(layouts, GATED_TOKENS))
        _product(job, x, n, weights, write, device)
    return k.primfunc


def _tokens(layouts: Sequence[Layout], most: int) -> int:
    """Tokens of a tile of a prompt, so that no register is spilled."""
    return SPARSE_TOKENS if any(isinstance(own.format, TwoFourFormat) for own in layouts) else most


def _parts(k: Any, layout: Layout, suffix: str = "") -> dict[str, Any]:
    """The arrays of a weight as arguments."""
    return {name: k.arg(f"{name}{suffix}", *part) for name, part in layout.parts.items()}


@dataclass(frozen=True)
class Job:
    """A product with weights of `rows` rows, `tokens` rows of x at once."""

    rows: int
    tokens: int


Weights = Sequence[tuple[Layout, Mapping[str, Any]]]
Write = Callable[[Expr, Expr, list[Expr]], None]


def _product(job: Job, x: Any, n: Expr, weights: Weights, write: Write, device: bool) -> None:
    """`write(token, row, a sum for each weight)` for all tokens and rows."""
    layout, tokens = weights[0][0], job.tokens
    tiles = (n + tokens - 1) // tokens
    with blocks((layout.blocks, tiles), WARPS * WARP, device=device) as g:
        # tokens behind the last one repeat it
        token = [T.Bind(T.min(g.block[1] * tokens + j, n - 1)) for j in range(tokens)]
        totals = _sums(g, x, token, weights)
        with g.threads(barrier=False) as t:
            lane, four = T.Bind(t % WARP), g.block[0] * WARPS + t // WARP
            for i in range(FOUR * tokens):
                row = four * FOUR + i // tokens
                inside = lane == i % WARP
                if layout.rows % (WARPS * FOUR):
                    inside = T.And(inside, row < layout.rows)
                when(inside, lambda i=i, row=row: write(  # type: ignore[misc]
                    token[i % tokens], row, [total.get(i) for total in totals]))  # fmt: skip


def _sums(g: Grid, x: Any, token: list[Expr], weights: Weights) -> list[Registers]:
    """x @ weight.T for each weight: every thread of a warp has its four rows by all tokens."""
    layout, tokens = weights[0][0], len(token)
    strips = -(-layout.chunks // WARP)
    at_once = min(strips, (CHUNKS_OF_ONE if tokens == 1 else CHUNKS_OF_MANY) // WARP)
    staged = Staged(g.shared(tokens * at_once * WARP * PITCH), at_once * WARP, tokens)
    totals = [g.registers(FOUR * tokens) for _ in weights]
    tables = [table_of(g, own) for own, _ in weights]
    with g.threads(barrier=False):
        for total in totals:
            total.fill(0.0)
        for table in tables:
            if table is not None:
                table.fill()
    with T.serial(0, -(-strips // at_once)) as part:
        with g.threads():
            staged.fill(g, x, token, part)
        with g.threads() as t, T.serial(0, at_once) as step:
            strip, lane = T.Bind(part * at_once + step), T.Bind(t % WARP)
            inside = strip * WARP + lane < layout.chunks if layout.chunks % (at_once * WARP) else None
            four = T.Bind(g.block[0] * WARPS + t // WARP)
            for (own, parts), table, total in zip(weights, tables, totals, strict=True):
                chunk = chunk_type(own)(g, own, parts, four, strip, lane, table)
                when(inside, lambda chunk=chunk, total=total: chunk.add(  # type: ignore[misc]
                    staged, step * WARP + lane, total))  # fmt: skip
    for total in totals:
        over_lanes(total, add)
    return totals


def packed_rows(rows: int | None, layout: Layout, *, device: bool) -> Any:
    """(ids i64 [rows, 1], codes, scales, zeros) → y [rows, columns]: rows of the table, dequantized."""
    bits, format_ = layout.bits, layout.format
    assert isinstance(format_, IntegerFormat), f"{format_.name} has no CUDA kernel for tables"
    with kernel() as k:
        n = rows_of(rows)
        ids, parts = k.arg("ids", (n, 1), "int64"), _parts(k, layout)
        y = k.arg("y", (n, layout.columns))
        with blocks((n,), WARPS * WARP, device=device) as g, g.threads(barrier=False):
            (row,) = g.block
            entry = T.Bind(clamped(ids[row, 0], layout.rows))
            four, lane = T.Bind(entry // FOUR), T.Bind(entry % FOUR)

            def one(column: Expr) -> None:
                chunk = T.Bind(column // CHUNK)
                strip, bit = T.Bind(chunk // WARP), T.Bind(column % CHUNK * bits)
                width = T.Bind(T.min(WARP, layout.chunks - strip * WARP))
                base = strip * (WARP * bits * FOUR) + chunk % WARP * FOUR + T.cast(lane, "int32")

                def word(number: Expr) -> Expr:
                    return T.reinterpret("uint32", parts["codes"][four, base + number * FOUR * width])

                # the two words that may have a part of it, as one of 64 bits
                low, last = T.Bind(bit // 32), bits - 1
                both = T.cast(word(low), "uint64") | (
                    T.cast(word(T.min(low + 1, last)), "uint64") << T.uint64(32)
                )
                code = T.cast(both >> T.cast(bit % 32, "uint64"), "int32") & T.int32((1 << bits) - 1)
                place = (four, column // layout.group, lane)
                zero = T.cast(parts["zeros"][place], "int32") if "zeros" in parts else format_.midpoint
                value = T.cast(code - zero, "float32") * T.cast(parts["scales"][place], "float32")
                T.buffer_store(y, value, [row, column])

            g.each(layout.columns, one)
    return k.primfunc
