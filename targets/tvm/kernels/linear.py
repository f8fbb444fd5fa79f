"""y = x @ weight.T for packed weights: one token (decode) or any number of them (prefill).

A thread takes panels. A panel's inputs are summed segment by segment, a segment chunk by chunk, and a chunk
is unrolled: per step of 4 inputs one vector of codes, used for every token of the tile.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gammac.targets.tvm.kernels.isa import Isa
from gammac.targets.tvm.kernels.layout import PANEL, Layout, Packable, ceil_div
from gammac.targets.tvm.kernels.low_rank import Branch, add_branch, branch_operands, low_operands
from gammac.targets.tvm.kernels.operands import (
    TOKENS,
    Kernel,
    Operand,
    activation_operands,
    declare,
    weight_operands,
)
from gammac.targets.tvm.kernels.packed import layout_of, panel_of
from gammac.targets.tvm.kernels.panel import Panel
from gammac.targets.tvm.kernels.tiles import TILES, Registers, Tile
from gammac.targets.tvm.tir import vectors
from gammac.targets.tvm.tir.vectors import T, load, store

Expr = Any

# tokens whose inputs stay in the second cache
TOKENS_AT_ONCE: Final = 256
# what computing a value takes, in products, and unrolled code in time to compile
COMPUTING: Final = 16
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
            self._shift(group, first + index)

        self._blocks(group * self.layout.group, inputs, segment)
        self._scaled(group, [partial.get(i) for i in range(len(self.panels) * len(self.tile.tokens))])

    def _small_group(self, group: Expr, start: int, end: int) -> None:
        """A group that is one segment."""
        zeros = [self.tile.zero(panel, group) for panel in self.panels]
        self._segment(zeros, group, start, end)
        self._scaled(group, self._sums(group))
        self._shift(group, group)

    def _shift(self, group: Expr, segment: Expr) -> None:
        """A group's offset times the sum of the segment's inputs, where the format has offsets."""
        if not self.layout.around:
            return
        plain, tokens = self.tile.plain(segment), len(self.tile.tokens)
        for p, panel in enumerate(self.panels):
            offset = panel.offset(group)
            for t in range(tokens):
                self.total.add(p * tokens + t, offset * plain[t])

    def _sums(self, segment: Expr) -> list[Expr]:
        return [value for row in self.tile.sums(segment) for value in row]

    def _scaled(self, group: Expr, values: list[Expr]) -> None:
        tokens = len(self.tile.tokens)
        for p, panel in enumerate(self.panels):
            scale = self.tile.scale(panel, group)
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
    if layout.levels and not integer:
        # each product chooses among levels first
        wanted //= len(layout.levels)
    if layout.computed:
        wanted //= COMPUTING
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


@dataclass(frozen=True)
class Job:
    """What the parts of a kernel share. `tokens` is 1 or "m"; with `integer`, inputs are int8. What is
    `computed` (see Layout) serves as many tokens as there are registers."""

    isa: Isa
    integer: bool
    tokens: int | str
    computed: bool = False

    @classmethod
    def of(cls, isa: Isa, integer: bool, tokens: int | str, layouts: Sequence[Layout]) -> "Job":
        """For weights that share a kernel."""
        return cls(isa, integer, tokens, any(layout.computed for layout in layouts))

    @property
    def tile(self) -> tuple[int, int]:
        """Panels and tokens that are summed together."""
        if self.tokens == 1:
            return (1, 1)
        panels, tokens = self.isa.tile if self.integer else self.isa.float_tile
        return (1, panels * tokens) if self.computed else (panels, tokens)

    def tiles(self, layout: Layout) -> int:
        """How many tiles the panels of a weight are."""
        return ceil_div(layout.panels, self.tile[0])

    def size(self) -> Expr:
        """The number of tokens in the function under construction."""
        return self.tokens if isinstance(self.tokens, int) else T.int64()

    def name(self, what: str, *details: object) -> str:
        """A kernel's name."""
        parts = (
            "decode" if self.tokens == 1 else "prefill",
            what,
            *details,
            "int8" if self.integer else "f32",
        )
        return "_".join(str(p) for p in parts if p).replace("-", "_")

    def sums(
        self,
        layout: Layout,
        buffers: Mapping[str, Any],
        index: Expr,
        tokens: list[Expr],
        branch: Branch | None = None,
    ) -> "Sums":
        """x @ weight.T, and its branch, for the tokens and a tile of panels. The last tile repeats the last
        panel."""
        count = self.tile[0]
        numbers = [T.Bind(index * count)]
        numbers += [T.Bind(T.min(index * count + i, layout.panels - 1)) for i in range(1, count)]
        total = Registers(count * len(tokens))
        total.clear()
        panels = [panel_of(layout, buffers, n, self.isa, prefetch=self.tokens == 1) for n in numbers]
        tile = TILES[self.integer](layout, self.isa, buffers, count, tokens)
        Walk(layout, tile, panels, total, _chunk(layout, count * len(tokens), self.integer)).run()
        if branch is not None:
            add_branch(branch, buffers, numbers, tokens, total)
        return Sums(layout.rows, numbers, tokens, total)


