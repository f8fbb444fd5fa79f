"""Attention over the cache, in one pass over its keys: softmax in f32, with a running maximum and sum.

A block takes some queries of the heads that share a key, and 128 keys at a time: a thread scores one key for
every query, then sums one feature of the values. The cache lies as on the CPU, keys in blocks of 16,
[kv_heads, capacity / 16, dim, 16], so that neighbouring threads read neighbouring keys.

    m' = max(m, s)    l' = l e^(m - m') + Σ e^(s - m')    y' = y e^(m - m') + Σ e^(s - m') v

(Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.)
"""

from typing import Any, Final

from gammac.targets.tvm.cuda.grid import WARP, Grid, blocks, over_block, when
from gammac.targets.tvm.tir import vectors
from gammac.targets.tvm.tir.attention import BLOCK, HIDDEN, Heads, Rows
from gammac.targets.tvm.tir.vectors import T, add, kernel, rows_of, tirx

Expr = Any

KEYS: Final = 128  # and threads
QUERIES: Final = 8


def append(rows: int | None, h: Heads, source: Rows, *, device: bool) -> Any:
    """(past i64 [1], the tensors of `source`, cos and sin [rows, rotary / 2] if rotary, keys, values) → q.

    q [rows, heads * dim] is turned and scaled; k, turned, and v are written behind `past` rows. A block takes
    a head of a row.
    """
    with kernel() as k:
        n = rows_of(rows)
        past = k.arg("past", (1,), "int64")
        tensors = [k.arg(f"x{i}", (n, width)) for i, width in enumerate(source.widths)]
        tables = [k.arg(name, (n, h.rotary // 2)) for name in ("cos", "sin")] if h.rotary else []
        keys, values = k.arg("keys", h.key_shape), k.arg("values", h.value_shape)
        q = k.arg("q", (n, h.heads * h.dim))
        size = min(KEYS, -(-h.dim // WARP) * WARP)
        with blocks((h.heads + h.kv_heads, n), size, device=device) as g, g.threads(barrier=False):
            head, row = g.block
            at = T.Bind(past[0] + T.cast(row, "int64"))

            def read(place: int, head: Expr, d: Expr) -> Expr:
                tensor, column = source.places[place]
                return tensors[tensor][row, column + head * h.dim + d]

            def to_q(d: Expr, value: Expr) -> None:
                T.buffer_store(q, value * T.float32(h.scale), [row, head * h.dim + d])

            def to_cache() -> None:
                own = T.Bind(head - h.heads)

                def key(d: Expr, value: Expr) -> None:
                    T.buffer_store(keys, value, [own, at // BLOCK, d, at % BLOCK])

                _turned(g, h, row, tables, lambda d: read(1, own, d), key)
                g.each(h.dim, lambda d: T.buffer_store(values, read(2, own, d), [own, at, d]))

            with T.If(head < h.heads):
                with T.Then():
                    _turned(g, h, row, tables, lambda d: read(0, head, d), to_q)
                with T.Else():
                    to_cache()
    return k.primfunc


def _turned(g: Grid, h: Heads, row: Expr, tables: list[Any], read: Any, write: Any) -> None:
    """Features i and i + rotary / 2 are the two coordinates of a point; those behind stay."""
    half = h.rotary // 2

    def turn(i: Expr) -> None:
        left, right = T.Bind(read(i)), T.Bind(read(i + half))
        cos, sin = (T.Bind(table[row, i]) for table in tables)
        write(i, left * cos - right * sin)
        write(i + half, right * cos + left * sin)

    if half:
        g.each(half, turn)
    if h.dim > h.rotary:
        g.each(h.dim - h.rotary, lambda i: write(i + h.rotary, read(i + h.rotary)))


def attention(rows: int | None, h: Heads, *, device: bool) -> Any:
    """(past i64 [1], q [rows, heads * dim], keys, values) → y [rows, heads * dim].

    Row i sees the keys up to past + i, and of those the last `window`.
    """
    with kernel() as k:
        n = rows_of(rows)
        past, q = k.arg("past", (1,), "int64"), k.arg("q", (n, h.heads * h.dim))
        keys, values = k.arg("keys", h.key_shape), k.arg("values", h.value_shape)
        y = k.arg("y", (n, h.heads * h.dim))
        shared_by = h.heads // h.kv_heads
        many = min(QUERIES, shared_by) if rows == 1 else QUERIES
        with blocks(((n * shared_by + many - 1) // many, h.kv_heads), KEYS, device=device) as g:
            first = T.Bind(g.block[0] * many)
            # queries behind the end repeat the last one
            number = [T.Bind(T.min(first + i, n * shared_by - 1)) for i in range(many)]
            row = [T.Bind(i // shared_by) for i in number]
            head = [T.Bind(g.block[1] * shared_by + i % shared_by) for i in number]
            place = [T.Bind(T.cast(past[0] + T.cast(r, "int64"), "int32")) for r in row]
            work = _Tile(g, h, place)
            work.take(q, row, head)
            with T.serial(0, (work.seen - work.begin + KEYS - 1) // KEYS) as i:
                start = T.Bind(work.begin + i * KEYS)
                work.score(keys, start)
                work.weigh()
                work.mix(values, start)
            work.write(y, row, head)
    return k.primfunc


class _Tile:
    """Some queries of one key head, whose places in the sequence are `place`."""

    def __init__(self, g: Grid, h: Heads, place: list[Expr]) -> None:
        self.g, self.h, self.place, self.many = g, h, place, len(place)
        self.kv_head = g.block[1]
        self.seen = T.Bind(place[-1] + 1)
        self.begin: Expr = T.Bind(T.max(place[0] + 1 - h.window, 0)) if h.window else 0
        # threads that share a feature take every so many keys
        self.parts = max(1, KEYS // h.dim)
        self.features = -(-h.dim // KEYS)
        self.q, self.p = g.shared(self.many * h.dim), g.shared(self.many * KEYS)
        self.s, self.m, self.l, self.scale = (g.registers(self.many) for _ in range(4))
        self.out = g.registers(self.many * self.features)
        self.largest = g.registers(self.many)

    def take(self, q: Any, row: list[Expr], head: list[Expr]) -> None:
        """Read the queries."""
        with self.g.threads(barrier=False):
            for registers, value in ((self.m, HIDDEN), (self.l, 0.0), (self.out, 0.0)):
                registers.fill(value)
            for i in range(self.many):
                self.g.each(self.h.dim, lambda d, i=i: T.buffer_store(  # type: ignore[misc]
                    self.q, q[row[i], head[i] * self.h.dim + d], [i * self.h.dim + d]))  # fmt: skip

    def score(self, keys: Any, start: Expr) -> None:
        """s = q · k of the thread's key, or hidden; `largest` that of all threads."""
        with self.g.threads() as t:
            key = T.Bind(start + t)
            self.s.fill(HIDDEN)

            def seen() -> None:
                sums = self.g.locals(self.many)
                for i in range(self.many):
                    T.buffer_store(sums, T.float32(0), [i])
                with T.serial(0, self.h.dim) as d:
                    feature = T.Bind(keys[self.kv_head, key // BLOCK, d, key % BLOCK])
                    for i in range(self.many):
                        T.buffer_store(sums, sums[i] + feature * self.q[i * self.h.dim + d], [i])
                for i in range(self.many):
                    self.s.set(i, self._visible(i, key, sums[i]))

            when(key < self.seen, seen)
            for i in range(self.many):
                self.largest.set(i, self.s.get(i))
        over_block(self.largest, T.max)

    def _visible(self, i: int, key: Expr, score: Expr) -> Expr:
        if self.h.softcap:
            cap = T.float32(self.h.softcap)
            score = vectors.tanh(score / cap, 1) * cap
        hidden = T.float32(HIDDEN)
        score = tirx.Select(key <= self.place[i], score, hidden)
        if self.h.window:
            score = tirx.Select(key > self.place[i] - self.h.window, score, hidden)
        return T.Bind(score)

    def weigh(self) -> None:
        """p = e^(s - largest so far), and what was summed before is scaled to that."""
        with self.g.threads() as t:
            for i in range(self.many):
                most = T.Bind(T.max(self.m.get(i), self.largest.get(i)))
                self.scale.set(i, vectors.exp(self.m.get(i) - most, 1))
                self.m.set(i, most)
                shown = self.s.get(i) > T.float32(HIDDEN / 2)
                p = T.Bind(tirx.Select(shown, vectors.exp(self.s.get(i) - most, 1), T.float32(0)))
                T.buffer_store(self.p, p, [i * KEYS + t])
                self.l.set(i, self.l.get(i) * self.scale.get(i) + p)

    def mix(self, values: Any, start: Expr) -> None:
        """y = y e^… + p v, a feature and some of the keys in each thread."""
        with self.g.threads() as t:
            here = T.Bind(T.min(KEYS, self.seen - start))
            for f in range(self.features):
                part, feature = self._part(t, f)

                def add_up(f: int = f, part: Expr = part, feature: Expr = feature) -> None:
                    sums = self.g.locals(self.many)
                    for i in range(self.many):
                        T.buffer_store(sums, T.float32(0), [i])
                    with T.serial(0, (here - part + self.parts - 1) // self.parts) as j:
                        key = T.Bind(part + j * self.parts)
                        v = T.Bind(values[self.kv_head, start + key, feature])
                        for i in range(self.many):
                            T.buffer_store(sums, sums[i] + v * self.p[i * KEYS + key], [i])
                    for i in range(self.many):
                        at = f * self.many + i
                        self.out.set(at, self.out.get(at) * self.scale.get(i) + sums[i])

                when(self._inside(part, feature), add_up)

    def _part(self, t: Expr, f: int) -> tuple[Expr, Expr]:
        """Which of the threads of a feature this one is, and which feature."""
        if self.features > 1 or self.parts == 1:
            return T.int32(0), T.Bind(t + f * KEYS)
        return T.Bind(t // self.h.dim), T.Bind(t % self.h.dim)

    def _inside(self, part: Expr, feature: Expr) -> Expr | None:
        if self.parts > 1:
            return part < self.parts if KEYS % self.h.dim else None
        return feature < self.h.dim if self.h.dim % KEYS else None

    def write(self, y: Any, row: list[Expr], head: list[Expr]) -> None:
        """y / l, added up over the threads that share a feature."""
        over_block(self.l, add)
        dim = self.h.dim
        sums = self.g.shared(self.parts * self.many * dim)
        with self.g.threads() as t:
            for f in range(self.features):
                part, feature = self._part(t, f)

                def put(f: int = f, part: Expr = part, feature: Expr = feature) -> None:
                    for i in range(self.many):
                        value = self.out.get(f * self.many + i)
                        T.buffer_store(sums, value, [(part * self.many + i) * dim + feature])

                when(self._inside(part, feature), put)
        with self.g.threads():
            for i in range(self.many):

                def one(d: Expr, i: int = i) -> None:
                    value = sums[i * dim + d]
                    for part in range(1, self.parts):
                        value = value + sums[(part * self.many + i) * dim + d]
                    T.buffer_store(y, value / self.l.get(i), [row[i], head[i] * dim + d])

                self.g.each(dim, one)
