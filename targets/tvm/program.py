"""A Relax module under construction: kernels that are made once, parameters, and functions that call them."""

from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax, tirx  # type: ignore[import-untyped]

from gammac.targets.tvm.device import Device
from gammac.targets.tvm.nodes import FLOAT, INTEGER, Deferred, Node, Part, Tensor
from gammac.targets.tvm.params import Array, Places
from gammac.targets.tvm.tir.elementwise import Apply, Source, Tree


class Program:
    """Kernels by key, parameters by name, functions."""

    def __init__(self, data: Places, device: Device) -> None:
        self.device = device
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
            self._params[name] = self._data.place(name, array)
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
        if isinstance(node, Deferred):
            return node.tensor()
        if isinstance(node, Part) and (node.column, node.width) == (0, node.tensor.width):
            return node.tensor
        variables: list[Any] = []

        def register(var: Any, width: int, one_row: bool) -> int:
            if not any(var is other for other in variables):
                variables.append(var)
            return next(i for i, other in enumerate(variables) if other is var)

        device, tree = self.program.device, node.tree(register)
        key = (node.rows, node.width, node.dtype, str(tree), tuple(_widths(tree)))
        var = self.call(
            "elementwise", key, lambda: device.elementwise(node.rows, node.width, tree, node.dtype),
            variables,
            self.type_of(node.rows, node.width, node.dtype),
        )  # fmt: skip
        return Tensor(var, node.rows, node.width, node.dtype)


def _widths(tree: Tree) -> list[int]:
    if isinstance(tree, Source):
        return [tree.width]
    return [w for operand in tree.operands for w in _widths(operand)] if isinstance(tree, Apply) else []
