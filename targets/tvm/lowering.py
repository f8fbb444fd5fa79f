"""What lowering an op may look at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gammac.formats import load_float
from gammac.ir import Module, Op, Operand, Value, WeightRef
from gammac.targets.tvm.device import Device
from gammac.targets.tvm.nodes import Node, Tensor
from gammac.targets.tvm.program import FunctionWriter
from gammac.weights import WeightStore


def function_of(op: Op) -> str:
    """The name of an elementwise op in the kernels' table."""
    return "gelu_tanh" if op.attrs.get("approximate") == "tanh" else op.name


@dataclass
class Lowering:
    """What lowering an op may look at: the module, the function under construction, values so far."""

    module: Module
    store: WeightStore
    f: FunctionWriter
    capacity: int
    users: Mapping[Value, int]
    producers: Mapping[Value, Op]
    values: dict[Value, Node] = field(default_factory=dict)

    @property
    def device(self) -> Device:
        """Whose kernels the function calls."""
        return self.f.program.device

    def node(self, operand: Operand) -> Node:
        """What stands for an operand that is no weight."""
        assert isinstance(operand, Value), f"a weight can't stand here: {operand}"
        return self.values[operand]

    def tensor(self, operand: Operand) -> Tensor:
        """An operand, computed."""
        return self.f.tensor(self.node(operand))

    def alone(self, operand: Operand) -> bool:
        """Whether one op alone reads an operand."""
        return isinstance(operand, Value) and self.users.get(operand, 0) == 1

    def floats(self, operand: Operand) -> Any:
        """A float weight as a parameter, as it is shaped in the module."""
        assert isinstance(operand, WeightRef)
        weight = self.module.weights[operand.name]
        return self.f.param(operand.name, lambda: load_float(weight, self.store).numpy())
