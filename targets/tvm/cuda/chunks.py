"""What a thread does with a chunk of 32 inputs of four rows: its loads, its unpacking, its sums.

What is unpacked is a float f for each weight, and what a weight stands for is scale (factor f − offset):

    integers   f = 1 + code / 2^bits: a shift and a logical operation put the bits of a code below the
               exponent of 1, so that nothing is converted; factor 2^bits, offset 2^bits + zero
    2:4        the same of what is kept; what is not has the f of the code that stands for zero
    levels     f = the level, read from shared memory, where each lane of a warp has a table of its own,
               since all lanes read at once and each memory bank answers one; factor 1
    trellis    f = 1 + v / 256, v being what the state stands for: the sum of the bytes of a product, by four
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gammac.formats import IntegerFormat, TrellisFormat, TwoFourFormat
from gammac.formats.trellis import DROPPED_BITS, MIDDLE, MULTIPLIERS, STEP_BITS
from gammac.formats.two_four import KEPT, POSITION_BITS
from gammac.targets.tvm.cuda.grid import WARP, Grid, Registers
from gammac.targets.tvm.cuda.layout import CHUNK, FOUR, WARPS, Layout
from gammac.targets.tvm.kernels.codebook import levels_of
from gammac.targets.tvm.tir.vectors import T

Expr = Any

# floats of a chunk in shared memory: 4 more than it has, so that 8 threads read 16 bytes from as many banks
PITCH: Final = CHUNK + 4
ONE: Final = 0x3F800000
MANTISSA: Final = 23
_BYTE: Final = 8


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


class LevelTable:
    """The levels of a format in shared memory, once for each lane."""

    def __init__(self, g: Grid, levels: tuple[float, ...]) -> None:
        self.g, self.levels = g, levels
        self.buffer = g.shared(len(levels) * WARP)

    def fill(self) -> None:
        """In a phase before those that read it."""

        def one(i: Expr) -> None:
            value: Expr = T.float32(self.levels[-1])
            for code in reversed(range(len(self.levels) - 1)):
                value = T.Select(i // WARP == code, T.float32(self.levels[code]), value)
            T.buffer_store(self.buffer, value, [i])

        self.g.each(len(self.levels) * WARP, one)

    def get(self, code: Expr, lane: Expr) -> Expr:
        """The level of a code."""
        return self.buffer[code * WARP + T.cast(lane, "int32")]


def table_of(g: Grid, layout: Layout) -> LevelTable | None:
    """For formats of levels."""
    levels = levels_of(layout.format)
    return LevelTable(g, levels) if levels else None


@dataclass(frozen=True, eq=False)
class Chunk:
    """32 inputs of four rows, in one thread: loads of 16 bytes, as many as a code has bits.

    This one is for formats of integers.
    """

    g: Grid
    layout: Layout
    parts: Mapping[str, Any]
    four: Expr
    strip: Expr
    lane: Expr
    table: LevelTable | None = None

    @property
    def grid(self) -> IntegerFormat:
        """What codes stand for."""
        assert isinstance(self.layout.format, IntegerFormat)
        return self.layout.format

    def add(self, staged: Staged, at: Expr, total: Registers) -> None:
        """Add its part of the sums; `at` is its place among the chunks in shared memory."""
        values, tokens = self.reader(), staged.tokens
        sums, plain = self.g.locals(FOUR * tokens), self.g.locals(tokens)
        for begin in range(0, CHUNK, self.layout.segment):
            _clear(sums, FOUR * tokens)
            _clear(plain, tokens)
            for k in range(begin, begin + self.layout.segment, FOUR):
                _multiply(self.g, values, k, staged, at, sums, plain)
            self._scale(begin, tokens, sums, plain, total)

    def reader(self) -> "Values":
        """Load the words; the result gives f, of input k of a row."""
        words = self.load(self.four)
        return lambda row, k: _above_one(_row(words, row), k * self.layout.bits, self.layout.bits)

    def load(self, four: Expr) -> Any:
        """The words of the chunk in a four: [bits, 4]."""
        layout, bits = self.layout, self.layout.bits
        width: Expr = WARP
        if layout.chunks % WARP:
            width = T.Bind(T.min(WARP, layout.chunks - self.strip * WARP))
        base = T.Bind(self.strip * (WARP * bits * FOUR) + self.lane * FOUR)
        words = self.g.locals(FOUR * bits, "int32")
        for i in range(bits):
            word = self.parts["codes"][four, T.ramp(base + i * FOUR * width, 1, FOUR)]
            T.buffer_store(words, word, [T.ramp(FOUR * i, 1, FOUR)])
        return words

    def _scale(self, begin: int, tokens: int, sums: Any, plain: Any, total: Registers) -> None:
        column = (self.strip * WARP + self.lane) * CHUNK + begin
        group = 0 if self.layout.groups == 1 else T.Bind(column // self.layout.group)
        of_rows = {kind: self._of_rows(kind, group) for kind in self.parts if kind != "codes"}
        for row in range(FOUR):
            found = {kind: T.Bind(T.cast(values[row], "float32")) for kind, values in of_rows.items()}
            for j in range(tokens):
                i = row * tokens + j
                total.set(i, total.get(i) + self.term(found, sums[i], plain[j]))

    def _of_rows(self, kind: str, group: Expr) -> Any:
        """The four rows' scales, zeros or offsets."""
        values = self.g.locals(FOUR, self.layout.parts[kind][1])
        T.buffer_store(values, self.parts[kind][self.four, group, T.ramp(0, 1, FOUR)], [T.ramp(0, 1, FOUR)])
        return values

    def term(self, of_row: Mapping[str, Expr], product: Expr, plain: Expr) -> Expr:
        """The sum of x by weight from Σ x f and Σ x."""
        factor = T.float32(1 << self.grid.bits)
        zero = of_row["zeros"] if "zeros" in of_row else T.float32(self.grid.midpoint)
        return of_row["scales"] * (product * factor - (zero + factor) * plain)


