"""Budgets as limits of the integer program: whole bits, bytes, nanoseconds, picojoules or shares of a loss.

A kind of budget says what a weight takes in a format, what the module takes in any case, and in which unit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from gammac.budget import ENERGY, LATENCY, LOSS, MEMORY, PAYLOAD, PREFILL, SIZE, TRUE, Budget
from gammac.diagnostics import CompileError
from gammac.ir import Function, Module, Op, Weight
from gammac.targets import cost, energy
from gammac.targets.cost import CONTEXT, Sizes, WeightCost
from gammac.targets.target import BLOCK, Target

NANOSECONDS: Final = 10**9
PICOJOULES: Final = 10**12
# a predicted loss is counted in such parts of what is granted, rounded up
LOSS_PARTS: Final = 10**7


@dataclass(frozen=True)
class Limit:
    """A budget in whole units, and what the module takes of it in any case."""

    budget: Budget
    total: int
    fixed: int
    per: Fraction  # one unit of the budget's value, in those whole ones

    @property
    def capacity(self) -> int:
        """What is left to choose with."""
        return self.total - self.fixed

    @property
    def tokens(self) -> int:
        """For which it is counted."""
        return self.budget.tokens or CONTEXT


@dataclass(frozen=True)
class Candidate:
    """A weight in a format, and what its cost depends on. `readers` are the ops of a decoding step."""

    weight: Weight
    readers: Sequence[Op]
    module: Module
    target: Target
    row: WeightCost
    score: float

    @property
    def block(self) -> bool:
        """Whether it counts for bits a weight."""
        return self.row.role == BLOCK

    @property
    def formats(self) -> Mapping[str, str]:
        """The format, as the cost model asks for it."""
        return {self.weight.name: self.row.format}


def weights_with_roles(module: Module) -> dict[str, Weight]:
    """The weights that get a format."""
    return {name: w for name, w in module.weights.items() if "role" in w.attrs}


# ---- what each kind of budget counts ------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """Whole units in one of the budget's; what the module takes in any case; what a candidate takes."""

    per: Callable[[Budget, Module], Fraction]
    fixed: Callable[[Budget, Module, Target], int]
    cost: Callable[[Limit, Candidate], int]


def _each(per: int) -> Callable[[Budget, Module], Fraction]:
    return lambda budget, module: Fraction(per)


def _block_weights(budget: Budget, module: Module) -> Fraction:
    blocks = (w for w in weights_with_roles(module).values() if w.attrs["role"] == BLOCK)
    return Fraction(sum(w.type.numel() for w in blocks))


def _nothing(budget: Budget, module: Module, target: Target) -> int:
    return 0


def _floats(module: Module) -> list[Weight]:
    return [w for w in module.weights.values() if "role" not in w.attrs]


def _float_bytes(budget: Budget, module: Module, target: Target) -> int:
    return sum(cost.weight_cost(w, (), module, target).bytes for w in _floats(module))


def _float_memory(budget: Budget, module: Module, target: Target) -> int:
    held = sum(cost.resident_bytes(w, target) for w in _floats(module))
    return held + cost.alive_bytes(module, target, budget.tokens or CONTEXT) + target.runtime_bytes


def _other_ops(module: Module, chosen: tuple[Function, Sizes] | None) -> tuple[list[Op], Sizes]:
    """What is no linear that gets a format."""
    function, sizes = chosen or (None, {})
    weights = weights_with_roles(module)
    refs = ((op, op.weight()) for op in (function.ops if function else ()))
    return [op for op, ref in refs if op.name != "linear" or ref is None or ref.name not in weights], sizes


def _other_seconds(module: Module, target: Target, chosen: tuple[Function, Sizes] | None) -> int:
    ops, sizes = _other_ops(module, chosen)
    return _up(sum(cost.op_seconds(op, module, target, sizes) for op in ops), NANOSECONDS)


def _other_decoding(budget: Budget, module: Module, target: Target) -> int:
    return _other_seconds(module, target, cost.decode_function(module, budget.tokens or CONTEXT))


def _other_prefill(budget: Budget, module: Module, target: Target) -> int:
    return _other_seconds(module, target, cost.prefill_function(module, budget.tokens or CONTEXT))


def _other_joules(budget: Budget, module: Module, target: Target) -> int:
    ops, sizes = _other_ops(module, cost.decode_function(module, budget.tokens or CONTEXT))
    return _up(sum(energy.op_joules(op, module, target, sizes) for op in ops), PICOJOULES)


def _prefill(limit: Limit, of: Candidate) -> int:
    return _up(cost.prefill_seconds(of.weight, of.module, of.target, of.formats, limit.tokens), NANOSECONDS)


def _joules(limit: Limit, of: Candidate) -> int:
    sizes = cost.sizes_of(1, limit.tokens)
    linears = [op for op in of.readers if op.name == "linear"]
    return _up(
        sum(energy.op_joules(op, of.module, of.target, sizes, of.formats) for op in linears), PICOJOULES
    )


def _up(amount: float, per: int) -> int:
    # rounded up, so that a sum never promises less than its parts
    return math.ceil(amount * per)


MEASURES: Final[Mapping[str, Measure]] = {
    PAYLOAD: Measure(_block_weights, _nothing, lambda limit, of: of.row.payload_bits * of.block),
    TRUE: Measure(
        _block_weights,
        lambda budget, module, target: cost.serving_bits(module),
        lambda limit, of: of.row.storage_bits * of.block,
    ),
    SIZE: Measure(_each(1), _float_bytes, lambda limit, of: of.row.bytes),
    MEMORY: Measure(
        _each(1), _float_memory, lambda limit, of: cost.resident_bytes(of.weight, of.target, of.formats)
    ),
    LATENCY: Measure(
        _each(NANOSECONDS), _other_decoding, lambda limit, of: _up(of.row.decode_seconds, NANOSECONDS)
    ),
    PREFILL: Measure(_each(NANOSECONDS), _other_prefill, _prefill),
    ENERGY: Measure(_each(PICOJOULES), _other_joules, _joules),
    LOSS: Measure(
        lambda budget, module: LOSS_PARTS / budget.exact,
        _nothing,
        lambda limit, of: math.ceil(Fraction(of.score) * limit.per),
    ),
}


def limit_of(budget: Budget, module: Module, target: Target, extra_bytes: int = 0) -> Limit:
    """A budget in whole numbers; `extra_bytes` are those of the artifact's graph and tokenizer.

    Raises CompileError for a budget that the target can't predict.
    """
    if budget.kind == ENERGY and not target.energy:
        raise CompileError(
            f"budget {budget}: the target {target.name} has no energy data",
            hint="give a budget in bits, bytes or ms/token, or a target file with [energy]",
        )
    measure = MEASURES[budget.kind]
    per = measure.per(budget, module)
    fixed = measure.fixed(budget, module, target) + (extra_bytes if budget.kind == SIZE else 0)
    return Limit(budget, math.floor(budget.exact * per), fixed, per)


def cost_in(limit: Limit, of: Candidate) -> int:
    """What a weight in a format takes of a limit, in whole units."""
    return MEASURES[limit.budget.kind].cost(limit, of)