@dataclass(frozen=True, eq=False)
class Sums:
    """What a tile came to."""

    rows: int
    panels: list[Expr]
    tokens: list[Expr]
    total: Registers

    def write(self, value: Callable[[int, Expr, Expr, Expr, int], None]) -> None:
        """`value(sum, token, first row, first lane, lanes)` for each panel and token."""
        for p, panel in enumerate(self.panels):

            def lanes(start: Expr, width: int, p: int = p, panel: Expr = panel) -> None:
                for t, token in enumerate(self.tokens):
                    value(p * len(self.tokens) + t, token, panel * PANEL + start, start, width)

            write_panel(panel, self.rows, lanes)


def over(count: int, layouts: list[Layout]) -> Any:
    """A loop over parts of `layouts` for one token."""
    return vectors.shared_out(count, sum(layout.panels * layout.panel_bytes for layout in layouts))


def over_tiles(job: Job, layouts: list[Layout], size: Expr, body: Callable[[Expr, list[Expr]], None]) -> None:
    """`body(tile of panels, tokens)`: tokens in portions whose inputs stay in cache, then panels, then tiles.

    The tiles are those of all `layouts`, shared out between threads. Tokens behind the last one repeat it.
    """
    many = sum(job.tiles(layout) for layout in layouts)
    if job.tokens == 1:
        with over(many, layouts) as index:
            body(index, [0])
        return
    tokens = job.tile[1]
    portion = TOKENS_AT_ONCE // tokens * tokens
    with T.serial(0, (size + portion - 1) // portion) as outer, T.parallel(0, many) as index:
        here = T.min(size - outer * portion, portion)
        with T.serial(0, (here + tokens - 1) // tokens) as inner:
            first = outer * portion + inner * tokens
            body(index, [T.Bind(T.min(first + i, size - 1)) for i in range(tokens)])


def _linear(layout: Layout, job: Job, added: tuple[str, ...], branch: Branch | None) -> Kernel:
    extra = {
        "bias": Operand("bias", (layout.rows,), "float32"),
        "residual": Operand("residual", (job.tokens, layout.rows), "float32"),
    }
    inputs = (
        *activation_operands(layout, job.integer, job.tokens),
        *low_operands(job.tokens, branch),
        *weight_operands(layout, job.isa),
        *branch_operands(layout, branch),
        *(extra[name] for name in added),
    )
    outputs = (Operand("y", (job.tokens, layout.rows), "float32"),)
    with vectors.kernel() as made:
        size = job.size()
        buffers = declare((*inputs, *outputs), size)

        def body(index: Expr, at: list[Expr]) -> None:
            sums = job.sums(layout, buffers, index, at, branch)

            def write(i: int, token: Expr, row: Expr, start: Expr, lanes: int) -> None:
                value = sums.total.get(i, start, lanes)
                if "bias" in added:
                    value = value + load(buffers["bias"], row, lanes=lanes)
                if "residual" in added:
                    value = value + load(buffers["residual"], token, row, lanes=lanes)
                store(buffers["y"], value, token, row, lanes=lanes)

            sums.write(write)

        over_tiles(job, [layout], size, body)
    rank = f"rank{branch.rank}" if branch is not None else ""
    name = job.name(layout.format.name, f"{layout.rows}x{layout.columns}", rank, *added)
    return Kernel(name, inputs, outputs, made.primfunc)


def _added(bias: bool, residual: bool) -> tuple[str, ...]:
    return tuple(name for name, wanted in (("bias", bias), ("residual", residual)) if wanted)


def decode_linear(
    format_: Packable,
    rows: int,
    columns: int,
    isa: Isa,
    *,
    integer: bool,
    bias: bool = False,
    residual: bool = False,
    branch: Branch | None = None,
) -> Kernel:
    """y f32 [1, rows] of one token: x f32 [1, columns], or int8 as `quantize_activations` makes it.

    `bias` f32 [rows], `residual` f32 [1, rows] and a low-rank branch are added where they are wanted. Raises
    CompileError for a group size that has no kernel.
    """
    layout = layout_of(format_, rows, columns)
    return _linear(layout, Job.of(isa, integer, 1, [layout]), _added(bias, residual), branch)


def prefill_linear(
    format_: Packable,
    rows: int,
    columns: int,
    isa: Isa,
    *,
    integer: bool,
    bias: bool = False,
    residual: bool = False,
    branch: Branch | None = None,
) -> Kernel:
    """y [m, rows] of m tokens, which are counted when it runs. As `decode_linear` otherwise."""
    layout = layout_of(format_, rows, columns)
    return _linear(layout, Job.of(isa, integer, TOKENS, [layout]), _added(bias, residual), branch)
