"""Kernels on rows of floats: norms, elementwise trees, tables, and products with weights in f32."""

from collections.abc import Callable
from typing import Any, Final

from gammac.targets.tvm.cuda.grid import WARP, Grid, Registers, blocks, over_block, over_lanes, when
from gammac.targets.tvm.tir.elementwise import FUNCTIONS, Number, Source, Tree, sources
from gammac.targets.tvm.tir.tables import clamped
from gammac.targets.tvm.tir.vectors import T, add, kernel, load, rows_of

Expr = Any

THREADS: Final = 128
WARPS: Final = THREADS // WARP
TOKENS: Final = 8


# ---- norms --------------------------------------------------------------------------------------


def rms_norm(rows: int | None, width: int, inner: int, eps: float, *, device: bool) -> Any:
    """(x [rows, width], weight [inner]) → y: each `inner` elements over their root mean square."""
    with kernel() as k:
        n = rows_of(rows)
        x, weight, y = k.arg("x", (n, width)), k.arg("weight", (inner,)), k.arg("y", (n, width))
        with blocks((width // inner, n), _threads(inner), device=device) as g:
            part, row = g.block
            at = T.Bind(part * inner)
            total = _sum(g, inner, lambda i: _squared(x[row, at + i]))
            with g.threads(barrier=False):
                factor = _factor(total, inner, eps)

                def write(i: Expr) -> None:
                    T.buffer_store(y, x[row, at + i] * factor * weight[i], [row, at + i])

                g.each(inner, write)
    return k.primfunc


def layer_norm(rows: int | None, width: int, inner: int, eps: float, *, device: bool) -> Any:
    """(x [rows, width], weight [inner], bias [inner]) → y: each `inner` elements less their mean, over
    their deviation."""
    with kernel() as k:
        n = rows_of(rows)
        x, weight, bias = k.arg("x", (n, width)), k.arg("weight", (inner,)), k.arg("bias", (inner,))
        y = k.arg("y", (n, width))
        with blocks((width // inner, n), _threads(inner), device=device) as g:
            part, row = g.block
            at = T.Bind(part * inner)
            total = _sum(g, inner, lambda i: x[row, at + i])

            def centred(i: Expr) -> Expr:
                return x[row, at + i] - total.get() * T.float32(1 / inner)

            squares = _sum(g, inner, lambda i: _squared(centred(i)))
            with g.threads(barrier=False):
                factor = _factor(squares, inner, eps)

                def write(i: Expr) -> None:
                    T.buffer_store(y, centred(i) * factor * weight[i] + bias[i], [row, at + i])

                g.each(inner, write)
    return k.primfunc


def _threads(width: int) -> int:
    return min(2 * THREADS, -(-width // WARP) * WARP)


def _sum(g: Grid, count: int, value: Callable[[Expr], Expr]) -> Registers:
    """The sum of `value(i)` over i below `count`, in every thread."""
    total = g.registers(1)
    with g.threads(barrier=False):
        total.fill(0.0)
        g.each(count, lambda i: total.set(0, total.get() + value(i)))
    over_block(total, add)
    return total


def _factor(total: Registers, count: int, eps: float) -> Expr:
    return T.Bind(T.float32(1) / T.sqrt(total.get() * T.float32(1 / count) + T.float32(eps)))


def _squared(value: Expr) -> Expr:
    value = T.Bind(value)
    return value * value


# ---- elementwise --------------------------------------------------------------------------------


def elementwise(rows: int | None, width: int, tree: Tree, dtype: str, *, device: bool) -> Any:
    """(the tensors of `tree` by index) → y [rows, width]. Integers know sums and products only."""
    with kernel() as k:
        n = rows_of(rows)
        found = {s.index: s for s in sources(tree)}
        tensors = [
            k.arg(f"x{i}", (found[i].width,) if found[i].one_row else (n, found[i].width), dtype)
            for i in sorted(found)
        ]
        y = k.arg("y", (n, width), dtype)

        def value(tree: Tree, row: Expr, column: Expr) -> Expr:
            if isinstance(tree, Source):
                place = (tree.column + column,) if tree.one_row else (row, tree.column + column)
                return load(tensors[tree.index], *place, lanes=1)
            if isinstance(tree, Number):
                return T.int64(int(tree.value)) if dtype == "int64" else T.float32(tree.value)
            return FUNCTIONS[tree.function](*(value(o, row, column) for o in tree.operands), lanes=1)

        with blocks((-(-width // THREADS), n), THREADS, device=device) as g, g.threads(barrier=False) as t:
            part, row = g.block
            column = T.Bind(part * THREADS + t)

            def write() -> None:
                T.buffer_store(y, value(tree, row, column), [row, column])

            when(column < width if width % THREADS else None, write)
    return k.primfunc


# ---- tables -------------------------------------------------------------------------------------


def embedding(rows: int | None, entries: int, width: int, *, device: bool) -> Any:
    """(ids i64 [rows, 1], table [entries, width]) → y [rows, width]. Ids outside read the first or last."""
    with kernel() as k:
        n = rows_of(rows)
        ids, table = k.arg("ids", (n, 1), "int64"), k.arg("table", (entries, width))
        y = k.arg("y", (n, width))
        with blocks((n,), THREADS, device=device) as g, g.threads(barrier=False):
            (row,) = g.block
            entry = T.Bind(clamped(ids[row, 0], entries))
            g.each(width, lambda i: T.buffer_store(y, table[entry, i], [row, i]))
    return k.primfunc


def positions(rows: int | None, *, device: bool) -> Any:
    """(past i64 [1], ids i64 [rows, 1]) → i64 [rows, 1]: the position of each id behind `past` others."""
    with kernel() as k:
        n = rows_of(rows)
        past, _ = k.arg("past", (1,), "int64"), k.arg("ids", (n, 1), "int64")
        y = k.arg("y", (n, 1), "int64")
        with blocks((n,), WARP, device=device) as g, g.threads(barrier=False) as t:
            (row,) = g.block
            when(t == 0, lambda: T.buffer_store(y, past[0] + T.cast(row, "int64"), [row, 0]))
    return k.primfunc


def last_row(width: int, *, device: bool) -> Any:
    """x [rows, width] → y [1, width]"""
    with kernel() as k:
        n = rows_of(None)
        x, y = k.arg("x", (n, width)), k.arg("y", (1, width))
        with blocks((1,), THREADS, device=device) as g, g.threads(barrier=False):
            g.each(width, lambda i: T.buffer_store(y, x[n - 1, i], [0, i]))
    return k.primfunc


def rotary_table(rows: int | None, half: int, scaling: float, *, device: bool) -> Any:
    """(past i64 [1], ids i64 [rows, 1], inv_freq [half]) → cos, sin [rows, half] of each row's position."""
    with kernel() as k:
        n = rows_of(rows)
        past, _ = k.arg("past", (1,), "int64"), k.arg("ids", (n, 1), "int64")
        inv_freq = k.arg("inv_freq", (half,))
        cos, sin = k.arg("cos", (n, half)), k.arg("sin", (n, half))
        with blocks((n,), _threads(half), device=device) as g, g.threads(barrier=False):
            (row,) = g.block

            def one(i: Expr) -> None:
                angle = T.Bind(T.cast(past[0] + T.cast(row, "int64"), "float32") * inv_freq[i])
                T.buffer_store(cos, T.cos(angle) * T.float32(scaling), [row, i])
                T.buffer_store(sin, T.sin(angle) * T.float32(scaling), [row, i])

            g.each(half, one)
    return k.primfunc


# ---- products with float weights ----------------------------------------------------------------


def float_linear(rows: int | None, outputs: int, inputs: int, bias: bool, *, device: bool) -> Any:
    """(x [rows, inputs], weight [outputs, inputs], bias [outputs]) → y [rows, outputs], a warp for each."""
    tokens, lanes = (1 if rows == 1 else TOKENS), (4 if inputs % 4 == 0 else 1)
    with kernel() as k:
        n = rows_of(rows)
        x, weight = k.arg("x", (n, inputs)), k.arg("weight", (outputs, inputs))
        added = k.arg("bias", (outputs,)) if bias else None
        y = k.arg("y", (n, outputs))
        extents = (-(-outputs // WARPS), (n + tokens - 1) // tokens)
        with blocks(extents, THREADS, device=device) as g:
            token = [T.Bind(T.min(g.block[1] * tokens + j, n - 1)) for j in range(tokens)]
            total = g.registers(tokens)
            with g.threads(barrier=False) as t:
                total.fill(0.0)
                # warps behind the last output repeat it
                row, lane = T.Bind(T.min(g.block[0] * WARPS + t // WARP, outputs - 1)), T.Bind(t % WARP)
                w, v = g.locals(lanes), g.locals(lanes)
                with T.serial(0, -(-inputs // (WARP * lanes))) as i:
                    column = T.Bind((i * WARP + lane) * lanes)

                    def multiply() -> None:
                        _copy(w, weight, (row, column), lanes)
                        for j in range(tokens):
                            _copy(v, x, (token[j], column), lanes)
                            for q in range(lanes):
                                total.set(j, total.get(j) + w[q] * v[q])

                    when(column < inputs if inputs % (WARP * lanes) else None, multiply)
            over_lanes(total, add)
            with g.threads(barrier=False) as t:
                row = T.Bind(T.min(g.block[0] * WARPS + t // WARP, outputs - 1))
                for j in range(tokens):
                    value = total.get(j) if added is None else total.get(j) + added[row]
                    when(
                        t % WARP == j,
                        lambda j=j, value=value: T.buffer_store(y, value, [token[j], row]),  # type: ignore[misc]
                    )
    return k.primfunc


def _copy(to: Any, source: Any, place: tuple[Expr, Expr], lanes: int) -> None:
    if lanes == 1:
        T.buffer_store(to, source[place], [0])
    else:
        T.buffer_store(to, source[place[0], T.ramp(place[1], 1, lanes)], [T.ramp(0, 1, lanes)])