class TwoFourChunk(Chunk):
    """Of each four inputs two codes are kept; the others have the code that stands for zero."""

    @property
    def grid(self) -> IntegerFormat:
        """See Chunk."""
        assert isinstance(self.layout.format, TwoFourFormat)
        return self.layout.format.grid

    def reader(self) -> "Values":
        """See Chunk."""
        words, bits = self.load(self.four), self.grid.bits
        nothing = T.float32(1 + self.grid.midpoint / (1 << bits))
        found: dict[tuple[int, int], list[tuple[Expr, Expr]]] = {}

        def kept(row: int, group: int) -> list[tuple[Expr, Expr]]:
            """Position and f of both."""
            first = group * FOUR * self.layout.bits
            positions = first + KEPT * bits
            return [
                (
                    T.Bind(_code(_row(words, row), positions + i * POSITION_BITS, POSITION_BITS)),
                    T.Bind(_above_one(_row(words, row), first + i * bits, bits)),
                )
                for i in range(KEPT)
            ]

        def value(row: int, k: int) -> Expr:
            place = row, k // FOUR
            if place not in found:
                found[place] = kept(*place)
            (one, f), (other, g) = found[place]
            at = T.int32(k % FOUR)
            return T.Select(one == at, f, T.Select(other == at, g, nothing))

        return value


class LevelChunk(Chunk):
    """Formats whose codes name levels."""

    def reader(self) -> "Values":
        """See Chunk."""
        words, bits, table = self.load(self.four), self.layout.bits, self.table
        assert table is not None
        return lambda row, k: table.get(_code(_row(words, row), k * bits, bits), self.lane)

    def term(self, of_row: Mapping[str, Expr], product: Expr, plain: Expr) -> Expr:
        """See Chunk."""
        term = of_row["scales"] * product
        return term + of_row["offsets"] * plain if "offsets" in of_row else term


