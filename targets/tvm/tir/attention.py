"""Attention over a cache of keys and values: softmax in f32, two passes over the scores of a few queries.

Keys lie in blocks of 16 positions, [kv_heads, capacity / 16, dim, 16]: a vector holds one feature of 16
keys, and scores need no sums across lanes. Values are [kv_heads, capacity, dim].
"""

from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from gammac.targets.tvm.tir import vectors
from gammac.targets.tvm.tir.vectors import (
    LANES,
    Accumulator,
    T,
    add,
    chunks,
    kernel,
    load,
    loop,
    rows_of,
    splat,
    store,
    tirx,
)  # fmt: skip

BLOCK: Final = LANES
HIDDEN: Final = -1e30
# sums that one query's score is spread over: adding has a latency
CHAINS: Final = 4


@dataclass(frozen=True)
class Heads:
    """The sizes of an attention. `rotary` features of a head are turned; window 0 and softcap 0 are none."""

    heads: int
    kv_heads: int
    dim: int
    capacity: int
    scale: float
    rotary: int = 0
    window: int = 0
    softcap: float = 0.0

    @property
    def key_shape(self) -> tuple[int, int, int, int]:
        """Of the cache of keys."""
        return (self.kv_heads, self.capacity // BLOCK, self.dim, BLOCK)

    @property
    def value_shape(self) -> tuple[int, int, int]:
        """Of the cache of values."""
        return (self.kv_heads, self.capacity, self.dim)


# ---- rotary positions, and new rows into the cache ----------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Where q, k and v lie: the width of each tensor that is read, and a (tensor, column) for each."""

    widths: tuple[int, ...]
    places: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def append(rows: int | None, h: Heads, source: Rows) -> Any:
    """(past i64 [1], the tensors of `source`, cos and sin [rows, rotary / 2] if rotary, keys, values) → q.

    q [rows, heads * dim] is turned and scaled; k, turned, and v are written behind `past` rows.
    """
    with kernel() as k:
        n = rows_of(rows)
        past = k.arg("past", (1,), "int64")
        tensors = [k.arg(f"x{i}", (n, width)) for i, width in enumerate(source.widths)]
        tables = [k.arg(name, (n, h.rotary // 2)) for name in ("cos", "sin")] if h.rotary else []
        keys, values = k.arg("keys", h.key_shape), k.arg("values", h.value_shape)
        q = k.arg("q", (n, h.heads * h.dim))
        with loop(rows, n) as row:
            at = T.Bind(past[0] + T.cast(row, "int64"))
            q_in, k_in, v_in = (_Head(tensors[t], row, column, h.dim) for t, column in source.places)

            def to_q(head: Any, d: Any, value: Any, lanes: int) -> None:
                store(q, value * splat(h.scale, lanes), row, head * h.dim + d, lanes=lanes)

            def to_keys(head: Any, d: Any, value: Any, lanes: int) -> None:
                T.buffer_store(keys, value, [head, at // BLOCK, d, at % BLOCK])

            def to_values(head: Any, d: Any, value: Any, lanes: int) -> None:
                store(values, value, head, at, d, lanes=lanes)

            turn = [load_row(table, row) for table in tables]
            with T.serial(0, h.heads) as head:
                _turned(q_in, head, h, turn, to_q, LANES)
            with T.serial(0, h.kv_heads) as head:
                # features of a key lie 16 apart: one at a time
                _turned(k_in, head, h, turn, to_keys, 1)
                chunks(h.dim, lambda d, lanes: to_values(head, d, v_in.load(head, d, lanes), lanes))
    return k.primfunc


def load_row(table: Any, row: Any) -> Any:
    """A reader of a row."""
    return lambda start, lanes: load(table, row, start, lanes=lanes)


@dataclass(frozen=True)
class _Head:
    """A head's features within a row."""

    tensor: Any
    row: Any
    column: int
    dim: int

    def load(self, head: Any, d: Any, lanes: int) -> Any:
        return load(self.tensor, self.row, self.column + head * self.dim + d, lanes=lanes)


def _turned(x: _Head, head: Any, h: Heads, tables: list[Any], write: Any, lanes: int) -> None:
    """Features i and i + rotary / 2 are the two coordinates of a point; those behind stay."""
    half = h.rotary // 2

    def turn(i: Any, lanes: int) -> None:
        left, right = T.Bind(x.load(head, i, lanes)), T.Bind(x.load(head, i + half, lanes))
        cos, sin = (T.Bind(table(i, lanes)) for table in tables)
        write(head, i, left * cos - right * sin, lanes)
        write(head, i + half, right * cos + left * sin, lanes)

    def keep(i: Any, lanes: int) -> None:
        write(head, i + h.rotary, x.load(head, i + h.rotary, lanes), lanes)

    chunks(half, turn, lanes)
    chunks(h.dim - h.rotary, keep, lanes)


# ---- attention ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """How many rows share the reading of keys and values, and sums of 16 lanes that registers hold."""

    rows: int
    sums: int


def attention(rows: int | None, h: Heads, tiling: Tiling) -> Any:
    """(past i64 [1], q [rows, heads * dim], keys, values) → y [rows, heads * dim].

    Row i sees the keys up to past + i, and of those the last `window`. The scores of a tile of rows, as
    many as the cache has keys, are all that is stored.
    """
    with kernel() as k:
        n = rows_of(rows)
        past, q = k.arg("past", (1,), "int64"), k.arg("q", (n, h.heads * h.dim))
        keys, values = k.arg("keys", h.key_shape), k.arg("values", h.value_shape)
        y = k.arg("y", (n, h.heads * h.dim))
        tile = 1 if rows == 1 else tiling.rows
        # late tiles see more keys than early ones: taken head by head, threads would get unequal parts
        with T.parallel(0, h.heads * ((n + tile - 1) // tile)) as unit:
            first = T.Bind(unit // h.heads * tile)
            # rows behind the end repeat the last one
            row = [T.Bind(T.min(first + i, n - 1)) for i in range(tile)]
            work = _Tile(h, q, unit % h.heads, row, past[0])
            work.scores(keys)
            work.softmax()
            work.mix(values, y, tiling.sums)
    return k.primfunc


class _Tile:
    """Some queries of one head: their scores, and the blocks of keys that any of them sees."""

    def __init__(self, h: Heads, q: Any, head: Any, row: list[Any], past: Any) -> None:
        self.h, self.q, self.head, self.row = h, q, head, row
        self.kv_head = T.Bind(head * h.kv_heads // h.heads)
        self.s = T.alloc_buffer((len(row), h.capacity), "float32")
        self.at, self.total = (T.alloc_buffer((len(row),), kind) for kind in ("int32", "float32"))
        for m, r in enumerate(row):
            T.buffer_store(self.at, T.cast(past + T.cast(r, "int64"), "int32"), [m])
        self.seen = T.Bind(self.at[len(row) - 1] + 1)
        self.end = T.Bind((self.seen + BLOCK - 1) // BLOCK)
        self.begin: Any = 0
        if h.window:
            self.begin = T.Bind(T.max(self.at[0] + 1 - h.window, 0) // BLOCK)

    def _blocks(self) -> Any:
        return T.serial(0, self.end - self.begin)

    def scores(self, keys: Any) -> None:
        """s = q · k"""
        chains = CHAINS if len(self.row) == 1 and self.h.dim % CHAINS == 0 else 1
        sums = [[T.alloc_buffer((BLOCK,), "float32") for _ in range(chains)] for _ in self.row]
        with self._blocks() as i:
            block = T.Bind(self.begin + i)
            for buffer in chain(*sums):
                store(buffer, splat(0.0, BLOCK), 0)
            with T.serial(0, self.h.dim // chains) as j:
                for c in range(chains):
                    d = j * chains + c
                    key = T.Bind(load(keys, self.kv_head, block, d, 0))
                    for m, row in enumerate(self.row):
                        feature = splat(self.q[row, self.head * self.h.dim + d], BLOCK)
                        store(sums[m][c], load(sums[m][c], 0) + key * feature, 0)
            for m, (first, *others) in enumerate(sums):
                store(self.s, sum((load(other, 0) for other in others), load(first, 0)), m, block * BLOCK)

    def softmax(self) -> None:
        """s becomes e^(s - largest), nothing where the query doesn't see; `total` its sum."""
        largest, total = Accumulator(HIDDEN, T.max), Accumulator(0.0, add)
        with T.serial(0, len(self.row)) as m:
            largest.clear()
            total.clear()
            with self._blocks() as i:
                place = T.Bind((self.begin + i) * BLOCK)
                score = self._seen(m, place, load(self.s, m, place))
                store(self.s, score, m, place)
                largest.take(score, BLOCK)
            most = largest.result()
            with self._blocks() as i:
                place = T.Bind((self.begin + i) * BLOCK)
                e = vectors.exp(load(self.s, m, place) - splat(most, BLOCK), BLOCK)
                # what is far below the largest is nothing, and what is hidden must be
                e = T.Bind(tirx.Select(e > splat(2e-38, BLOCK), e, splat(0.0, BLOCK)))
                store(self.s, e, m, place)
                total.take(e, BLOCK)
            T.buffer_store(self.total, T.float32(1) / total.result(), [m])

    def _seen(self, m: Any, place: Any, score: Any) -> Any:
        """Scores, capped, and hidden behind the query and before its window."""
        if self.h.softcap:
            cap = splat(self.h.softcap, BLOCK)
            score = vectors.tanh(score / cap, BLOCK) * cap
        keys, last = T.Bind(T.ramp(place, 1, BLOCK)), T.Bind(self.at[m])
        score = tirx.Select(keys <= splat(last, BLOCK), score, splat(HIDDEN, BLOCK))
        if self.h.window:
            first = splat(last - self.h.window, BLOCK)
            score = tirx.Select(keys > first, score, splat(HIDDEN, BLOCK))
        return T.Bind(score)

    def mix(self, values: Any, y: Any, sums_at_once: int) -> None:
        """y = s @ v / total"""
        # the last block may reach behind the rows that were ever written: only what is seen is read
        first = T.Bind(self.begin * BLOCK)

        def part(start: Any, lanes: int, count: int) -> None:
            sums = [[T.alloc_buffer((lanes,), "float32") for _ in range(count)] for _ in self.row]
            for buffer in chain(*sums):
                store(buffer, splat(0.0, lanes), 0, lanes=lanes)
            with T.serial(0, self.seen - first) as i:
                for c in range(count):
                    v = T.Bind(load(values, self.kv_head, first + i, start + c * lanes, lanes=lanes))
                    for m in range(len(self.row)):
                        weight = splat(self.s[m, first + i], lanes)
                        store(sums[m][c], load(sums[m][c], 0, lanes=lanes) + v * weight, 0, lanes=lanes)
            for m, row in enumerate(self.row):
                for c in range(count):
                    value = load(sums[m][c], 0, lanes=lanes) * splat(self.total[m], lanes)
                    store(y, value, row, self.head * self.h.dim + start + c * lanes, lanes=lanes)

        _in_groups(self.h.dim, max(1, sums_at_once // len(self.row)), part)


def _in_groups(width: int, count: int, part: Any) -> None:
    """`part(start, lanes, vectors)` over a width, some vectors at once where they are whole."""
    count = max(1, min(count, width // LANES))
    group = count * LANES
    whole = width // group
    if whole == 1:
        part(0, LANES, count)
    elif whole:
        with T.serial(0, whole) as i:
            part(i * group, LANES, count)
    chunks(width - whole * group, lambda start, lanes: part(whole * group + start, lanes, 1))
