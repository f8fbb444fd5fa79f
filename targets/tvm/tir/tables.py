"""Kernels that look something up: rows of an embedding, positions, the last row of a prompt."""

from typing import Any

from gammac.targets.tvm.panels import PANEL
from gammac.targets.tvm.tir.vectors import T, chunks, kernel, load, loop, rows_of, store


def embedding(rows: int | None, entries: int, width: int) -> Any:
    """(ids i64 [rows, 1], table in panels) → y [rows, width]: rows of a float table.

    An id outside the table reads its first or last row: no memory that isn't ours.
    """
    with kernel() as k:
        n, panels = rows_of(rows), -(-entries // PANEL)
        ids = k.arg("ids", (n, 1), "int64")
        table = k.arg("table", (panels, width, PANEL))
        y = k.arg("y", (n, width))
        with loop(rows, n) as row:
            entry = T.Bind(clamped(ids[row, 0], entries))
            with T.serial(0, width) as column:
                T.buffer_store(y, table[entry // PANEL, column, entry % PANEL], [row, column])
    return k.primfunc


def clamped(entry: Any, entries: int) -> Any:
    """An id that the table has."""
    return T.max(T.min(entry, T.int64(entries - 1)), T.int64(0))


def positions(rows: int | None) -> Any:
    """(past i64 [1], ids i64 [rows, 1]) → i64 [rows, 1]: the position of each id behind `past` others."""
    with kernel() as k:
        n = rows_of(rows)
        past, _ = k.arg("past", (1,), "int64"), k.arg("ids", (n, 1), "int64")
        y = k.arg("y", (n, 1), "int64")
        with T.serial(0, n) as row:
            T.buffer_store(y, past[0] + T.cast(row, "int64"), [row, 0])
    return k.primfunc


def last_row(width: int) -> Any:
    """x [rows, width] → y [1, width]"""
    with kernel() as k:
        n = rows_of(None)
        x, y = k.arg("x", (n, width)), k.arg("y", (1, width))
        chunks(
            width, lambda start, lanes: store(y, load(x, n - 1, start, lanes=lanes), 0, start, lanes=lanes)
        )
    return k.primfunc


def rotary_table(rows: int | None, half: int, scaling: float) -> Any:
    """(past i64 [1], ids i64 [rows, 1], inv_freq [half]) → cos, sin [rows, half] of each row's position."""
    with kernel() as k:
        n = rows_of(rows)
        past, _ = k.arg("past", (1,), "int64"), k.arg("ids", (n, 1), "int64")
        inv_freq = k.arg("inv_freq", (half,))
        cos, sin = k.arg("cos", (n, half)), k.arg("sin", (n, half))
        with loop(rows, n) as row, T.serial(0, half) as i:
            angle = T.Bind(T.cast(past[0] + T.cast(row, "int64"), "float32") * inv_freq[i])
            T.buffer_store(cos, T.cos(angle) * T.float32(scaling), [row, i])
            T.buffer_store(sin, T.sin(angle) * T.float32(scaling), [row, i])
    return k.primfunc