class TrellisChunk(Chunk):
    """Trellis codes: a state has a column's codes of this four, and of those above it in the tile."""

    def reader(self) -> "Values":
        """See Chunk."""
        format_ = self._format()
        bits, mask = format_.bits, T.int32((1 << format_.state_bits) - 1)
        above = -(-(format_.state_bits - bits) // (FOUR * bits))
        words = [self.load(self.four)] + [self.load(self._before(i + 1)) for i in range(above)]
        windows: dict[int, Expr] = {}

        def value(row: int, k: int) -> Expr:
            if k not in windows:
                windows[k] = self._window(words, k)
            return self._value((windows[k] >> T.int32(bits * (FOUR - 1 - row))) & mask)

        return value

    def _format(self) -> TrellisFormat:
        assert isinstance(self.layout.format, TrellisFormat)
        return self.layout.format

    def _before(self, count: int) -> Expr:
        """The four so many before this one in its tile, which goes round. Tiles are whole blocks."""
        tiles, blocks, block = self.layout.tiles, self.layout.blocks, self.g.block[0]
        tile = T.Bind(((block + 1) * tiles - 1) // blocks)
        first, last = tile * blocks // tiles * WARPS, (tile + 1) * blocks // tiles * WARPS
        back = T.Bind(self.four - count)
        return T.Bind(T.if_then_else(back < first, back + last - first, back))

    def _window(self, words: list[Any], k: int) -> Expr:
        """A column's codes of this four, in the low bits, and of those above."""
        bits = FOUR * self.layout.bits
        window: Expr = T.int32(0)
        for i, of_four in enumerate(words):
            found = _code(lambda j, of_four=of_four: of_four[j], k * bits, bits)  # type: ignore[misc]
            window = window | (found << T.int32(bits * i))
        return T.Bind(window)

    def _value(self, state: Expr) -> Expr:
        """1 + v / 256."""
        multiplier = T.uint64(MULTIPLIERS[self._format().state_bits])
        product = T.Bind(T.cast(T.cast(state, "uint64") * multiplier, "uint32"))
        if self.g.device:
            total = T.call_pure_extern("uint32", "__dp4a", product, T.uint32(0x01010101), T.uint32(0))
        else:
            pairs = T.Bind((product & T.uint32(0xFF00FF)) + ((product >> T.uint32(8)) & T.uint32(0xFF00FF)))
            total = (pairs + (pairs >> T.uint32(16))) & T.uint32(0x7FF)
        moved = T.cast(total, "int32") << T.int32(MANTISSA - _BYTE - DROPPED_BITS)
        return T.reinterpret("float32", moved & T.int32(0xFF << (MANTISSA - _BYTE)) | T.int32(ONE))

    def term(self, of_row: Mapping[str, Expr], product: Expr, plain: Expr) -> Expr:
        """See Chunk."""
        unit, factor = 2.0**-STEP_BITS, 1 << _BYTE
        whole = product * T.float32(factor * unit) - T.float32((factor + MIDDLE) * unit) * plain
        return of_row["scales"] * whole


Values = Callable[[int, int], Expr]
Words = Callable[[int], Expr]  # of 32 bits


def chunk_type(layout: Layout) -> type[Chunk]:
    """What reads a format."""
    kinds = {IntegerFormat: Chunk, TwoFourFormat: TwoFourChunk, TrellisFormat: TrellisChunk}
    return kinds.get(type(layout.format), LevelChunk)


def _multiply(g: Grid, values: Values, k: int, staged: Staged, at: Expr, sums: Any, plain: Any) -> None:
    """Add x times the values of four inputs to the sums, and x alone to the plain ones: values are unpacked
    once, then one token after the other, which takes the fewest registers."""
    unpacked = [[T.Bind(values(row, k + q)) for row in range(FOUR)] for q in range(FOUR)]
    x = g.locals(FOUR)
    for j in range(staged.tokens):
        T.buffer_store(x, staged.four(j, at, k), [T.ramp(0, 1, FOUR)])
        for q in range(FOUR):
            T.buffer_store(plain, plain[j] + x[q], [j])
            for row in range(FOUR):
                i = row * staged.tokens + j
                T.buffer_store(sums, sums[i] + unpacked[q][row] * x[q], [i])


def _clear(buffer: Any, count: int) -> None:
    for i in range(count):
        T.buffer_store(buffer, T.float32(0), [i])


def _row(words: Any, row: int) -> "Words":
    """The words of a row's codes."""
    return lambda i: words[FOUR * i + row]


def _above_one(word: "Words", first: int, bits: int) -> Expr:
    """1 + code / 2^bits as f32, of the code from bit `first` on."""
    return T.reinterpret("float32", _placed(word, first, bits, MANTISSA - bits) | T.int32(ONE))


def _code(word: "Words", first: int, bits: int) -> Expr:
    """`bits` bits from bit `first` on."""
    return _placed(word, first, bits, 0)


def _placed(word: "Words", first: int, bits: int, place: int) -> Expr:
    """The same, moved to bit `place`."""
    number, start = divmod(first, 32)
    low = min(bits, 32 - start)  # bits of it that the word has; the others are in the next one
    found = _moved(word(number), start, place, low)
    if low < bits:
        found = found | _moved(word(number + 1), 0, place + low, bits - low)
    return found


def _moved(word: Expr, start: int, to: int, bits: int) -> Expr:
    """`bits` bits from bit `start` on, moved to bit `to`."""
    if start > to:
        word = word >> T.int32(start - to)
    elif to > start:
        word = word << T.int32(to - start)
    return word & T.int32(((1 << bits) - 1) << to)
