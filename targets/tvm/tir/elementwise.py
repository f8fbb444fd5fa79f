"""One kernel for a whole tree of elementwise operations on rows.

    mul(silu(x0[0]), x0[1536])        x0 [rows, 3072] → y [rows, 1536]

A tree's text is its key: equal trees share a kernel.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gammac.targets.tvm.tir import vectors
from gammac.targets.tvm.tir.vectors import T, chunks, kernel, load, loop, rows_of, splat, store

Function = Callable[..., Any]


def _half(x: Any, lanes: int, of: Any) -> Any:
    return x * splat(0.5, lanes) * (splat(1.0, lanes) + of)


def _gelu(x: Any, lanes: int) -> Any:
    x = T.Bind(x)
    return _half(x, lanes, vectors.erf(x * splat(0.70710678118654752, lanes), lanes))


def _gelu_tanh(x: Any, lanes: int) -> Any:
    x = T.Bind(x)
    inner = (x + x * x * x * splat(0.044715, lanes)) * splat(0.79788456080286536, lanes)
    return _half(x, lanes, vectors.tanh(inner, lanes))


def _silu(x: Any, lanes: int) -> Any:
    x = T.Bind(x)
    return x * vectors.sigmoid(x, lanes)


FUNCTIONS: Final[Mapping[str, Function]] = {
    "add": lambda x, y, lanes: x + y,
    "sub": lambda x, y, lanes: x - y,
    "mul": lambda x, y, lanes: x * y,
    "div": lambda x, y, lanes: x / y,
    "neg": lambda x, lanes: splat(0.0, lanes) - x,
    "relu": lambda x, lanes: T.max(x, splat(0.0, lanes)),
    "exp": vectors.exp,
    "sigmoid": vectors.sigmoid,
    "tanh": vectors.tanh,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}


@dataclass(frozen=True)
class Source:
    """A tensor that a tree reads: `index` is its place among the kernel's arguments."""

    index: int
    width: int
    column: int = 0  # where the part begins that is read
    one_row: bool = False  # the same row for all

    def __str__(self) -> str:
        return f"{'w' if self.one_row else 'x'}{self.index}[{self.column}]"


@dataclass(frozen=True)
class Number:
    """A constant."""

    value: float

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class Apply:
    """A function of trees, one of FUNCTIONS."""

    function: str
    operands: tuple["Tree", ...]

    def __str__(self) -> str:
        return f"{self.function}({', '.join(map(str, self.operands))})"


Tree = Source | Number | Apply


def sources(tree: Tree) -> Iterator[Source]:
    """What a tree reads, in order."""
    if isinstance(tree, Source):
        yield tree
    elif isinstance(tree, Apply):
        for operand in tree.operands:
            yield from sources(operand)


def elementwise(rows: int | None, width: int, tree: Tree, dtype: str = "float32") -> Any:
    """(the tensors of `tree` by index) → y [rows, width]. Integers know sums and products only."""
    with kernel() as k:
        n = rows_of(rows)
        found = {s.index: s for s in sources(tree)}
        tensors = [
            k.arg(f"x{i}", (found[i].width,) if found[i].one_row else (n, found[i].width), dtype)
            for i in sorted(found)
        ]
        y = k.arg("y", (n, width), dtype)

        def value(tree: Tree, row: Any, start: Any, lanes: int) -> Any:
            if isinstance(tree, Source):
                place = (tree.column + start,) if tree.one_row else (row, tree.column + start)
                return load(tensors[tree.index], *place, lanes=lanes)
            if isinstance(tree, Number):
                number = T.int64(int(tree.value)) if dtype == "int64" else T.float32(tree.value)
                return splat(number, lanes)
            operands = [value(operand, row, start, lanes) for operand in tree.operands]
            return FUNCTIONS[tree.function](*operands, lanes=lanes)

        with loop(rows, n) as row:
            chunks(
                width, lambda start, lanes: store(y, value(tree, row, start, lanes), row, start, lanes=lanes)
            )
    return k.primfunc
