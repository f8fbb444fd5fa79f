"""Activations in int8: for each token and group of inputs its own scale, chosen when the model runs.

    scale = max |x| / 127,  q = round(x / scale),  sum = sum of q

The group is what the weight's kernel sums before a scale comes in (`Layout.segment`): the weight's own group
up to 128 inputs, parts of a larger one. One scale a row would cost nothing less in the product, since the
weight's scale comes in at the same place, and an outlier would take the bits of all other inputs. The scale
is symmetric: a zero point of the inputs would need sums of the codes. int8 lies in [-127, 127].
"""

from collections.abc import Callable
from typing import Any

from gammac.targets.tvm.kernels.layout import Layout
from gammac.targets.tvm.kernels.low_rank import LOW, FirstFactor
from gammac.targets.tvm.kernels.operands import Kernel, Operand, declare, quantized_operands
from gammac.targets.tvm.tir import vectors
from gammac.targets.tvm.tir.vectors import (
    ROUND,
    ROUND_BITS,
    Accumulator,
    T,
    add,
    chunks,
    load,
    splat,
    splat_int,
    store,
)

Expr = Any
Values = Callable[[Expr, int], Expr]


def quantize_activations(columns: int, group: int, tokens: int | str, rank: int = 0) -> Kernel:
    """x f32 [tokens, columns] → x_codes int8 [tokens, padded], x_scales f32 and x_sums i32 [tokens, groups].

    `tokens` is a number or "m"; `group` is the `Layout.segment` of the weight. With a `rank`, x @ a.T for
    a f32 [rank, columns], too: x_low f32 [tokens, rank].
    """
    more, low = _low_operands(columns, tokens, rank)
    inputs = (Operand("x", (tokens, columns), "float32"), *more)
    outputs = (*quantized_operands(columns, group, tokens), *low)
    with vectors.kernel() as made:
        size = tokens if isinstance(tokens, int) else T.int64()
        x, *a = declare(inputs, size).values()
        results = declare(outputs, size)
        with _rows(size) as row:
            _quantize(results, row, columns, group, lambda start, lanes: load(x, row, start, lanes=lanes))
            if a:
                FirstFactor(x, None, a[0], results[LOW]).write_one(row, [])
    return Kernel(f"quantize_{columns}_g{group}_{tokens}", inputs, outputs, made.primfunc)


def rms_norm_quantize(columns: int, group: int, tokens: int | str, epsilon: float, rank: int = 0) -> Kernel:
    """As `quantize_activations`, of x * weight / sqrt(mean(x^2) + epsilon), weight f32 [columns]."""
    more, low = _low_operands(columns, tokens, rank)
    inputs = (Operand("x", (tokens, columns), "float32"), Operand("weight", (columns,), "float32"), *more)
    outputs = (*quantized_operands(columns, group, tokens), *low)
    with vectors.kernel() as made:
        size = tokens if isinstance(tokens, int) else T.int64()
        x, weight, *a = declare(inputs, size).values()
        results = declare(outputs, size)
        with _rows(size) as row:
            squares = Accumulator(0.0, add)

            def square(start: Expr, lanes: int) -> None:
                value = T.Bind(load(x, row, start, lanes=lanes))
                squares.take(value * value, lanes)

            chunks(columns, square)
            mean = squares.result() * T.float32(1 / columns)
            factor = T.Bind(T.float32(1) / T.sqrt(mean + T.float32(epsilon)))

            def normed(start: Expr, lanes: int) -> Expr:
                scaled = load(x, row, start, lanes=lanes) * splat(factor, lanes)
                return scaled * load(weight, start, lanes=lanes)

            _quantize(results, row, columns, group, normed)
            if a:
                FirstFactor(x, weight, a[0], results[LOW]).write_one(row, [factor])
    return Kernel(f"rms_norm_quantize_{columns}_g{group}_{tokens}", inputs, outputs, made.primfunc)


def _low_operands(
    columns: int, tokens: int | str, rank: int
) -> tuple[tuple[Operand, ...], tuple[Operand, ...]]:
    """What is read, and what is written."""
    if not rank:
        return (), ()
    assert tokens == 1, "rows of many tokens share loads of a: see `low_rank`"
    return (Operand("a", (rank, columns), "float32"),), (Operand(LOW, (tokens, rank), "float32"),)


def _rows(size: Expr) -> Any:
    return T.serial(0, size) if isinstance(size, int) else T.parallel(0, size)


def _quantize(results: dict[str, Any], row: Expr, columns: int, group: int, values: Values) -> None:
    """Every group of a row; the last may be ragged, and the row is filled up with zeros."""
    whole, rest = divmod(columns, group)
    if whole:
        with T.serial(0, whole) as number:
            _quantize_group(results, row, number, group, group, values)
    if rest:
        _quantize_group(results, row, whole, group, rest, values)
    padding = Layout.padded(columns) - columns
    if padding:
        with T.serial(0, padding) as i:
            T.buffer_store(results["x_codes"], T.int8(0), [row, columns + i])


def _quantize_group(
    results: dict[str, Any], row: Expr, number: Expr, group: int, inputs: int, values: Values
) -> None:
    parts = [(start, lanes, T.Bind(values(number * group + start, lanes))) for start, lanes in _spans(inputs)]
    sizes = [(lanes, T.max(value, splat(0.0, lanes) - value)) for _, lanes, value in parts]
    largest = _folded(sizes, "float32", T.max)
    T.buffer_store(results["x_scales"], largest * T.float32(1 / 127), [row, number])
    inverse = T.Bind(T.Select(largest > T.float32(0), T.float32(127) / largest, T.float32(0)))
    codes = []
    for start, lanes, value in parts:
        shifted = value * splat(inverse, lanes) + splat(ROUND, lanes)
        code = T.Bind(T.reinterpret(_of("int32", lanes), shifted) - splat_int(ROUND_BITS, lanes))
        store(results["x_codes"], T.cast(code, _of("int8", lanes)), row, number * group + start, lanes=lanes)
        codes.append((lanes, code))
    T.buffer_store(results["x_sums"], _folded(codes, "int32", add), [row, number])


def _folded(parts: list[tuple[int, Expr]], kind: str, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Vectors (lanes, value) combined into one number.

    Through a buffer at each halving: TVM looks through what is bound, twice for each use, and takes seconds.
    """
    lanes = parts[0][0]
    buffer = T.alloc_buffer((lanes,), kind)
    store(buffer, parts[0][1], 0, lanes=lanes)
    for width, value in parts[1:]:
        store(buffer, combine(load(buffer, 0, lanes=width), value), 0, lanes=width)
    while lanes > 1:
        lanes //= 2
        halves = [load(buffer, start, lanes=lanes) for start in (0, lanes)]
        store(buffer, combine(*halves), 0, lanes=lanes)
    return T.Bind(buffer[0])


def _spans(width: int) -> list[tuple[int, int]]:
    """(start, lanes) of vectors that cover `width` elements: of 16, then ever smaller ones."""
    spans, start, lanes = [], 0, vectors.LANES
    while start < width:
        while width - start < lanes:
            lanes //= 2
        spans.append((start, lanes))
        start += lanes
    return spans


def _of(kind: str, lanes: int) -> str:
    return f"{kind}x{lanes}" if lanes > 1 else kind
