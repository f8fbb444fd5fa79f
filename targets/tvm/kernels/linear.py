"""y = x @ weight.T for packed weights: one token (decode) or any number of them (prefill).

Both walk the same way. A thread takes panels; a panel's inputs are summed segment by segment, and a segment
is unrolled: per step one vector of codes, used for every token of the tile. In f32 a code is moved into the
mantissa of 2^23, so that taking off 2^23 + zero converts it exactly; with int8 inputs a leaf multiplies, the
sums start at -zero * sum(inputs), and what comes out is exact until the scales.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from gammac.formats import Format
from gammac.targets.tvm.kernels.isa import Isa
from gammac.targets.tvm.kernels.layout import ALIGN, PANEL, STEP, Layout, ceil_div
from gammac.targets.tvm.kernels.leaves import LEAVES
from gammac.targets.tvm.tir import vectors
from gammac.targets.tvm.tir.vectors import T, load, splat, splat_int, store, tirx

Expr = Any

# bytes of codes that are asked for ahead of their use, and tokens whose inputs stay in the second cache
PREFETCH: Final = 4096
TOKENS_AT_ONCE: Final = 256
_MAGIC: Final = 0x4B000000  # 2^23 in f32
_MAGIC_VALUE: Final = 8388608.0


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel takes or writes. A size that is not known is `m`, the number of tokens."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class Kernel:
    """A function of `inputs` that writes `outputs`: the order of the PrimFunc's parameters."""

    name: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    func: Any

    @property
    def operands(self) -> tuple[Operand, ...]:
        """All of them."""
        return (*self.inputs, *self.outputs)


def weight_operands(layout: Layout, isa: Isa) -> tuple[Operand, ...]:
    """The buffers that `pack` makes."""
    per_group = (layout.panels, layout.groups, PANEL)
    zeros = () if layout.format.symmetric else (Operand("zeros", per_group, "uint8"),)
    return (
        Operand("codes", (layout.panels, layout.panel_bytes), "uint8"),
        Operand("scales", per_group, isa.scale_dtype),
        *zeros,
    )


def activation_operands(layout: Layout, integer: bool, tokens: int | str) -> tuple[Operand, ...]:
    """x, or what `quantize_activations` makes of it."""
    if not integer:
        return (Operand("x", (tokens, layout.columns), "float32"),)
    segments = (tokens, ceil_div(layout.columns, layout.segment))
    return (
        Operand("x", (tokens, layout.padded_columns), "int8"),
        Operand("x_scales", segments, "float32"),
        Operand("x_sums", segments, "int32"),
    )


