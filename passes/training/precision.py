"""Which layer gets which width: DSA-QAT, "Adaptive Bit-Width Allocation" and "Dynamic Precision Controller".

b_l = argmin_b (S_l · ε_b + λ · C_b). For one λ that is a choice for each layer alone; a budget is met by
bisection on λ, because no layer ever gets more when λ grows. The exact integer program is the alternative.
The paper's controller "updates precision continuously" without a rule; ours looks every so many steps, moves
a layer by one width at most, only where that gains 5 %, and stops for the last fifth of the training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gammac.diagnostics import CompileError
from gammac.passes.allocation_problem import Choice
from gammac.passes.allocation_search import Infeasible, choose

BISECTIONS: Final = 60
GAIN: Final = 0.05  # of a layer's objective: less is not worth another width
RISE: Final = 0.01  # of the smoothed loss
LAMBDA_STEP: Final = 1.1


@dataclass(frozen=True)
class Level:
    """A format that a layer may get: `error` is S_l · ε, `cost` its share of C, `bits` its payload bits."""

    format: str
    error: float
    cost: float
    bits: int

    def objective(self, trade_off: float) -> float:
        """S_l · ε_b + λ · C_b."""
        return self.error + trade_off * self.cost


# for each layer its levels, narrow ones first; layers that are decided together are one
Layers = Sequence[Sequence[Level]]
Picks = tuple[int, ...]


def best_level(levels: Sequence[Level], trade_off: float) -> int:
    """The index of argmin_b (S_l · ε_b + λ · C_b); of equals the narrower one."""
    return min(range(len(levels)), key=lambda i: (levels[i].objective(trade_off), levels[i].bits))


def by_trade_off(layers: Layers, trade_off: float) -> Picks:
    """Each layer's best level at one λ."""
    return tuple(best_level(levels, trade_off) for levels in layers)


def total_bits(layers: Layers, picks: Picks) -> int:
    """Payload bits of a choice."""
    return sum(levels[pick].bits for levels, pick in zip(layers, picks, strict=True))


def by_bisection(layers: Layers, capacity: int) -> tuple[Picks, float]:
    """The choice at the least λ that keeps `capacity` payload bits, and that λ.

    Where costs are proportional to bits, bits never grow with λ. With another cost λ alone may not reach the
    budget: what is too much is taken back by `within`. What λ leaves over, since layers are large, goes to
    `filled`. Raises CompileError for a budget that can't be met.
    """
    _demand_room(layers, capacity)
    if total_bits(layers, by_trade_off(layers, 0.0)) <= capacity:
        return by_trade_off(layers, 0.0), 0.0
    low, high = 0.0, _largest_trade_off(layers)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        over = total_bits(layers, by_trade_off(layers, middle)) > capacity
        low, high = (middle, high) if over else (low, middle)
    return filled(layers, within(layers, by_trade_off(layers, high), capacity), capacity), high


def by_program(layers: Layers, capacity: int, trade_off: float = 0.0) -> Picks:
    """The exact optimum of Σ S_l · ε_b + λ · C_b within `capacity` payload bits.

    Raises CompileError for a budget that can't be met.
    """
    _demand_room(layers, capacity)
    groups = [tuple(Choice(x.format, x.objective(trade_off), (x.bits,)) for x in levels) for levels in layers]
    try:
        return choose(groups, (capacity,))
    except Infeasible as error:
        raise AssertionError(str(error)) from error


def _demand_room(layers: Layers, capacity: int) -> None:
    least = sum(min(level.bits for level in levels) for levels in layers)
    if least > capacity:
        raise CompileError(
            f"{capacity} payload bits are too few: the narrowest formats take {least}",
            hint="raise --average-bits, or allow narrower --formats",
        )


def _largest_trade_off(layers: Layers) -> float:
    """Above it cost alone decides."""
    spans = [max(x.error for x in levels) - min(x.error for x in levels) for levels in layers]
    steps = [
        abs(a.cost - b.cost) for levels in layers for a in levels for b in levels if a.cost != b.cost
    ]  # fmt: skip
    return 2 * max(spans, default=0.0) / min(steps, default=1.0) + 1.0


def within(layers: Layers, picks: Picks, capacity: int) -> Picks:
    """The picks, layers narrowed where that adds the least error a bit saved, until they keep `capacity`."""
    found = list(picks)
    while total_bits(layers, tuple(found)) > capacity:
        offers = [
            (_price(levels, found[i]), i) for i, levels in enumerate(layers) if found[i] > 0
        ]  # fmt: skip
        found[min(offers)[1]] -= 1
    return tuple(found)


def filled(layers: Layers, picks: Picks, capacity: int) -> Picks:
    """The picks, layers widened where that removes the most error a bit, as long as there is room."""
    found, room = list(picks), capacity - total_bits(layers, picks)
    while True:
        offers = [
            (_price(levels, found[i] + 1), -i)
            for i, levels in enumerate(layers)
            if found[i] + 1 < len(levels) and levels[found[i] + 1].bits - levels[found[i]].bits <= room
        ]
        if not offers or max(offers)[0] <= 0:
            return tuple(found)
        index = -max(offers)[1]
        room -= layers[index][found[index] + 1].bits - layers[index][found[index]].bits
        found[index] += 1


def _price(levels: Sequence[Level], pick: int) -> float:
    here, below = levels[pick], levels[pick - 1]
    return (below.error - here.error) / max(1, here.bits - below.bits)


def steadied(layers: Layers, now: Picks, wanted: Picks, trade_off: float) -> Picks:
    """One step from `now` towards `wanted`: a level at most, and only where the objective falls by GAIN."""
    found = []
    for levels, here, there in zip(layers, now, wanted, strict=True):
        next_ = here + (there > here) - (there < here)
        before, after = levels[here].objective(trade_off), levels[next_].objective(trade_off)
        found.append(next_ if before - after > GAIN * abs(before) else here)
    return tuple(found)


def followed(trade_off: float, before: float, now: float) -> float:
    """λ by the trend of the smoothed loss: up while it falls, down where it rose by more than 1 %."""
    if now > before * (1 + RISE):
        return trade_off / LAMBDA_STEP
    return trade_off * LAMBDA_STEP if now < before else trade_off


def reversed_errors(layers: Layers, sensitivities: Sequence[float]) -> list[list[Level]]:
    """The same layers, the least sensitive one with the sensitivity of the most sensitive, and so on.

    An ablation: allocations by these should be worse.
    """
    order = sorted(range(len(layers)), key=lambda i: sensitivities[i])
    given = dict(zip(order, (sensitivities[i] for i in reversed(order)), strict=True))
    return [
        [Level(x.format, x.error / max(sensitivities[i], 1e-30) * given[i], x.cost, x.bits) for x in levels]
        for i, levels in enumerate(layers)
    ]
