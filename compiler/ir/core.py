"""Module, function, op, value, weight: immutable, and connected by object reference.

A pass never changes one of these; it builds new ones. Weights are named, typed and pinned by a
digest; the bytes live in the `WeightStore`. What a pass learns about a weight (its scores, its
format) is an attribute of the weight, because `forward`, `prefill` and `decode` share it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Union

from gammac.ir.types import Sym, TensorType

Attr = Union[bool, int, float, str, Sym, tuple["Attr", ...], Mapping[str, "Attr"]]  # noqa: UP007 (recursive)
Attrs = Mapping[str, Attr]


@dataclass(frozen=True, eq=False)
class Value:
    """A function parameter or one result of an op. Identity is what counts, never the name."""

    type: TensorType
    name: str = ""


@dataclass(frozen=True)
class WeightRef:
    """An operand that names a weight of the module."""

    name: str
    type: TensorType


Operand = Value | WeightRef


@dataclass(frozen=True, eq=False)
class Op:
    """One operation. `loc` is the path of the PyTorch module that it comes from."""

    name: str
    operands: tuple[Operand, ...]
    results: tuple[Value, ...]
    attrs: Attrs = field(default_factory=dict)
    loc: str = ""

    @property
    def result(self) -> Value:
        """The only result."""
        (value,) = self.results
        return value

    def weight(self, index: int = 1) -> WeightRef | None:
        """The operand at `index` if it is a weight."""
        operand = self.operands[index] if index < len(self.operands) else None
        return operand if isinstance(operand, WeightRef) else None


@dataclass(frozen=True, eq=False)
class Function:
    """A flat list of ops in an order that defines every value before its use."""

    name: str
    params: tuple[Value, ...]
    ops: tuple[Op, ...]
    returns: tuple[Operand, ...]
    return_names: tuple[str, ...]

    def producers(self) -> dict[Value, Op]:
        """Which op makes a value."""
        return {value: op for op in self.ops for value in op.results}

    def users(self) -> dict[Value, list[Op]]:
        """Which ops read a value, in order; a returned value may have none."""
        users: dict[Value, list[Op]] = {}
        for op in self.ops:
            for operand in op.operands:
                if isinstance(operand, Value):
                    users.setdefault(operand, []).append(op)
        return users


@dataclass(frozen=True)
class Weight:
    """A tensor of the module: its type, the digest of its bytes, and what passes learned of it."""

    name: str
    type: TensorType
    digest: str
    attrs: Attrs = field(default_factory=dict)

    def with_attrs(self, **attrs: Attr) -> "Weight":
        """The same weight with attributes added or replaced."""
        return replace(self, attrs={**self.attrs, **attrs})

    @property
    def ref(self) -> WeightRef:
        """The operand that names this weight."""
        return WeightRef(self.name, self.type)


@dataclass(frozen=True, eq=False)
class Module:
    """A whole program. `attrs` says what a backend or a runtime must know of the source model."""

    name: str
    functions: Mapping[str, Function]
    weights: Mapping[str, Weight]
    attrs: Attrs = field(default_factory=dict)

    def with_functions(self, *functions: Function) -> "Module":
        """Add or replace functions by name."""
        return replace(self, functions={**self.functions, **{f.name: f for f in functions}})

    def with_weights(self, *weights: Weight) -> "Module":
        """Add or replace weights by name."""
        return replace(self, weights={**self.weights, **{w.name: w for w in weights}})

    def with_attrs(self, **attrs: Attr) -> "Module":
        """Add or replace attributes of the module."""
        return replace(self, attrs={**self.attrs, **attrs})

    def without_unused_weights(self) -> "Module":
        """Drop weights that no function mentions."""
        used = {o.name for f in self.functions.values() for o in _mentions(f) if isinstance(o, WeightRef)}
        return replace(self, weights={n: w for n, w in self.weights.items() if n in used})


def _mentions(function: Function) -> Iterator[Operand]:
    for op in function.ops:
        yield from op.operands
    yield from function.returns
