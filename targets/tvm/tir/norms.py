"""Norms of each row, or of each part of a row: sums in f32, over vectors."""

from typing import Any

from gammac.targets.tvm.tir.vectors import (
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
)


def rms_norm(rows: int | None, width: int, inner: int, eps: float) -> Any:
    """(x [rows, width], weight [inner]) → y: each `inner` elements over their root mean square."""
    with kernel() as k:
        n = rows_of(rows)
        x, weight, y = k.arg("x", (n, width)), k.arg("weight", (inner,)), k.arg("y", (n, width))
        with loop(rows, n) as row, T.serial(0, width // inner) as part:
            at = part * inner
            total = Accumulator(0.0, add)
            chunks(
                inner, lambda start, lanes: total.take(_squared(load(x, row, at + start, lanes=lanes)), lanes)
            )
            factor = _rsqrt(total.result() * T.float32(1 / inner) + T.float32(eps))

            def write(start: Any, lanes: int) -> None:
                scaled = load(x, row, at + start, lanes=lanes) * splat(factor, lanes)
                store(y, scaled * load(weight, start, lanes=lanes), row, at + start, lanes=lanes)

            chunks(inner, write)
    return k.primfunc


def layer_norm(rows: int | None, width: int, inner: int, eps: float) -> Any:
    """(x [rows, width], weight [inner], bias [inner]) → y: each `inner` elements less their mean, over
    their deviation. Two passes: the squares are those of what is left without the mean."""
    with kernel() as k:
        n = rows_of(rows)
        x, weight, bias = k.arg("x", (n, width)), k.arg("weight", (inner,)), k.arg("bias", (inner,))
        y = k.arg("y", (n, width))
        with loop(rows, n) as row, T.serial(0, width // inner) as part:
            at = part * inner
            total, squares = Accumulator(0.0, add), Accumulator(0.0, add)
            chunks(inner, lambda start, lanes: total.take(load(x, row, at + start, lanes=lanes), lanes))
            mean = T.Bind(total.result() * T.float32(1 / inner))

            def centred(start: Any, lanes: int) -> Any:
                return load(x, row, at + start, lanes=lanes) - splat(mean, lanes)

            chunks(inner, lambda start, lanes: squares.take(_squared(centred(start, lanes)), lanes))
            factor = _rsqrt(squares.result() * T.float32(1 / inner) + T.float32(eps))

            def write(start: Any, lanes: int) -> None:
                scaled = centred(start, lanes) * splat(factor, lanes) * load(weight, start, lanes=lanes)
                store(y, scaled + load(bias, start, lanes=lanes), row, at + start, lanes=lanes)

            chunks(inner, write)
    return k.primfunc


def _squared(value: Any) -> Any:
    value = T.Bind(value)
    return value * value


def _rsqrt(value: Any) -> Any:
    return T.Bind(T.float32(1) / T.sqrt(value))
