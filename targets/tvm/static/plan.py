"""A Relax function of the emitter as a list of kernel calls, each tensor at its place in memory.

What a call writes lies in an arena: places are planned by who reads them last, for the most rows that a call
may have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np

from gammac.targets.tvm.description import Description
from gammac.targets.tvm.nodes import FLOAT
from gammac.targets.tvm.params import ALIGNMENT

PARAMS, CACHES, ARENA = "params", "caches", "arena"
PLACES: Final = (PARAMS, CACHES, ARENA)


@dataclass(frozen=True)
class Placed:
    """A tensor: `offset` bytes behind the start of one of PLACES. A first size of 0 is the call's rows."""

    place: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """A kernel and its tensors, those that it writes among them."""

    kernel: str
    tensors: tuple[Placed, ...]


@dataclass(frozen=True)
class Plan:
    """A function: it reads `ids` and `past`, and leaves its result in `logits`. `arena` is in bytes."""

    steps: tuple[Step, ...]
    ids: Placed
    past: Placed
    logits: Placed
    arena: int


def cache_places(description: Description) -> list[Placed]:
    """The caches, one behind the other."""
    places, end = [], 0
    for shape in description.caches:
        places.append(Placed(CACHES, end, FLOAT, shape))
        end += padded(4 * prod(shape))
    return places


def padded(size: int) -> int:
    """Bytes up to where the next tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan(function: Any, description: Description, rows: int) -> Plan:
    """The calls of a Relax function as `program.py` writes it, which has at most `rows` rows."""
    ids, past = (_made(param.ty) for param in function.params[:2])
    reader = _Reader({"ids": ids, "past": past}, description)
    calls = [call for binding in _bindings(function) for call in reader.read(binding)]
    logits = reader.values[_name(function.body.body)]
    return _placed(calls, ids, past, logits, rows)


# ---- what a function calls ----------------------------------------------------------------------


class _Made:
    """A tensor of the arena that has no place yet."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype

    def size(self, rows: int) -> int:
        """Bytes."""
        return prod(size or rows for size in self.shape) * np.dtype(self.dtype).itemsize


_Value = Any  # a _Made, a Placed, or a list of them

_Call = tuple[str, list["_Made | Placed"]]


def _bindings(function: Any) -> Iterator[Any]:
    for block in function.body.blocks:
        yield from block.bindings


def _name(var: Any) -> str:
    """Names are unique within a function."""
    return str(var.name)


class _Reader:
    """Goes through the bindings of a function and knows the value of each variable."""

    def __init__(self, inputs: dict[str, _Value], description: Description) -> None:
        self.values = inputs
        caches = cache_places(description)
        self._items = {
            "caches": caches,
            "params": [Placed(PARAMS, e.offset, e.dtype, e.shape) for e in description.params],
        }

    def read(self, binding: Any) -> Iterator[_Call]:
        """The call that a binding makes, if it makes one."""
        name, value = _name(binding.var), binding.value
        kind = type(value).__name__
        if kind == "TupleGetItem":
            self.values[name] = self.values[_name(value.tuple_value)][int(value.index)]
        elif kind != "Call":
            self.values[name] = self.values[_name(value)]
        elif value.op.name in ("relax.call_tir", "relax.call_tir_inplace"):
            yield self._kernel(name, value)
        else:
            self.values[name] = self._item(value)

    def _item(self, call: Any) -> Placed:
        callee, of, index = call.args
        assert str(callee.global_symbol) == "vm.builtin.tuple_getitem", f"no kernel: {call}"
        return self._items[_name(of)][int(index.value)]

    def _kernel(self, name: str, call: Any) -> _Call:
        kernel, operands = call.args[0], [self.values[_name(var)] for var in call.args[1].fields]
        (out,) = call.ty_args
        types = list(out.fields) if hasattr(out, "fields") else [out]
        where = [-1] * len(types)
        if call.op.name == "relax.call_tir_inplace":
            where = [int(i) for i in call.attrs.inplace_indices]
        made = [operands[i] if i >= 0 else _made(type_) for i, type_ in zip(where, types, strict=True)]
        self.values[name] = made if len(made) > 1 else made[0]
        return str(kernel.name_hint), [*operands, *(m for m, i in zip(made, where, strict=True) if i < 0)]


def _made(type_: Any) -> _Made:
    sizes = tuple(int(size) if hasattr(size, "value") else 0 for size in type_.shape.values)
    return _Made(sizes, str(type_.dtype))


# ---- where its tensors lie ----------------------------------------------------------------------


def _placed(calls: Sequence[_Call], ids: _Made, past: _Made, logits: _Made, rows: int) -> Plan:
    last = {id(t): step for step, (_, tensors) in enumerate(calls) for t in tensors}
    # what goes in and out is never overwritten
    last.update({id(t): len(calls) for t in (ids, past, logits)})
    arena, places = _Arena(), dict[int, Placed]()

    def place(tensor: _Made | Placed) -> Placed:
        if isinstance(tensor, Placed):
            return tensor
        if id(tensor) not in places:
            offset = arena.take(tensor.size(rows), last[id(tensor)])
            places[id(tensor)] = Placed(ARENA, offset, tensor.dtype, tensor.shape)
        return places[id(tensor)]

    ends, steps = (place(ids), place(past)), []
    for i, (kernel, tensors) in enumerate(calls):
        steps.append(Step(kernel, tuple(map(place, tensors))))
        arena.release(i)
    return Plan(tuple(steps), *ends, place(logits), arena.size)


class _Arena:
    """Bytes that tensors share which are not alive at the same time."""

    def __init__(self) -> None:
        self.size = 0
        self._taken: list[tuple[int, int, int]] = []  # start, end, the last step that reads it

    def take(self, size: int, until: int) -> int:
        """The lowest place that is free."""
        start = 0
        for begin, end, _ in sorted(self._taken):
            if start + size <= begin:
                break
            start = max(start, end)
        self._taken.append((start, start + padded(size), until))
        self.size = max(self.size, start + padded(size))
        return start

    def release(self, step: int) -> None:
        """Give back what no later step reads."""
        self._taken = [t for t in self._taken if t[2] > step]
