"""Cut each block weight into parts by rows, so that the allocator can mix widths within one linear.

    weight @up : f32[512,192] = sha256:aa {role = "block"}
    %1 = linear %0, @up : f32[batch,seq,512]
->
    weight @up.part0 : f32[256,192] = sha256:bb {role = "block", part = 0}
    weight @up.part1 : f32[256,192] = sha256:cc {role = "block", part = 1}
    %1 = linear %0, @up.part0 : f32[batch,seq,256]
    %2 = linear %0, @up.part1 : f32[batch,seq,256]
    %3 = concat %1, %2 {dim = 2} : f32[batch,seq,512]

A mean of 3 bits is then within reach of 2 and 4 bits, for runtimes that have nothing in between.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gammac.diagnostics import CompileError
from gammac.ir import Builder, Function, Module, Op, Operand, Weight, WeightRef, rewrite
from gammac.pipeline import Context, Invariant
from gammac.weights import WeightStore


@dataclass(frozen=True)
class SplitRows:
    """`parts`: how many parts a weight is cut into; a weight with fewer rows stays whole."""

    name: ClassVar[str] = "split_rows"
    reads: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()
    parts: int = 2

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError for weights that are already quantized, and for fewer than two parts."""
        if self.parts < 2:
            raise CompileError(f"parts={self.parts}", hint="parts is 2 or more")
        found = {name: w for name, w in module.weights.items() if self._is_cut(w, module)}
        parts = {name: _cut(w, self.parts, ctx.store) for name, w in found.items()}
        for name in _biases(module, found):
            parts[name] = _cut(module.weights[name], self.parts, ctx.store)
        functions = [_split(f, parts) for f in module.functions.values()]
        made = [part for cut in parts.values() for part in cut]
        return module.with_weights(*made).with_functions(*functions).without_unused_weights()

    def _is_cut(self, weight: Weight, module: Module) -> bool:
        if weight.attrs.get("role") != "block":
            return False
        if "stored" in weight.attrs:
            raise CompileError("is quantized already", loc=weight.name, hint="run split_rows before quantize")
        rows = weight.type.shape[0]
        return isinstance(rows, int) and rows >= self.parts and _only_in_linears(weight, module)


def _only_in_linears(weight: Weight, module: Module) -> bool:
    return all(
        op.name == "linear" and op.operands[1] == weight.ref and weight.ref not in op.operands[2:]
        for function in module.functions.values()
        for op in function.ops
        if weight.ref in op.operands
    )


def _biases(module: Module, weights: dict[str, Weight]) -> list[str]:
    """Biases that nothing but linears of `weights` read."""
    uses, found = Counter[str](), Counter[str]()
    for function in module.functions.values():
        for op in function.ops:
            uses.update(o.name for o in op.operands if isinstance(o, WeightRef))
            weight, bias = op.weight(1), op.weight(2)
            if op.name == "linear" and weight and bias and weight.name in weights:
                found[bias.name] += 1
    return [name for name, count in found.items() if uses[name] == count]


def _cut(weight: Weight, count: int, store: WeightStore) -> list[Weight]:
    """The weight's rows in `count` parts that differ by one row at most."""
    parts = []
    for index, rows in enumerate(store.tensor(weight.digest).tensor_split(count)):
        type_ = weight.type.with_shape(*rows.shape)
        attrs = {k: v for k, v in weight.attrs.items() if k in ("role", "clip")} | {"part": index}
        name = f"{weight.name}.part{index}"
        parts.append(Weight(name, type_, store.put({"data": rows.clone()}), attrs))
    return parts


def _split(function: Function, parts: dict[str, list[Weight]]) -> Function:
    def rule(b: Builder, op: Op, operands: tuple[Operand, ...]) -> Sequence[Operand] | None:
        weight, bias = op.weight(1), op.weight(2)
        if op.name != "linear" or weight is None or weight.name not in parts:
            return None
        shares = [(part.ref,) for part in parts[bias.name]] if bias and bias.name in parts else None
        made = [
            b.emit("linear", operands[0], part.ref, *(shares[index] if shares else ()), loc=op.loc)
            for index, part in enumerate(parts[weight.name])
        ]
        whole = b.emit("concat", *made, loc=op.loc, dim=made[0].type.rank - 1)
        if len(operands) == 3 and shares is None:
            whole = b.emit("add", whole, operands[2], loc=op.loc)
        return (whole,)

    return rewrite(function, rule)