class _Panel:
    """The weight's side of a kernel: vectors of codes, scales and zeros of one panel."""

    def __init__(self, layout: Layout, buffers: dict[str, Any], panel: Expr, prefetch: bool) -> None:
        self.layout, self.buffers, self.panel, self.prefetch = layout, buffers, panel, prefetch
        self._loaded: dict[int, list[list[Expr]]] = {}

    def new_block(self) -> None:
        """Forgets the vectors that were loaded: they are another iteration's."""
        self._loaded = {}

    def codes(self, block: Expr, k: int) -> Expr:
        """Codes of the step at input block + k, i32x16, a byte each; `block` lies on a superstep."""
        layout = self.layout
        which, step = divmod(k, layout.superstep)
        if which not in self._loaded:
            self._loaded[which] = self._planes(block, which)
        step //= STEP
        word, low = None, 0
        for bits, plane in zip(layout.planes, self._loaded[which], strict=True):
            per_byte = 8 // bits
            part = _field(plane[step // per_byte], bits, bits * (step % per_byte), low)
            word = part if word is None else word | part
            low += bits
        return T.Bind(word)

    def _planes(self, block: Expr, which: int) -> list[list[Expr]]:
        layout, codes = self.layout, self.buffers["codes"]
        at = T.Bind(block // layout.superstep * layout.superstep_bytes + which * layout.superstep_bytes)
        planes, offset = [], 0
        for bits in layout.planes:
            vectors_ = []
            for _ in range(layout.superstep_bytes * bits // layout.format.bits // ALIGN):
                place = [self.panel, T.ramp(at + offset, 1, ALIGN)]
                vectors_.append(T.Bind(T.reinterpret("int32x16", codes[tuple(place)])))
                if self.prefetch:
                    ahead = T.address_of(codes[self.panel, at + offset + PREFETCH])
                    T.evaluate(T.call_intrin("void", "tirx.prefetch", ahead, 0, 3, 1))
                offset += ALIGN
            planes.append(vectors_)
        return planes

    def scale(self, group: Expr) -> Expr:
        """f32x16."""
        return T.Bind(T.cast(load(self.buffers["scales"], self.panel, group, 0), "float32x16"))

    def zero(self, group: Expr) -> Expr | int:
        """i32x16, or the number that all have."""
        if "zeros" not in self.buffers:
            return self.layout.format.midpoint
        return T.Bind(T.cast(load(self.buffers["zeros"], self.panel, group, 0), "int32x16"))


def _field(vector: Expr, bits: int, shift: int, low: int) -> Expr:
    """`bits` bits from bit `shift` of each byte, moved to bit `low`."""
    if bits == 8:
        return vector
    mask = int.from_bytes(bytes([((1 << bits) - 1) << low] * 4), "little", signed=True)
    if shift > low:
        vector = vector >> splat_int(shift - low, PANEL)
    elif shift < low:
        vector = vector << splat_int(low - shift, PANEL)
    return vector & splat_int(mask, PANEL)


class _FloatTile:
    """Sums of a tile in f32."""

    def __init__(self, layout: Layout, isa: Isa, buffers: dict[str, Any], tokens: list[Expr]) -> None:
        self.layout, self.x, self.tokens = layout, buffers["x"], tokens

    def zero(self, panel: _Panel, group: Expr) -> Expr:
        """2^23 + zero, f32x16."""
        zero = panel.zero(group)
        if isinstance(zero, int):
            return splat(_MAGIC_VALUE + zero, PANEL)
        return T.Bind(T.cast(zero, "float32x16") + splat(_MAGIC_VALUE, PANEL))

    def segment(
        self, panels: list[_Panel], zeros: list[Expr], block: Expr, start: int, end: int
    ) -> list[list[Expr]]:
        """Sums of code - zero times input, for each panel and token."""
        chains = 4 if len(self.tokens) == 1 else 1
        sums: list[list[list[Expr]]] = [[[] for _ in self.tokens] for _ in panels]
        for k in range(start, end, STEP):
            words = [panel.codes(block, k) for panel in panels]
            for j in range(min(STEP, end - k)):
                for p, word in enumerate(words):
                    code = (word >> splat_int(8 * j, PANEL)) & splat_int(255, PANEL)
                    magic = T.reinterpret("float32x16", code | splat_int(_MAGIC, PANEL))
                    value = T.Bind(magic - zeros[p])
                    for t, token in enumerate(self.tokens):
                        _add(sums[p][t], value * splat(self.x[token, block + (k + j)], PANEL), j % chains)
        return [[_total(chain) for chain in row] for row in sums]


class _IntegerTile:
    """Sums of a tile with int8 inputs."""

    def __init__(self, layout: Layout, isa: Isa, buffers: dict[str, Any], tokens: list[Expr]) -> None:
        self.layout, self.buffers, self.tokens = layout, buffers, tokens
        self.leaf = LEAVES[isa.leaf](layout.format.bits)

    def zero(self, panel: _Panel, group: Expr) -> Expr | int:
        """-zero, i32x16, or the number that all have."""
        zero = panel.zero(group)
        if isinstance(zero, int):
            return self.leaf.offset - zero
        return T.Bind(splat_int(self.leaf.offset, PANEL) - zero)

    def segment(
        self, panels: list[_Panel], zeros: list[Expr], block: Expr, start: int, end: int
    ) -> list[list[Expr]]:
        """As in f32, times the scale of the inputs."""
        x, leaf = self.buffers["x"], self.leaf
        number = block // self.layout.segment + start // self.layout.segment
        states = [[leaf.start(self._initial(zero, t, number)) for t in self.tokens] for zero in zeros]
        for k in range(start, end, STEP):
            words = [panel.codes(block, k) for panel in panels]
            for t, token in enumerate(self.tokens):
                inputs = T.Bind(T.reinterpret("int32", x[token, T.ramp(block + k, 1, STEP)]))
                for p, word in enumerate(words):
                    states[p][t] = leaf.step(states[p][t], word, inputs)
        scales = [splat(self.buffers["x_scales"][t, number], PANEL) for t in self.tokens]
        return [
            [T.Bind(T.cast(leaf.sums(s), "float32x16") * scale) for s, scale in zip(row, scales, strict=True)]
            for row in states
        ]

    def _initial(self, zero: Expr, token: Expr, number: Expr) -> Expr:
        total = self.buffers["x_sums"][token, number]
        if isinstance(zero, int):
            return T.Bind(T.broadcast(total * zero, PANEL))
        return T.Bind(zero * T.broadcast(total, PANEL))


def _add(chains: list[Expr], product: Expr, which: int) -> None:
    if which == len(chains):
        chains.append(T.Bind(product))
    else:
        chains[which] = T.Bind(chains[which] + product)


def _total(chains: list[Expr]) -> Expr:
    while len(chains) > 1:
        chains = [sum(chains[i : i + 2][1:], chains[i]) for i in range(0, len(chains), 2)]
    return T.Bind(chains[0])


class _Sums:
    """f32x16 for each panel and token, kept in memory that LLVM turns into registers."""

    def __init__(self, panels: int, tokens: int) -> None:
        self.buffers = [[T.alloc_buffer((PANEL,), "float32") for _ in range(tokens)] for _ in range(panels)]
        self.clear()

    def clear(self) -> None:
        """All are zero."""
        for buffer in sum(self.buffers, []):
            store(buffer, splat(0.0, PANEL), 0)

    def add(self, values: list[list[Expr]], factors: list[Expr] | None = None) -> None:
        """Adds values, times a factor of each panel."""
        for p, (row, new) in enumerate(zip(self.buffers, values, strict=True)):
            for buffer, value in zip(row, new, strict=True):
                scaled = value if factors is None else value * factors[p]
                store(buffer, load(buffer, 0) + scaled, 0)

    def values(self) -> list[list[Expr]]:
        """What they are now."""
        return [[load(buffer, 0) for buffer in row] for row in self.buffers]


def _walk(layout: Layout, tile: Any, panels: list[_Panel], sums: _Sums) -> None:
    """Adds everything that a tile's panels have for its tokens."""
    if layout.segment == layout.group:
        _walk_small(layout, tile, panels, sums)
        return
    partial = _Sums(len(panels), len(tile.tokens))

    def group(number: Expr, inputs: int) -> None:
        partial.clear()
        zeros = [tile.zero(panel, number) for panel in panels]
        begin = number * layout.group
        whole, rest = divmod(inputs, layout.block)

        def block(index: Expr, end: int) -> None:
            for panel in panels:
                panel.new_block()
            at = begin + index * layout.block
            for start in range(0, end, layout.segment):
                ends = min(start + layout.segment, end)
                partial.add(tile.segment(panels, zeros, at, start, ends))

        _repeat(whole, lambda i: block(i, layout.block))
        if rest:
            block(whole, rest)
        sums.add(partial.values(), [panel.scale(number) for panel in panels])

    whole, rest = divmod(layout.columns, layout.group)
    _repeat(whole, lambda g: group(g, layout.group))
    if rest:
        group(T.int32(whole), rest)


def _walk_small(layout: Layout, tile: Any, panels: list[_Panel], sums: _Sums) -> None:
    """Groups that are one segment: a block holds whole groups."""
    per_block = layout.block // layout.group

    def block(index: Expr, end: int) -> None:
        for panel in panels:
            panel.new_block()
        for i, start in enumerate(range(0, end, layout.group)):
            number = index * per_block + i
            zeros = [tile.zero(panel, number) for panel in panels]
            ends = min(start + layout.group, end)
            values = tile.segment(panels, zeros, index * layout.block, start, ends)
            sums.add(values, [panel.scale(number) for panel in panels])

    whole, rest = divmod(layout.columns, layout.block)
    _repeat(whole, lambda i: block(i, layout.block))
    if rest:
        block(T.int32(whole), rest)


def _repeat(times: int, body: Callable[[Expr], None]) -> None:
    if times == 1:
        body(T.int32(0))
    elif times:
        with T.serial(0, times) as i:
            body(i)


def _finish(y: Any, values: list[Expr], tokens: list[Expr], panel: Expr, rows: int) -> None:
    """Writes a panel's sums; the last panel may have fewer than 16 rows."""
    whole, rest = divmod(rows, PANEL)

    def write(lanes: int) -> None:
        for token, buffer in zip(tokens, values, strict=True):
            vectors.chunks(
                lanes,
                lambda start, width, b=buffer, t=token: store(  # type: ignore[misc]
                    y, load(b, start, lanes=width), t, panel * PANEL + start, lanes=width
                ),
            )

    if not rest:
        write(PANEL)
    elif not whole:
        write(rest)
    else:
        with T.If(panel < whole):
            with T.Then():
                write(PANEL)
            with T.Else():
                write(rest)


def _buffers(operands: tuple[Operand, ...], tokens: Expr) -> dict[str, Any]:
    """Declares a function's parameters."""
    return {
        o.name: T.arg(o.name, T.buffer(tuple(tokens if s == "m" else s for s in o.shape), o.dtype))
        for o in operands
    }


def _linear(layout: Layout, isa: Isa, integer: bool, tile: tuple[int, int], tokens: int | str) -> Kernel:
    inputs = (*activation_operands(layout, integer, tokens), *weight_operands(layout, isa))
    outputs = (Operand("y", (tokens, layout.rows), "float32"),)
    kind = _IntegerTile if integer else _FloatTile
    with vectors.kernel() as made:
        size = tokens if isinstance(tokens, int) else T.int64()
        buffers = _buffers((*inputs, *outputs), size)
        many = ceil_div(layout.panels, tile[0])

        def body(index: Expr, at: list[Expr]) -> None:
            numbers = [T.Bind(index * tile[0])]
            numbers += [T.Bind(T.min(index * tile[0] + i, layout.panels - 1)) for i in range(1, tile[0])]
            panels = [_Panel(layout, buffers, n, prefetch=tokens == 1) for n in numbers]
            sums = _Sums(tile[0], tile[1])
            _walk(layout, kind(layout, isa, buffers, at), panels, sums)
            for number, row in zip(numbers, sums.buffers, strict=True):
                _finish(buffers["y"], row, at, number, layout.rows)

        if tokens == 1:
            with T.parallel(0, many) as index:
                body(index, [0])
        else:
            _token_loops(size, many, tile[1], body)
    step = "decode" if tokens == 1 else "prefill"
    name = f"{step}_{layout.format.name}_{layout.rows}x{layout.columns}_{'int8' if integer else 'f32'}"
    return Kernel(name.replace("-", "_"), inputs, outputs, made.primfunc)


def _token_loops(size: Expr, many: int, tokens: int, body: Callable[[Expr, list[Expr]], None]) -> None:
    """Tokens in portions whose inputs stay in cache, then panels, then tiles of tokens."""
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
    panels, tokens = isa.tile
    tile = (panels, tokens) if integer else (1, panels * tokens)
    return _linear(Layout(format_, rows, columns), isa, integer, tile, "m")
