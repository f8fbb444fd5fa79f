"""One matrix product for linears that read the same value.

    %1 = linear %0, @q : f32[batch,seq,64]            stored = "w4g64" for both
    %2 = linear %0, @k : f32[batch,seq,32]
->
    %1 = linear %0, @q-k : f32[batch,seq,96]
    %2 = slice %1 {dim = 2, start = 0, end = 64} : f32[batch,seq,64]
    %3 = slice %1 {dim = 2, start = 64, end = 96} : f32[batch,seq,32]

Only weights that are stored alike are joined, row below row, so that no number changes. What a fused
weight is made of stands in its `parts`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar, Final

import torch

from gammac.formats import concat_rows, load_float, load_quantized, stored_format
from gammac.ir import Builder, Function, Module, Op, Operand, Value, Weight, WeightRef, rewrite
from gammac.passes.add_adapters import keys_of
from gammac.pipeline import Context, Invariant
from gammac.weights import WeightStore

# what a fused weight has from the first of its parts
KEPT: Final = ("stored", "role", "format", "quantizer", "serves", "adapter", "trained_as")


@dataclass(frozen=True)
class FuseParallelLinears:
    """Join q, k and v, and gate and up, where their weights are stored alike. Without `gates`, linears that
    meet in one product of elements stay apart, for a backend that has one kernel for the three; without
    `partly`, linears are joined with all that read the same value or not at all, but for adapters' first
    factors: a product that has an adapter reads its part of them."""

    name: ClassVar[str] = "fuse_parallel_linears"
    reads: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()
    gates: bool = True
    partly: bool = True

    def run(self, module: Module, ctx: Context) -> Module:
        """The module with parallel linears joined and their weights replaced."""
        made: dict[str, Weight] = {}
        functions = [self._fuse(f, module, ctx.store, made) for f in module.functions.values()]
        return module.with_weights(*made.values()).with_functions(*functions).without_unused_weights()

    def _fuse(
        self, function: Function, module: Module, store: WeightStore, made: dict[str, Weight]
    ) -> Function:
        apart = set() if self.gates else gates(function)
        groups = _parallel(function, module, apart)
        if not self.partly:
            groups = [
                g for g in groups if _adapting(module, g[0]) or len(g) == len(_readers(function, g[0], apart))
            ]
        return _joining(function, groups, module, store, made)


def gates(function: Function) -> set[Op]:
    """Linears whose results, or what one op makes of them, are multiplied with each other."""
    made_by, users = function.producers(), function.users()

    def linear_behind(operand: Operand) -> Op | None:
        for _ in range(2):
            op = made_by.get(operand) if isinstance(operand, Value) else None
            if op is None or len(users[op.results[0]]) != 1 or op.name == "linear":
                return op if op is not None and op.name == "linear" else None
            operand = op.operands[0]
        return None

    found: set[Op] = set()
    for op in function.ops:
        if op.name == "mul":
            pair = [linear_behind(operand) for operand in op.operands]
            found.update(one for one in pair if one is not None and None not in pair)
    return found


def _readers(function: Function, linear: Op, apart: set[Op]) -> list[Op]:
    """The linears that read what one reads."""
    x = linear.operands[0]
    return [op for op in function.ops if op.name == "linear" and op not in apart and op.operands[0] is x]


def _adapting(module: Module, linear: Op) -> bool:
    ref = linear.weight()
    return ref is not None and bool(keys_of(module.weights[ref.name]))


def _joining(
    function: Function,
    groups: list[list[Op]],
    module: Module,
    store: WeightStore,
    made: dict[str, Weight],
) -> Function:
    first = {group[0]: group for group in groups}
    replaced: dict[Op, Value] = {}

    def rule(b: Builder, op: Op, operands: tuple[Operand, ...]) -> Sequence[Operand] | None:
        if op in first:
            replaced.update(_emit_fused(b, first[op], operands[0], module, store, made))
        return (replaced[op],) if op in replaced else None

    return rewrite(function, rule)


def _parallel(function: Function, module: Module, apart: set[Op]) -> list[list[Op]]:
    """Linears that can be joined, two or more a group, each group in order."""
    mentions = Counter(o.name for op in function.ops for o in op.operands if isinstance(o, WeightRef))
    groups: dict[object, list[Op]] = {}
    for op in function.ops:
        ref = op.weight()
        if op.name != "linear" or op in apart or ref is None or mentions[ref.name] != 1:
            continue
        if len(op.operands) == 3 and op.weight(2) is None:
            continue
        weight = module.weights[ref.name]
        format_ = stored_format(weight)
        if format_ is not None and not format_.by_rows:
            continue
        alike = (weight.attrs.get(attr) for attr in ("stored", "role"))
        key = (op.operands[0], len(op.operands), "adapter" in weight.attrs, *alike)
        groups.setdefault(key, []).append(op)
    return [group for group in groups.values() if len(group) > 1]


def _emit_fused(
    b: Builder, group: list[Op], x: Operand, module: Module, store: WeightStore, made: dict[str, Weight]
) -> dict[Op, Value]:
    joined = [
        _joined([module.weights[ref.name] for op in group if (ref := op.weight(index))], store, made)
        for index in range(1, len(group[0].operands))
    ]
    loc = _joined_name([op.loc for op in group])
    whole = b.emit("linear", x, *(w.ref for w in joined), loc=loc)
    start, dim, parts = 0, whole.type.rank - 1, {}
    for op in group:
        width = op.result.type.shape[-1]
        assert isinstance(width, int)
        parts[op] = b.emit("slice", whole, loc=op.loc, dim=dim, start=start, end=start + width)
        start += width
    return parts


def _joined(weights: list[Weight], store: WeightStore, made: dict[str, Weight]) -> Weight:
    """Weights row below row, as a new weight; made once for all functions."""
    name = _joined_name([w.name for w in weights])
    if name not in made:
        if stored_format(weights[0]) is None:
            arrays = {"data": torch.cat([load_float(w, store) for w in weights])}
        else:
            arrays = dict(concat_rows([load_quantized(w, store) for w in weights]).parts)
        sizes = [w.type.shape[0] for w in weights]
        rows = sum(size for size in sizes if isinstance(size, int))
        type_ = weights[0].type.with_shape(rows, *weights[0].type.shape[1:])
        attrs = {k: v for k, v in weights[0].attrs.items() if k in KEPT}
        if "adapter" in attrs:
            attrs["adapter"] = tuple(key for w in weights for key in keys_of(w))
        parts = tuple(w.name for w in weights)
        made[name] = Weight(name, type_, store.put(arrays), {**attrs, "parts": parts})
    return made[name]


def _joined_name(names: list[str]) -> str:
    """`a.q.weight` and `a.k.weight` to `a.q-k.weight`."""
    columns = zip_longest(*(name.split(".") for name in names), fillvalue="")
    return ".".join(parts[0] if len(set(parts)) == 1 else "-".join(parts) for parts in columns)
