"""Compute once what no input can change.

    %1 = shift @norm.weight {by = 1.0} : f32[64]
    %2 = rms_norm %0, %1 {eps = 1e-06} : f32[batch,seq,64]
->
    %1 = rms_norm %0, @norm.weight-shift {eps = 1e-06} : f32[batch,seq,64]

Ops whose operands are all weights become weights: Gemma's 1 + weight, transposes, tensors of one value.
A position table that is read from an offset on (OPT's 2) loses the rows below, and the offset goes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from gammac.ir import Builder, Function, Module, Op, Operand, Sym, Value, Weight, WeightRef, rewrite
from gammac.ir.interpret import run_op
from gammac.pipeline import Context, Invariant
from gammac.weights import WeightStore


@dataclass(frozen=True)
class FoldConstants:
    """Replace ops on weights by weights."""

    name: ClassVar[str] = "fold_constants"
    reads: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()

    def run(self, module: Module, ctx: Context) -> Module:
        """The module without ops that read only weights; new weights stand in the store."""
        folding = _Folding(module, ctx.store)
        functions = [folding.function(f) for f in module.functions.values()]
        return module.with_weights(*folding.made.values()).with_functions(*functions).without_unused_weights()


@dataclass
class _Folding:
    module: Module
    store: WeightStore
    made: dict[str, Weight] = field(default_factory=dict)

    def function(self, function: Function) -> Function:
        """The function with everything folded."""
        producers: dict[Value, Op] = {}

        def rule(b: Builder, op: Op, operands: tuple[Operand, ...]) -> Sequence[Operand] | None:
            if _is_constant(op, operands):
                return (self.fold(op, operands),)
            if op.name == "embedding":
                operands = self.without_offset(producers, *operands)
            new = b.emit_all(op.name, *operands, loc=op.loc, **op.attrs)
            producers.update(dict.fromkeys(new, b.ops[-1]))
            return new

        return rewrite(function, rule)

    def fold(self, op: Op, operands: tuple[Operand, ...]) -> WeightRef:
        """A weight with the op's result. One that was made before, with the same bytes, is reused."""
        sources = [self.weight(o.name) for o in operands if isinstance(o, WeightRef)]
        tensors = [self.store.tensor(w.digest) for w in sources]
        (result,) = run_op(op, tensors, {})
        digest = self.store.put({"data": result})
        name = f"{sources[0].name if sources else op.loc}-{op.name}"
        while self.is_taken(name, digest):
            name += "-2"
        attrs = sources[0].attrs if len(sources) == 1 else {}
        self.made[name] = Weight(name, op.result.type, digest, attrs)
        return self.made[name].ref

    def is_taken(self, name: str, digest: str) -> bool:
        """Whether a weight of that name has other bytes."""
        made = self.made.get(name)
        return name in self.module.weights or (made is not None and made.digest != digest)

    def weight(self, name: str) -> Weight:
        """A weight of the module, or one that was made here."""
        return self.made.get(name) or self.module.weights[name]

    def without_offset(self, producers: dict[Value, Op], ids: Operand, table: Operand) -> tuple[Operand, ...]:
        """The ids before an offset was added to them, and the table from that row on."""
        op = producers.get(ids) if isinstance(ids, Value) else None
        by = op.attrs.get("by") if op and op.name == "shift" else None
        if op is None or not isinstance(by, float) or by < 0 or not isinstance(table, WeightRef):
            return ids, table
        rows, _ = table.type.shape
        assert isinstance(rows, int)
        cut = Builder()
        cut.emit("slice", table, loc=table.name, dim=0, start=int(by), end=rows)
        return op.operands[0], self.fold(cut.ops[0], (table,))


def _is_constant(op: Op, operands: tuple[Operand, ...]) -> bool:
    has_fixed_size = not any(isinstance(d, Sym) for v in op.results for d in v.type.shape)
    return len(op.results) == 1 and has_fixed_size and all(isinstance(o, WeightRef) for o in operands)
