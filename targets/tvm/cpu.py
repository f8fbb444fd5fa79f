"""The CPU: vectors of 16 lanes, threads over panels of rows, an instruction set that LLVM is told."""

from dataclasses import dataclass
from typing import Any, TypeGuard

from gammac.formats import Format, Quantized
from gammac.targets.tvm.kernels import (
    Branch,
    Isa,
    Packable,
    decode_linear,
    gated_linear,
    has_layout,
    layout_of,
    low_rank,
    pack,
    prefill_linear,
    stacked_linear,
)
from gammac.targets.tvm.kernels.operands import TOKENS
from gammac.targets.tvm.panels import pack_panels
from gammac.targets.tvm.params import Array
from gammac.targets.tvm.tir import norms, tables
from gammac.targets.tvm.tir.attention import Heads, Tiling, append, attention
from gammac.targets.tvm.tir.elementwise import elementwise
from gammac.targets.tvm.tir.packed_rows import packed_rows
from gammac.targets.tvm.tir.panels import float_linear


@dataclass(frozen=True)
class CpuDevice:
    """Kernels for an instruction set. See `Device` for what each method gives."""

    isa: Isa
    integer: bool

    elementwise = staticmethod(elementwise)
    rms_norm = staticmethod(norms.rms_norm)
    layer_norm = staticmethod(norms.layer_norm)
    positions = staticmethod(tables.positions)
    last_row = staticmethod(tables.last_row)
    rotary_table = staticmethod(tables.rotary_table)
    embedding = staticmethod(tables.embedding)
    append = staticmethod(append)
    float_linear = staticmethod(float_linear)
    low_rank = staticmethod(low_rank)
    floats = staticmethod(pack_panels)

    def takes(self, format_: Format) -> TypeGuard[Packable]:
        """See `Device`."""
        return has_layout(format_)

    def packed_rows(self, rows: int | None, format_: Packable, entries: int, width: int) -> Any:
        """See `Device`."""
        return packed_rows(rows, layout_of(format_, entries, width), self.isa)

    def attention(self, rows: int | None, heads: Heads) -> Any:
        """See `Device`."""
        return attention(rows, heads, Tiling(8, 16) if self.isa.vector_bits >= 512 else Tiling(4, 4))

    def linear(
        self,
        rows: int | None,
        format_: Packable,
        outputs: int,
        inputs: int,
        bias: bool,
        residual: bool,
        branch: Branch | None,
    ) -> Any:
        """See `Device`."""
        make = decode_linear if rows == 1 else prefill_linear
        return make(
            format_, outputs, inputs, self.isa, integer=self.integer, bias=bias, residual=residual,
            branch=branch,
        ).func  # fmt: skip

    def gated(
        self,
        rows: int | None,
        formats: tuple[Packable, Packable],
        outputs: int,
        inputs: int,
        activation: str,
        branches: tuple[Branch | None, ...],
    ) -> Any:
        """See `Device`."""
        return gated_linear(
            formats, outputs, inputs, self.isa, integer=self.integer, tokens=rows or TOKENS,
            activation=activation, branches=branches,
        ).func  # fmt: skip

    def stacked(
        self,
        rows: int | None,
        formats: tuple[Packable, ...],
        outputs: tuple[int, ...],
        inputs: int,
        branches: tuple[Branch | None, ...],
        biased: tuple[bool, ...],
    ) -> Any:
        """See `Device`."""
        return stacked_linear(
            formats, outputs, inputs, self.isa, integer=self.integer, tokens=rows or TOKENS,
            branches=branches, biased=biased,
        ).func  # fmt: skip

    def packed(self, quantized: Quantized) -> dict[str, Array]:
        """See `Device`."""
        return pack(quantized, self.isa)
