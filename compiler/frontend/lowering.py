"""What the rows of the lowering table work with: operands of an FX node, shapes, and a builder."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.fx import Node

from gammac.diagnostics import CompileError
from gammac.ir import Attr, Builder, Dim, Operand, Sym, TensorType, TypeRuleError, WeightRef

Results = Operand | tuple[Operand, ...]

DTYPE_NAMES: Final = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


class Lowering:
    """The state of one walk over a graph.

    An operand may keep [batch, seq, n] where PyTorch has flattened it to [batch*seq, n]: `operand`
    gives it as it is, for ops that look at the last dimension only; `exact` restores PyTorch's shape.
    """

    def __init__(self, sizes: Mapping[str, Dim], constants: Mapping[str, Tensor]) -> None:
        self.builder = Builder()
        self.env: dict[Node, Results] = {}
        self.sizes = sizes
        self.constants = constants
        self.transposed_weights: dict[str, str] = {}
        self.loc = ""

    def emit(self, name: str, *operands: Operand, **attrs: Attr) -> Operand:
        """Append an op at the current place. Raises CompileError when its operands don't fit."""
        try:
            return self.builder.emit(name, *operands, loc=self.loc, **attrs)
        except TypeRuleError as error:
            raise CompileError(str(error), loc=self.loc, hint="a bug in gammac's front end") from error

    def operand(self, arg: Any) -> Operand:
        """The operand that an argument stands for, perhaps unflattened."""
        found = self.env[arg]
        assert not isinstance(found, tuple), f"{arg} is several tensors"
        return found

    def exact(self, arg: Any) -> Operand:
        """The operand in the shape that PyTorch gives it."""
        operand = self.operand(arg)
        shape = self.shape(arg)
        return operand if operand.type.shape == shape else self.emit("reshape", operand, shape=shape)

    def type(self, node: Node) -> TensorType:
        """The type that PyTorch gives to a node's result."""
        value = node.meta["val"]
        return TensorType(DTYPE_NAMES[value.dtype], self.dims(value.shape))

    def shape(self, node: Node) -> tuple[Dim, ...]:
        """The shape that PyTorch gives to a node's result."""
        return self.dims(node.meta["val"].shape)

    def dims(self, sizes: Sequence[Any]) -> tuple[Dim, ...]:
        """Sizes of torch.export as dimensions. Raises CompileError for what is no polynomial."""
        return tuple(self._dim(size.node.expr if isinstance(size, torch.SymInt) else size) for size in sizes)

    def _dim(self, size: Any) -> Dim:
        if isinstance(size, int | sympy.Integer):
            return int(size)
        if isinstance(size, sympy.Symbol) and size.name in self.sizes:
            return self.sizes[size.name]
        total: Dim = 0 if isinstance(size, sympy.Add) else 1
        if isinstance(size, sympy.Add | sympy.Mul):
            for arg in size.args:
                total = total + self._dim(arg) if isinstance(size, sympy.Add) else total * self._dim(arg)
            return total
        raise CompileError(
            f"the size {size} is no sum of products of batch and seq", loc=self.loc,
            hint="the model's shapes must follow from the input's",
        )  # fmt: skip

    def constant(self, operand: Operand) -> float | None:
        """The value of an operand that is a constant without dimensions."""
        if not isinstance(operand, WeightRef) or operand.name not in self.constants:
            return None
        value = self.constants[operand.name]
        return float(value.item()) if value.dim() == 0 else None

    def transposed(self, node: Node) -> Operand:
        """A matrix [in, out] as [out, in]; a parameter becomes a weight that is stored that way."""
        x = self.exact(node)
        if not isinstance(x, WeightRef) or x.name in self.constants:
            return self.emit("transpose", x, perm=(*range(x.type.rank - 2), x.type.rank - 1, x.type.rank - 2))
        # a parameter that others read as it is keeps its name for them
        name = x.name if len(node.users) == 1 else f"{x.name}.transposed"
        self.transposed_weights[name] = x.name
        return WeightRef(name, x.type.with_shape(*reversed(x.type.shape)))

    def unsupported(self, what: str) -> CompileError:
        """The error for a form of an op that the table doesn't cover."""
        return CompileError(f"{what} has no counterpart in the IR", loc=self.loc, hint=ADD_A_ROW)


Row = Callable[[Lowering, Node], Results]
"""What makes IR of one kind of FX node."""

ADD_A_ROW: Final = "add a row to the table in gammac/frontend/aten.py, or take this part out of the model"


def is_flattening(old: tuple[Dim, ...], new: tuple[Dim, ...]) -> bool:
    """Whether [batch, seq, …] becomes [batch*seq, …]."""
    return (
        len(old) >= 3 and isinstance(old[0] * old[1], Sym) and new == (old[0] * old[1], *old[2:])
    )  # fmt: skip


def register(rows: dict[str, Row], *names: str) -> Callable[[Row], Row]:
    """Put a function into a table under the names of the ops that it lowers."""

    def put(row: Row) -> Row:
        for name in names:
            assert name not in rows, f"{name} has two rows"
            rows[name] = row
        return row

    return put


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a node that may be given by place, by name, or not at all."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)
