"""The GPU's kernels as lowering asks for them."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

from gammac.formats import Format
from gammac.targets.tvm.cuda import attention, products, rows
from gammac.targets.tvm.cuda.layout import layout_of, pack, runs
from gammac.targets.tvm.kernels import Branch, Packable
from gammac.targets.tvm.params import Array


class CudaDevice:
    """Kernels for a GPU or, unless `gpu`, the same ones as loops for a CPU. See `Device` for what each method
    gives, and `grid` for how the two are one."""

    integer = False
    stacked = low_rank = None

    def __init__(self, *, gpu: bool) -> None:
        def made(make: Callable[..., Any]) -> partial[Any]:
            return partial(make, device=gpu)

        self.elementwise, self.rms_norm = made(rows.elementwise), made(rows.rms_norm)
        self.layer_norm, self.positions = made(rows.layer_norm), made(rows.positions)
        self.last_row, self.rotary_table = made(rows.last_row), made(rows.rotary_table)
        self.embedding, self.float_linear = made(rows.embedding), made(rows.float_linear)
        self.append, self.attention = made(attention.append), made(attention.attention)
        self._linear, self._gated = made(products.linear), made(products.gated)
        self._packed_rows = made(products.packed_rows)
        self.packed = pack

    def takes(self, format_: Format) -> TypeGuard[Packable]:
        """See `Device`."""
        return runs(format_)

    def linear(
        self,
        rows: int | None,
        format_: Packable,
        outputs: int,
        inputs: int,
        bias: bool,
        residual: bool,
        branch: Branch | None = None,
    ) -> Any:
        """See `Device`."""
        assert branch is None, "there is no low_rank"
        return self._linear(rows, layout_of(format_, outputs, inputs), bias, residual)

    def gated(
        self,
        rows: int | None,
        formats: tuple[Packable, Packable],
        outputs: int,
        inputs: int,
        activation: str,
        branches: tuple[Branch | None, ...] = (None, None),
    ) -> Any:
        """See `Device`."""
        assert branches == (None, None), "there is no low_rank"
        gate, up = (layout_of(format_, outputs, inputs) for format_ in formats)
        return self._gated(rows, (gate, up), activation)

    def packed_rows(self, rows: int | None, format_: Packable, entries: int, width: int) -> Any:
        """See `Device`."""
        return self._packed_rows(rows, layout_of(format_, entries, width))

    def floats(self, weight: Array) -> Array:
        """See `Device`: as they are."""
        return weight
