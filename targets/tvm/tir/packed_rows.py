"""Rows of an embedding out of the layout that products read: the table of a tied head is stored once."""

from typing import Any

from gammac.targets.tvm.kernels.isa import Isa
from gammac.targets.tvm.kernels.layout import ALIGN, PANEL, STEP, Layout
from gammac.targets.tvm.kernels.operands import weight_operands
from gammac.targets.tvm.tir.tables import clamped
from gammac.targets.tvm.tir.vectors import T, kernel, loop, rows_of


def packed_rows(rows: int | None, layout: Layout, isa: Isa) -> Any:
    """(ids i64 [rows, 1], codes, scales, zeros if there are any) → y [rows, columns]: dequantized rows."""
    with kernel() as k:
        n = rows_of(rows)
        ids = k.arg("ids", (n, 1), "int64")
        weight = {o.name: k.arg(o.name, o.shape, o.dtype) for o in weight_operands(layout, isa)}
        y = k.arg("y", (n, layout.columns))
        with loop(rows, n) as row:
            entry = T.Bind(clamped(ids[row, 0], layout.rows))
            with T.serial(0, layout.groups) as group:
                place = (entry // PANEL, group, entry % PANEL)
                scale = T.Bind(T.cast(weight["scales"][place], "float32"))
                zero: Any = layout.same_zero
                if "zeros" in weight:
                    zero = T.Bind(T.cast(weight["zeros"][place], "int32"))
                end = T.min(layout.group, layout.columns - group * layout.group)
                with T.serial(0, end) as i:
                    column = T.Bind(group * layout.group + i)
                    value = T.cast(_code(layout, weight["codes"], entry, column) - zero, "float32") * scale
                    T.buffer_store(y, value, [row, column])
    return k.primfunc


def _code(layout: Layout, codes: Any, entry: Any, column: Any) -> Any:
    """The code of one weight, i32; see the layout's head."""
    step = T.Bind(column % layout.superstep // STEP)
    at = column // layout.superstep * layout.superstep_bytes + entry % PANEL * STEP + column % STEP
    code, low = T.int32(0), 0
    for bits in layout.planes:
        per_byte = 8 // bits
        byte = T.cast(codes[entry // PANEL, at + step // per_byte * ALIGN], "int32")
        part = (byte >> T.cast(step % per_byte * bits, "int32")) & T.int32((1 << bits) - 1)
        code = code | (part << T.int32(low))
        at = at + layout.superstep_bytes * bits // layout.grid.bits
        low += bits
    return code
