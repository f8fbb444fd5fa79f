"""Weights as kernels read them: the layout of a format, the buffers of a weight in it, a panel of those."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gammac.formats import OffsetNormalFloat, Quantized, TrellisFormat, TwoFourFormat
from gammac.formats.two_four import KEPT
from gammac.targets.tvm.kernels.isa import Isa
from gammac.targets.tvm.kernels.layout import (
    ALIGN,
    PANEL,
    Layout,
    Packable,
    ceil_div,
    has_layout,
    pack_codes,
)
from gammac.targets.tvm.kernels.panel import Panel
from gammac.targets.tvm.kernels.trellis import TrellisLayout, TrellisPanel, pack_streams

Expr = Any


def layout_of(format_: Packable, rows: int, columns: int) -> Layout:
    """How a weight [rows, columns] lies in memory. Raises CompileError for rows that trellis codes don't have
    a kernel for."""
    if isinstance(format_, TrellisFormat):
        return TrellisLayout(format_, rows, columns)
    return Layout(format_, rows, columns)


def panel_of(layout: Layout, buffers: Mapping[str, Any], number: Expr, isa: Isa, *, prefetch: bool) -> Panel:
    """A panel of a packed weight."""
    if isinstance(layout, TrellisLayout):
        return TrellisPanel(layout, buffers, number, isa)
    return Panel(layout, buffers, number, prefetch=prefetch)


def pack(quantized: Quantized, isa: Isa) -> dict[str, npt.NDArray[Any]]:
    """The buffers of a weight by the names of a kernel's operands. See `layout` and `trellis`.

    Raises CompileError for a group size or a number of rows that has no kernel.
    """
    format_ = quantized.format
    assert has_layout(format_), f"{format_.name} has no TVM kernel"
    layout = layout_of(format_, *_shape(quantized))
    assert layout.segment  # raises
    codes = (
        pack_streams(quantized, layout)
        if isinstance(layout, TrellisLayout)
        else pack_codes(quantized, layout)
    )
    packed = {
        "codes": codes,
        "scales": _by_panel(quantized.scales.numpy().astype(isa.scale_dtype), layout),
    }
    if layout.same_zero is None:
        assert quantized.zeros is not None
        packed["zeros"] = _by_panel(quantized.zeros.numpy(), layout)
    if isinstance(format_, OffsetNormalFloat):
        offsets = format_.offsets_of(quantized.parts).numpy()
        packed["offsets"] = _by_panel(offsets.astype(isa.scale_dtype), layout)
    return packed


def _shape(quantized: Quantized) -> tuple[int, int]:
    """Rows and columns."""
    rows = len(quantized.scales)
    if isinstance(quantized.format, TrellisFormat):
        return rows, len(quantized.parts["packed"])
    kept = quantized.codes.shape[1]
    return rows, kept * KEPT if isinstance(quantized.format, TwoFourFormat) else kept


def _by_panel(values: npt.NDArray[Any], layout: Layout) -> npt.NDArray[Any]:
    """[rows, groups] to [panels, groups, 16]."""
    padded = np.zeros((layout.panels * PANEL, layout.groups), dtype=values.dtype)
    padded[: layout.rows] = values
    return np.ascontiguousarray(padded.reshape(layout.panels, PANEL, layout.groups).transpose(0, 2, 1))


def packed_bytes(format_: Packable, rows: int, columns: int, isa: Isa) -> int:
    """Bytes of all that `pack` returns, each buffer rounded up to 64."""
    layout = layout_of(format_, rows, columns)
    values = layout.panels * layout.groups * PANEL
    sizes = [layout.panels * layout.panel_bytes, values * np.dtype(isa.scale_dtype).itemsize]
    if layout.same_zero is None:
        sizes.append(values)
    sizes += [sizes[1]] if layout.around else []
    return sum(ceil_div(size, ALIGN) * ALIGN for size in sizes)
