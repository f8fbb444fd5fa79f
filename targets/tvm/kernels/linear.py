"""y = x @ weight.T for packed weights: one token (decode) or any number of them (prefill).

A thread takes panels. A panel's inputs are summed segment by segment, a segment chunk by chunk, and a chunk
is unrolled: per step of 4 inputs one vector of codes, used for every token of the tile.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from gammac.formats import Format
from gammac.targets.tvm.kernels.isa import Isa
from gammac.targets.tvm.kernels.layout import PANEL, Layout, ceil_div
from gammac.targets.tvm.kernels.operands import (
    TOKENS,
    Kernel,
    Operand,
    activation_operands,
    declare,
    weight_operands,
)
from gammac.targets.tvm.kernels.panel import Panel
from gammac.targets.tvm.kernels.tiles import TILES, Registers, Tile
from gammac.targets.tvm.tir import vectors
from gammac.targets.tvm.tir.vectors import T, store

Expr = Any

# tokens whose inputs stay in the second cache
TOKENS_AT_ONCE: Final = 256
# products in an unrolled chunk: more take LLVM long and win nothing
_UNROLLED: Final = {True: 128, False: 256}


class Walk:
    """Adds to `total` everything that some panels of one weight have for a tile's tokens."""

    def __init__(self, layout: Layout, tile: Tile, panels: list[Panel], total: Registers, chunk: int) -> None:
        self.layout, self.tile, self.panels, self.total, self.chunk = layout, tile, panels, total, chunk

    def run(self) -> None:
        """The whole row."""
        if self.layout.segment == self.layout.group:
            self._blocks(0, self.layout.columns, self._small_group)
            return
        partial = Registers(len(self.panels) * len(self.tile.tokens))
        whole, rest = divmod(self.layout.columns, self.layout.group)
        _repeat(whole, lambda g: self._large_group(g, self.layout.group, partial))
        if rest:
            self._large_group(T.int32(whole), rest, partial)

    def _large_group(self, group: Expr, inputs: int, partial: Registers) -> None:
        """A group of several segments: its scale comes in at the end."""
        partial.clear()
        zeros = [self.tile.zero(panel, group) for panel in self.panels]
        first = group * (self.layout.group // self.layout.segment)

        def segment(index: Expr, start: int, end: int) -> None:
            self._segment(zeros, first + index, start, end)
            for i, value in enumerate(self._sums(first + index)):
                partial.add(i, value)

        self._blocks(group * self.layout.group, inputs, segment)
        self._scaled(group, [partial.get(i) for i in range(len(self.panels) * len(self.tile.tokens))])

    def _small_group(self, group: Expr, start: int, end: int) -> None:
        """A group that is one segment."""
        zeros = [self.tile.zero(panel, group) for panel in self.panels]
        self._segment(zeros, group, start, end)
        self._scaled(group, self._sums(group))

    def _sums(self, segment: Expr) -> list[Expr]:
        return [value for row in self.tile.sums(segment) for value in row]

    def _scaled(self, group: Expr, values: list[Expr]) -> None:
        tokens = len(self.tile.tokens)
        for p, panel in enumerate(self.panels):
            scale = panel.scale(group)
            for t in range(tokens):
                self.total.add(p * tokens + t, values[p * tokens + t] * scale)

    def _blocks(self, begin: Expr, inputs: int, segment: Callable[[Expr, int, int], None]) -> None:
        """`segment(its number, start, end)` for `inputs` inputs; start and end are relative to its block.

        A block is one segment where segments are whole supersteps, else as many as fill supersteps.
        """
        block, size = self.layout.block, self.layout.segment

        def one(index: Expr, end: int) -> None:
            self._seek(begin + index * block)
            for i, start in enumerate(range(0, end, size)):
                segment(index * (block // size) + i, start, min(start + size, end))

        whole, rest = divmod(inputs, block)
        _repeat(whole, lambda index: one(index, block))
        if rest:
            one(T.int32(whole), rest)

    def _seek(self, column: Expr) -> None:
        self.tile.seek(column)
        for panel in self.panels:
            panel.seek(column // self.layout.superstep)

    def _segment(self, zeros: list[Any], number: Expr, start: int, end: int) -> None:
        self.tile.begin(zeros, number)
        if self.layout.block != self.layout.segment or end - start <= self.chunk:
            self.tile.steps(self.panels, zeros, start, end)
            return
        whole, rest = divmod(end, self.chunk)
        column = number * self.layout.segment

        def chunk(index: Expr, inputs: int) -> None:
            self._seek(column + index * self.chunk)
            self.tile.steps(self.panels, zeros, 0, inputs)

        _repeat(whole, lambda index: chunk(index, self.chunk))
        if rest:
            chunk(T.int32(whole), rest)


def _chunk(layout: Layout, products: int, integer: bool) -> int:
    """Inputs that are unrolled, where each takes `products` vector products (4 inputs in int8)."""
    wanted = _UNROLLED[integer] * (4 if integer else 1) // products
    sizes = [n for n in range(layout.superstep, layout.segment + 1, layout.superstep) if n <= wanted]
    return max((n for n in sizes if layout.segment % n == 0), default=layout.superstep)


def _repeat(times: int, body: Callable[[Expr], None]) -> None:
    if times == 1:
        body(T.int32(0))
    elif times:
        with T.serial(0, times) as i:
            body(i)


def write_panel(panel: Expr, rows: int, write: Callable[[Expr, int], None]) -> None:
    """`write(first lane, lanes)` for the rows of a panel; the last panel may have fewer than 16."""
    whole, rest = divmod(rows, PANEL)
    if not rest:
        write(0, PANEL)
    elif not whole:
        vectors.chunks(rest, write)
    else:
        with T.If(panel < whole):
            with T.Then():
                write(0, PANEL)
            with T.Else():
                vectors.chunks(rest, write)


def _linear(layout: Layout, isa: Isa, integer: bool, tile: tuple[int, int], tokens: int | str) -> Kernel:
    inputs = (*activation_operands(layout, integer, tokens), *weight_operands(layout, isa))
    outputs = (Operand("y", (tokens, layout.rows), "float32"),)
    with vectors.kernel() as made:
        size = tokens if isinstance(tokens, int) else T.int64()
        buffers = declare((*inputs, *outputs), size)

        def body(index: Expr, at: list[Expr]) -> None:
            numbers = panel_numbers(layout, index, tile[0])
            total = Registers(tile[0] * tile[1])
            total.clear()
            accumulate(layout, isa, integer, buffers, numbers, at, total)
            for p, number in enumerate(numbers):
                _write(buffers["y"], total, p * tile[1], at, number, layout.rows)

        over_tiles(ceil_div(layout.panels, tile[0]), size, tile[1], body)
    step = "decode" if tokens == 1 else "prefill"
    name = f"{step}_{layout.format.name}_{layout.rows}x{layout.columns}_{'int8' if integer else 'f32'}"
    return Kernel(name.replace("-", "_"), inputs, outputs, made.primfunc)


def panel_numbers(layout: Layout, index: Expr, count: int) -> list[Expr]:
    """The panels of a tile; the last tile repeats the last panel."""
    first = [T.Bind(index * count)]
    return first + [T.Bind(T.min(index * count + i, layout.panels - 1)) for i in range(1, count)]


def accumulate(
    layout: Layout,
    isa: Isa,
    integer: bool,
    buffers: Mapping[str, Any],
    numbers: list[Expr],
    tokens: list[Expr],
    total: Registers,
) -> None:
    """Adds the products of a tile to `total`, panel by panel."""
    panels = [Panel(layout, buffers, n, prefetch=len(tokens) == 1) for n in numbers]
    tile = TILES[integer](layout, isa, buffers, len(panels), tokens)
    Walk(layout, tile, panels, total, _chunk(layout, len(panels) * len(tokens), integer)).run()


def _write(y: Any, total: Registers, first: int, tokens: list[Expr], panel: Expr, rows: int) -> None:
    def write(start: Expr, lanes: int) -> None:
        for t, token in enumerate(tokens):
            store(y, total.get(first + t, start, lanes), token, panel * PANEL + start, lanes=lanes)

    write_panel(panel, rows, write)


def over_tiles(many: int, size: Expr, tokens: int, body: Callable[[Expr, list[Expr]], None]) -> None:
    """`body(tile of panels, tokens)`: tokens in portions whose inputs stay in cache, then panels, then tiles.

    The tokens behind the last one repeat it.
    """
    if isinstance(size, int) and size == 1:
        with T.parallel(0, many) as index:
            body(index, [0])
        return
    portion = TOKENS_AT_ONCE // tokens * tokens
    with T.serial(0, (size + portion - 1) // portion) as outer, T.parallel(0, many) as index:
        here = T.min(size - outer * portion, portion)
        with T.serial(0, (here + tokens - 1) // tokens) as inner:
            first = outer * portion + inner * tokens
            body(index, [T.Bind(T.min(first + i, size - 1)) for i in range(tokens)])


def decode_linear(format_: Format, rows: int, columns: int, isa: Isa, *, integer: bool) -> Kernel:
    """y [1, rows] of one token: x f32 [1, columns], or int8 as `quantize_activations` makes it.

    Raises CompileError for a group size that has no kernel.
    """
    return _linear(Layout(format_, rows, columns), isa, integer, (1, 1), 1)


def prefill_linear(format_: Format, rows: int, columns: int, isa: Isa, *, integer: bool) -> Kernel:
    """y [m, rows] of m tokens, which are counted when it runs. As `decode_linear` otherwise."""
    tile = isa.tile if integer else isa.float_tile
    return _linear(Layout(format_, rows, columns), isa, integer, tile, TOKENS)
