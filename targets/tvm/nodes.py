"""Values of a Relax function: tensors [rows, width], columns of them, and what is not computed yet.

A tree of elementwise operations becomes one kernel when something else needs its result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from gammac.targets.tvm.tir.elementwise import Apply, Number, Source, Tree

FLOAT: Final = "float32"
INTEGER: Final = "int64"

Register = Callable[[Any, int, bool], int]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A result [rows, width]; `rows` None is the number that the function is called with."""

    var: Any
    rows: int | None
    width: int
    dtype: str = FLOAT


@dataclass(frozen=True, eq=False)
class Part:
    """Columns of a tensor, not copied."""

    tensor: Tensor
    column: int
    width: int

    @property
    def rows(self) -> int | None:
        """Those of the tensor."""
        return self.tensor.rows

    @property
    def dtype(self) -> str:
        """That of the tensor."""
        return self.tensor.dtype

    def tree(self, register: Register) -> Tree:
        """Its part in a kernel."""
        return Source(register(self.tensor.var, self.tensor.width, False), self.tensor.width, self.column)


@dataclass(frozen=True, eq=False)
class Lazy:
    """A tree of elementwise operations, not computed yet."""

    rows: int | None
    width: int
    dtype: str
    tree: Callable[[Register], Tree]


class Deferred:
    """A tensor that is not computed yet: what reads it may have a kernel that computes it on the way."""

    dtype = FLOAT

    def __init__(self, rows: int | None, width: int, make: Callable[[], Tensor]) -> None:
        self.rows, self.width = rows, width
        self._make = make
        self._made: Tensor | None = None

    @property
    def pending(self) -> bool:
        """Whether nothing has asked for it."""
        return self._made is None

    def tensor(self) -> Tensor:
        """The tensor, computed once."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def tree(self, register: Register) -> Tree:
        """Its part in a kernel."""
        return whole(self.tensor()).tree(register)


class Normed(Deferred):
    """An RMS norm of whole rows: a product in int8 wants it rounded."""

    def __init__(self, x: Tensor, weight: Any, eps: float, make: Callable[[], Tensor]) -> None:
        super().__init__(x.rows, x.width, make)
        self.x, self.weight, self.eps = x, weight, eps


Node = Part | Lazy | Deferred


def whole(tensor: Tensor) -> Part:
    """A tensor as a node."""
    return Part(tensor, 0, tensor.width)


def one_row(var: Any, like: Node) -> Lazy:
    """A vector that stands for every row; `like` has the sizes."""
    return Lazy(
        like.rows,
        like.width,
        like.dtype,
        lambda register: Source(register(var, like.width, True), like.width, 0, True),
    )


def number(value: float, like: Node) -> Lazy:
    """A constant; `like` has the sizes."""
    return Lazy(like.rows, like.width, like.dtype, lambda register: Number(value))


def apply(function: str, *operands: Node) -> Lazy:
    """A function of nodes of one size."""
    first = operands[0]
    sizes = {(o.rows, o.width, o.dtype) for o in operands}
    assert len(sizes) == 1, f"{function} of {sizes}"
    return Lazy(
        first.rows, first.width, first.dtype,
        lambda register: Apply(function, tuple(o.tree(register) for o in operands)),
    )  # fmt: skip
