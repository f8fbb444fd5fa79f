"""Products with packed weights: a warp takes four rows of the weight, its threads chunks of 32 inputs.

    y[row] = Σ_group scale (Σ x code − zero Σ x)

A code is not converted to a float: a shift and a logical operation put its bits below the exponent of 1,
which gives f = 1 + code / 2^bits, and

    Σ x code = 2^bits (Σ x f − Σ x)

Inputs are read through shared memory, for a tile of tokens at once; sums are f32. A prompt's tile has 8
tokens, for each of which a code is used that was unpacked once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gammac.targets.tvm.cuda.grid import WARP, Grid, Registers, blocks, over_lanes, when
from gammac.targets.tvm.cuda.layout import CHUNK, FOUR, WARPS, Layout
from gammac.targets.tvm.tir.elementwise import FUNCTIONS
from gammac.targets.tvm.tir.tables import clamped
from gammac.targets.tvm.tir.vectors import T, add, kernel, rows_of

Expr = Any

# floats of a chunk in shared memory: 4 more than it has, so that 8 threads read 16 bytes from as many banks
PITCH: Final = CHUNK + 4
TOKENS: Final = 8
GATED_TOKENS: Final = 4  # two weights' sums
# chunks of inputs in shared memory at once: 18 kB for a token, 36 kB for eight
CHUNKS_OF_ONE, CHUNKS_OF_MANY = 128, 32
ONE: Final = 0x3F800000
MANTISSA: Final = 23


def linear(rows: int | None, layout: Layout, bias: bool, residual: bool, *, device: bool) -> Any:
    """(x [rows, columns], codes, scales, zeros, bias, residual) → y = x @ weight.T + bias + residual"""
    with kernel() as k:
        n = rows_of(rows)
        x, parts = k.arg("x", (n, layout.columns)), _parts(k, layout)
        added = k.arg("bias", (layout.rows,)) if bias else None
        stream = k.arg("residual", (n, layout.rows)) if residual else None
        y = k.arg("y", (n, layout.rows))

        def write(token: Expr, row: Expr, sums: list[Expr]) -> None:
            (value,) = sums
            value = value if added is None else value + added[row]
            T.buffer_store(y, value if stream is None else value + stream[token, row], [token, row])

        _product(Job(layout.rows, 1 if rows == 1 else TOKENS), x, n, [(layout, parts)], write, device)
    return k.primfunc


def gated(rows: int | None, layouts: tuple[Layout, Layout], activation: str, *, device: bool) -> Any:
    """(x, gate's codes, scales, zeros, those of up) → y = activation(x @ gate.T) * (x @ up.T)"""
    with kernel() as k:
        n = rows_of(rows)
        x = k.arg("x", (n, layouts[0].columns))
        weights = [(layout, _parts(k, layout, str(i))) for i, layout in enumerate(layouts)]
        y = k.arg("y", (n, layouts[0].rows))

        def write(token: Expr, row: Expr, sums: list[Expr]) -> None:
            T.buffer_store(y, FUNCTIONS[activation](sums[0], lanes=1) * sums[1], [token, row])

        job = Job(layouts[0].rows, 1 if rows == 1 else GATED_TOKENS)
        _product(job, x, n, weights, write, device)
    return k.primfunc


def _parts(k: Any, layout: Layout, suffix: str = "") -> dict[str, Any]:
    """The arrays of a weight as arguments."""
    return {name: k.arg(f"{name}{suffix}", *part) for name, part in layout.parts.items()}


@dataclass(frozen=True)
class Job:
    """A product with weights of `rows` rows, `tokens` rows of x at once."""

    rows: int
    tokens: int


Weights = Sequence[tuple[Layout, Mapping[str, Any]]]
Write = Callable[[Expr, Expr, list[Expr]], None]


def _product(job: Job, x: Any, n: Expr, weights: Weights, write: Write, device: bool) -> None:
    """`write(token, row, a sum for each weight)` for all tokens and rows."""
    layout, tokens = weights[0][0], job.tokens
    tiles = (n + tokens - 1) // tokens
    with blocks((layout.blocks, tiles), WARPS * WARP, device=device) as g:
        # tokens behind the last one repeat it
        token = [T.Bind(T.min(g.block[1] * tokens + j, n - 1)) for j in range(tokens)]
        totals = _sums(g, x, token, weights)
        with g.threads(barrier=False) as t:
            lane, four = T.Bind(t % WARP), g.block[0] * WARPS + t // WARP
            for i in range(FOUR * tokens):
                row = four * FOUR + i // tokens
                inside = lane == i % WARP
                if layout.rows % (WARPS * FOUR):
                    inside = T.And(inside, row < layout.rows)
                when(inside, lambda i=i, row=row: write(  # type: ignore[misc]
                    token[i % tokens], row, [total.get(i) for total in totals]))  # fmt: skip


def _sums(g: Grid, x: Any, token: list[Expr], weights: Weights) -> list[Registers]:
    """x @ weight.T for each weight: every thread of a warp has its four rows by all tokens."""
    layout, tokens = weights[0][0], len(token)
    strips = -(-layout.chunks // WARP)
    at_once = min(strips, (CHUNKS_OF_ONE if tokens == 1 else CHUNKS_OF_MANY) // WARP)
    staged = Staged(g.shared(tokens * at_once * WARP * PITCH), at_once * WARP, tokens)
    totals = [g.registers(FOUR * tokens) for _ in weights]
    with g.threads(barrier=False):
        for total in totals:
            total.fill(0.0)
    with T.serial(0, -(-strips // at_once)) as part:
        with g.threads():
            staged.fill(g, x, token, part)
        with g.threads() as t, T.serial(0, at_once) as step:
            strip, lane = T.Bind(part * at_once + step), T.Bind(t % WARP)
            inside = strip * WARP + lane < layout.chunks if layout.chunks % (at_once * WARP) else None
            four = T.Bind(g.block[0] * WARPS + t // WARP)
            for (own, parts), total in zip(weights, totals, strict=True):
                chunk = Chunk(g, own, parts, four, strip, lane)
                when(inside, lambda chunk=chunk, total=total: chunk.add(  # type: ignore[misc]
                    staged, step * WARP + lane, total))  # fmt: skip
    for total in totals:
        over_lanes(total, add)
    return totals


@dataclass(frozen=True, eq=False)
class Staged:
    """Inputs in shared memory: [tokens, chunks, 32 and 4 left out]."""

    buffer: Any
    chunks: int
    tokens: int

    def fill(self, g: Grid, x: Any, token: list[Expr], part: Expr) -> None:
        """Read as many chunks as fit from x, zeros behind its end."""
        columns = int(x.shape[1])
        lanes = 4 if columns % 4 == 0 else 1
        whole = columns % (self.chunks * CHUNK) == 0

        def one(j: int, i: Expr) -> None:
            column = T.Bind(part * (self.chunks * CHUNK) + i * lanes)
            to = j * self.chunks * PITCH + i * lanes // CHUNK * PITCH + i * lanes % CHUNK
            if whole:
                self._copy(to, x[token[j], _ramp(column, lanes)], lanes)
                return
            with T.If(column < columns):
                with T.Then():
                    self._copy(to, x[token[j], _ramp(column, lanes)], lanes)
                with T.Else():
                    self._copy(to, T.broadcast(T.float32(0), lanes) if lanes > 1 else T.float32(0), lanes)

        for j in range(self.tokens):
            g.each(self.chunks * CHUNK // lanes, lambda i, j=j: one(j, i))  # type: ignore[misc]

    def _copy(self, to: Expr, value: Expr, lanes: int) -> None:
        T.buffer_store(self.buffer, value, [_ramp(to, lanes)])

    def four(self, j: int, chunk: Expr, k: int) -> Expr:
        """Four inputs of token j from input k of a chunk on."""
        return self.buffer[_ramp(j * self.chunks * PITCH + chunk * PITCH + k, 4)]


def _ramp(start: Expr, lanes: int) -> Expr:
    return T.ramp(start, 1, lanes) if lanes > 1 else start


class Chunk:
    """32 inputs of four rows, in one thread: loads of 16 bytes, as many as a code has bits."""

    def __init__(
        self, g: Grid, layout: Layout, parts: Mapping[str, Any], four: Expr, strip: Expr, lane: Expr
    ) -> None:
        self.g, self.layout, self.parts = g, layout, parts
        self.four, self.strip, self.lane = four, strip, lane

    def add(self, staged: Staged, at: Expr, total: Registers) -> None:
        """Add its part of the sums; `at` is its place among the chunks in shared memory."""
        self._load()
        tokens = staged.tokens
        sums, plain = self.g.locals(FOUR * tokens), self.g.locals(tokens)
        for begin in range(0, CHUNK, self.layout.segment):
            _clear(sums, FOUR * tokens)
            _clear(plain, tokens)
            for k in range(begin, begin + self.layout.segment, FOUR):
                self._multiply(k, staged, at, sums, plain)
            self._scale(begin, tokens, sums, plain, total)

    def _load(self) -> None:
        layout, bits = self.layout, self.layout.bits
        width: Expr = WARP
        if layout.chunks % WARP:
            width = T.Bind(T.min(WARP, layout.chunks - self.strip * WARP))
        base = T.Bind(self.strip * (WARP * bits * FOUR) + self.lane * FOUR)
        self.words = self.g.locals(FOUR * bits, "int32")
        for i in range(bits):
            word = self.parts["codes"][self.four, T.ramp(base + i * FOUR * width, 1, FOUR)]
            T.buffer_store(self.words, word, [T.ramp(FOUR * i, 1, FOUR)])

    def _multiply(self, k: int, staged: Staged, at: Expr, sums: Any, plain: Any) -> None:
        """Add x times the codes of four inputs to the sums, and x alone to the plain ones: codes are unpacked
        once, then one token after the other, which takes the fewest registers."""
        codes = [[self._code(row, k + q) for row in range(FOUR)] for q in range(FOUR)]
        x = self.g.locals(FOUR)
        for j in range(staged.tokens):
            T.buffer_store(x, staged.four(j, at, k), [T.ramp(0, 1, FOUR)])
            for q in range(FOUR):
                T.buffer_store(plain, plain[j] + x[q], [j])
                for row in range(FOUR):
                    i = row * staged.tokens + j
                    T.buffer_store(sums, sums[i] + codes[q][row] * x[q], [i])

    def _code(self, row: int, k: int) -> Expr:
        return T.Bind(_above_one(lambda i: self.words[FOUR * i + row], k, self.layout.bits))

    def _scale(self, begin: int, tokens: int, sums: Any, plain: Any, total: Registers) -> None:
        layout, factor = self.layout, T.float32(1 << self.layout.bits)
        column = (self.strip * WARP + self.lane) * CHUNK + begin
        group = 0 if layout.groups == 1 else T.Bind(column // layout.group)
        scales, zeros = self.g.locals(FOUR, "float16"), None
        T.buffer_store(
            scales, self.parts["scales"][self.four, group, T.ramp(0, 1, FOUR)], [T.ramp(0, 1, FOUR)]
        )
        if "zeros" in self.parts:
            zeros = self.g.locals(FOUR, "uint8")
            T.buffer_store(
                zeros, self.parts["zeros"][self.four, group, T.ramp(0, 1, FOUR)], [T.ramp(0, 1, FOUR)]
            )
        for row in range(FOUR):
            scale = T.Bind(T.cast(scales[row], "float32"))
            zero = T.float32(layout.format.midpoint) if zeros is None else T.cast(zeros[row], "float32")
            offset = T.Bind(zero + factor)
            for j in range(tokens):
                i = row * tokens + j
                total.set(i, total.get(i) + scale * (sums[i] * factor - offset * plain[j]))


def _clear(buffer: Any, count: int) -> None:
    for i in range(count):
        T.buffer_store(buffer, T.float32(0), [i])


def _above_one(word: Callable[[int], Expr], k: int, bits: int) -> Expr:
    """1 + code / 2^bits as f32, of code k in words of 32 bits."""
    number, start = divmod(k * bits, 32)
    low = min(bits, 32 - start)  # bits of it that the word has; the others are in the next one
    place = MANTISSA - bits
    found = _moved(word(number), start, place, low)
    if low < bits:
        found = found | _moved(word(number + 1), 0, place + low, bits - low)
    return T.reinterpret("float32", found | T.int32(ONE))


def _moved(word: Expr, start: int, to: int, bits: int) -> Expr:
    """`bits` bits from bit `start` on, moved to bit `to`."""
    if start > to:
        word = word >> T.int32(start - to)
    elif to > start:
        word = word << T.int32(to - start)
    return word & T.int32(((1 << bits) - 1) << to)


def packed_rows(rows: int | None, layout: Layout, *, device: bool) -> Any:
    """(ids i64 [rows, 1], codes, scales, zeros) → y [rows, columns]: rows of the table, dequantized."""
    bits = layout.bits
    with kernel() as k:
        n = rows_of(rows)
        ids, parts = k.arg("ids", (n, 1), "int64"), _parts(k, layout)
        y = k.arg("y", (n, layout.columns))
        with blocks((n,), WARPS * WARP, device=device) as g, g.threads(barrier=False):
            (row,) = g.block
            entry = T.Bind(clamped(ids[row, 0], layout.rows))
            four, lane = T.Bind(entry // FOUR), T.Bind(entry % FOUR)

            def one(column: Expr) -> None:
                chunk = T.Bind(column // CHUNK)
                strip, bit = T.Bind(chunk // WARP), T.Bind(column % CHUNK * bits)
                width = T.Bind(T.min(WARP, layout.chunks - strip * WARP))
                base = strip * (WARP * bits * FOUR) + chunk % WARP * FOUR + T.cast(lane, "int32")

                def word(number: Expr) -> Expr:
                    return T.reinterpret("uint32", parts["codes"][four, base + number * FOUR * width])

                # the two words that may have a part of it, as one of 64 bits
                low, last = T.Bind(bit // 32), bits - 1
                both = T.cast(word(low), "uint64") | (
                    T.cast(word(T.min(low + 1, last)), "uint64") << T.uint64(32)
                )
                code = T.cast(both >> T.cast(bit % 32, "uint64"), "int32") & T.int32((1 << bits) - 1)
                place = (four, column // layout.group, lane)
                zero = T.cast(parts["zeros"][place], "int32") if "zeros" in parts else layout.format.midpoint
                value = T.cast(code - zero, "float32") * T.cast(parts["scales"][place], "float32")
                T.buffer_store(y, value, [row, column])

            g.each(layout.columns, one)
    return k.primfunc
