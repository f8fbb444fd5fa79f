"""A Relax module under construction: kernels that are made once, parameters, and functions that call them.

Values of a function are tensors [rows, width], or trees of elementwise operations on such tensors that
become one kernel when something else needs their result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tvm import relax, tirx  # type: ignore[import-untyped]

from gammac.targets.tvm.params import Array, ParamFile
from gammac.targets.tvm.tir.elementwise import Apply, Number, Source, Tree, elementwise

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


class Normed:
    """An RMS norm of whole rows that is not computed yet: what reads it may want it in int8."""

    dtype = FLOAT

    def __init__(self, x: Tensor, weight: Any, eps: float, make: Callable[[], Tensor]) -> None:
        self.x, self.weight, self.eps, self._make = x, weight, eps, make
        self.rows, self.width = x.rows, x.width
        self._made: Tensor | None = None

    def tensor(self) -> Tensor:
        """In f32, computed once."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def tree(self, register: Register) -> Tree:
        """Its part in a kernel."""
        return whole(self.tensor()).tree(register)


Node = Part | Lazy | Normed


class Program:
    """Kernels by key, parameters by name, functions."""

    def __init__(self, data: ParamFile) -> None:
        self.builder = relax.BlockBuilder()
        self._data = data
        self._kernels: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._params: dict[str, int] = {}

    def kernel(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
        """The kernel of a key, made at its first use and named after its kind."""
        text = f"{kind} {key!r}"
        if text not in self._kernels:
            count = self._counts[kind] = self._counts.get(kind, -1) + 1
            self._kernels[text] = self.builder.add_func(make(), f"{kind}_{count}")
        return self._kernels[text]

    def param(self, name: str, array: Callable[[], Array]) -> int:
        """The place of a parameter, written at the first mention of its name."""
        if name not in self._params:
            self._params[name] = self._data.append(name, array())
        return self._params[name]

    def param_type(self, index: int) -> Any:
        """Shape and element type of a parameter."""
        entry = self._data.entries[index]
        return relax.TensorType(entry.shape, entry.dtype)


class FunctionWriter:
    """A function of the program: of one row, or of as many as it is called with.

    `last_only`: what follows the last product is computed for the last row alone.
    """

    def __init__(self, program: Program, rows: int | None, *, last_only: bool = False) -> None:
        self.program, self.rows, self.last_only = program, rows, last_only
        self.count = tirx.Var("n", "int64") if rows is None else rows
        column = relax.TensorType((self.count, 1), INTEGER)
        self.ids = Tensor(relax.Var("ids", column), rows, 1, INTEGER)
        self.past = relax.Var("past", relax.TensorType((1,), INTEGER))
        # as objects: TVM would check every tensor of a tuple at every call
        self.caches = relax.Var("caches", relax.ObjectType())
        self.params = relax.Var("params", relax.ObjectType())
        self.read: set[int] = set()
        self._fetched: dict[tuple[str, int], Any] = {}
        self._shared: dict[Any, Any] = {}

    @property
    def arguments(self) -> list[Any]:
        """In the order of the calls."""
        return [self.ids.var, self.past, self.caches, self.params]

    def type_of(self, rows: int | None, width: int, dtype: str = FLOAT) -> Any:
        """The type of a tensor."""
        return relax.TensorType((self.count if rows is None else rows, width), dtype)

    def param(self, name: str, array: Callable[[], Array], *, whole: bool = True) -> Any:
        """A parameter; `whole` unless only some of its rows are read."""
        index = self.program.param(name, array)
        if whole:
            self.read.add(index)
        return self._item(self.params, "param", index, self.program.param_type(index))

    def cache(self, index: int, shape: Sequence[int]) -> Any:
        """A tensor of the cache."""
        return self._item(self.caches, "cache", index, relax.TensorType(shape, FLOAT))

    def _item(self, of: Any, kind: str, index: int, type_: Any) -> Any:
        if (kind, index) not in self._fetched:
            call = relax.call_pure_packed(
                "vm.builtin.tuple_getitem", of, relax.prim_value(index), ty_args=type_
            )
            self._fetched[kind, index] = self.program.builder.emit(call)
        return self._fetched[kind, index]

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """What several ops of the function use, made at its first use."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    # ---- calls ----

    def call(self, kind: str, key: Any, make: Callable[[], Any], args: Sequence[Any], out: Any) -> Any:
        """The result, or results, of a kernel; `out` is their type, or a list of types."""
        kernel = self.program.kernel(kind, key, make)
        made = self.program.builder.emit(relax.call_tir(kernel, list(args), out))
        if not isinstance(out, list):
            return made
        return [self.program.builder.emit(relax.TupleGetItem(made, i)) for i in range(len(out))]

    def call_inplace(
        self,
        kind: str,
        key: Any,
        make: Callable[[], Any],
        args: Sequence[Any],
        written: Sequence[Any],
        out: Any,
    ) -> Any:
        """The last result of a kernel whose last arguments, `written`, it changes."""
        inplace = range(len(args), len(args) + len(written))
        args = [*args, *written]
        kernel = self.program.kernel(kind, key, make)
        types = [args[i].ty for i in inplace]
        where = [*inplace, -1]
        made = self.program.builder.emit(relax.op.call_tir_inplace(kernel, list(args), where, [*types, out]))
        return self.program.builder.emit(relax.TupleGetItem(made, len(inplace)))

    def tensor(self, node: Node) -> Tensor:
        """A node's values as a tensor of their own."""
        if isinstance(node, Normed):
            return node.tensor()
        if isinstance(node, Part) and (node.column, node.width) == (0, node.tensor.width):
            return node.tensor
        variables: list[Any] = []

        def register(var: Any, width: int, one_row: bool) -> int:
            if not any(var is other for other in variables):
                variables.append(var)
            return next(i for i, other in enumerate(variables) if other is var)

        tree = node.tree(register)
        key = (node.rows, node.width, node.dtype, str(tree), tuple(_widths(tree)))
        var = self.call(
            "elementwise", key, lambda: elementwise(node.rows, node.width, tree, node.dtype), variables,
            self.type_of(node.rows, node.width, node.dtype),
        )  # fmt: skip
        return Tensor(var, node.rows, node.width, node.dtype)


def _widths(tree: Tree) -> list[int]:
    if isinstance(tree, Source):
        return [tree.width]
    return [w for operand in tree.operands for w in _widths(operand)] if isinstance(tree, Apply) else []


# ---- nodes --------------------------------------------------------------------------------------


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
