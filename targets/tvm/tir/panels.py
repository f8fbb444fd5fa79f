"""Products with float weights in panels: see `gammac.targets.tvm.panels`."""

from itertools import chain
from typing import Any

from gammac.targets.tvm.panels import PANEL
from gammac.targets.tvm.tir.vectors import T, chunks, kernel, load, rows_of, splat, store

# rows of x that share a load of the weight, and sums that one row is spread over: adding has a latency
TILE, CHAINS = 6, 4


def float_linear(rows: int | None, outputs: int, inputs: int, bias: bool) -> Any:
    """(x [rows, inputs], panels, bias [outputs] if there is one) → y [rows, outputs] = x @ weight.T + bias"""
    with kernel() as k:
        n, panels = rows_of(rows), -(-outputs // PANEL)
        x, weight = k.arg("x", (n, inputs)), k.arg("weight", (panels, inputs, PANEL))
        added = k.arg("bias", (outputs,)) if bias else None
        y = k.arg("y", (n, outputs))
        tile = 1 if rows == 1 else TILE
        with T.parallel(0, panels) as panel, T.serial(0, (n + tile - 1) // tile) as block:
            chains = CHAINS if tile == 1 else 1
            sums = [[T.alloc_buffer((PANEL,), "float32") for _ in range(chains)] for _ in range(tile)]
            for buffer in chain(*sums):
                store(buffer, splat(0.0, PANEL), 0)
            # rows behind the end repeat the last one
            row = [T.Bind(T.min(block * tile + i, n - 1)) for i in range(tile)]
            _columns(x, weight, panel, row, sums, inputs)
            for i in range(tile):
                _finish(y, added, sums[i], row[i], panel, outputs)
    return k.primfunc


def _columns(x: Any, weight: Any, panel: Any, row: list[Any], sums: list[list[Any]], inputs: int) -> None:
    """sums[i] += x[row[i], :] · the panel's columns."""
    chains = len(sums[0])

    def step(column: Any, c: int) -> None:
        w = T.Bind(load(weight, panel, column, 0))
        for i, at in enumerate(row):
            buffer = sums[i][c]
            store(buffer, load(buffer, 0) + w * splat(x[at, column], PANEL), 0)

    with T.serial(0, inputs // chains) as j:
        for c in range(chains):
            step(j * chains + c, c)
    for column in range(inputs // chains * chains, inputs):
        step(column, 0)


def _finish(y: Any, bias: Any, sums: list[Any], row: Any, panel: Any, outputs: int) -> None:
    for other in sums[1:]:
        store(sums[0], load(sums[0], 0) + load(other, 0), 0)
    whole, rest = outputs // PANEL, outputs % PANEL

    def write(start: Any, lanes: int) -> None:
        value = load(sums[0], start, lanes=lanes)
        if bias is not None:
            value = value + load(bias, panel * PANEL + start, lanes=lanes)
        store(y, value, row, panel * PANEL + start, lanes=lanes)

    if not rest:
        write(0, PANEL)
        return
    with T.If(panel < whole):
        with T.Then():
            write(0, PANEL)
        with T.Else():
            chunks(rest, write)
