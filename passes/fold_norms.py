"""Move the gains of norms into the linears that read them.

    %1 = rms_norm %0, @norm {eps = 1e-05}
    %2 = linear %1, @up
->  the same ops; @norm holds ones, and each column of @up what it held times its gain

A norm without a gain commutes with every rotation of what it reads. A gain stays where a weight
behind it is read elsewhere too, as a head that is tied to the embedding is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from gammac.ir import Function, Module, Op, Weight, WeightRef
from gammac.pipeline import Context, Invariant


@dataclass(frozen=True)
class FoldNorms:
    """See the module's text."""

    name: ClassVar[str] = "fold_norms"
    reads: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()

    def run(self, module: Module, ctx: Context) -> Module:
        """The module with other weights; its functions stay."""
        mentions = mentions_of(module)
        changed: dict[str, Weight] = {}
        for norm, linears in foldable(module, mentions):
            ref = norm.weight()
            assert ref is not None
            weight = module.weights[ref.name]
            gain = ctx.store.tensor(weight.digest)
            for linear in linears:
                behind = module.weights[linear.name]
                columns = ctx.store.tensor(behind.digest).double() * gain.double()
                changed[behind.name] = _with_bytes(behind, columns, ctx)
            changed[weight.name] = _with_bytes(weight, torch.ones_like(gain), ctx)
        return module.with_weights(*changed.values())


def _with_bytes(weight: Weight, tensor: torch.Tensor, ctx: Context) -> Weight:
    return Weight(weight.name, weight.type, ctx.store.put({"data": tensor.float()}), weight.attrs)


def mentions_of(module: Module) -> dict[str, list[tuple[Function, Op]]]:
    """Where each weight is read."""
    found: dict[str, list[tuple[Function, Op]]] = {name: [] for name in module.weights}
    for function in module.functions.values():
        for op in function.ops:
            for operand in op.operands:
                if isinstance(operand, WeightRef):
                    found[operand.name].append((function, op))
    return found


def foldable(
    module: Module, mentions: dict[str, list[tuple[Function, Op]]]
) -> Iterator[tuple[Op, list[WeightRef]]]:
    """Norms whose gain may go, and the weights that take it on: read by nothing but linears of its own."""
    for function in module.functions.values():
        users = function.users()
        for op in function.ops:
            gain = op.weight()
            if op.name != "rms_norm" or gain is None or len(mentions[gain.name]) > 1:
                continue
            readers = users.get(op.result, [])
            refs = [r.weight() for r in readers if r.name == "linear" and r.operands[0] is op.result]
            weights = [ref for ref in refs if ref is not None and len(mentions[ref.name]) == 1]
            if weights and len(weights) == len(readers) and op.result not in function.returns:
                yield op, weights
