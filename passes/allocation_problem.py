"""The integer program: one choice for each group of weights, the least total score, within all limits.

    minimise    Σ score[g, c] x[g, c]
    such that   Σ_c x[g, c] = 1              for each group g
                Σ cost[g, c, k] x[g, c] ≤ capacity[k]     for each limit k
                x binary

Costs and capacities are integers (bits, bytes, nanoseconds), so that "within the limit" is exact. Build,
solve and read back are three functions; `allocation_search` puts them to use.
"""

import ctypes
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    import cvxpy as cp

# Scores become numbers up to this: the solver's tolerances, near 1e-7, are absolute.
SCALE: Final = 1e4
# HiGHS keeps rows within 1e-6; an excess of at least 1 is an excess, half of one is none.
SLACK: Final = 0.5

Costs = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """What a group may get. `size` orders choices that are otherwise equal: the smaller is taken."""

    name: str
    score: float
    costs: Costs
    size: tuple[int, ...] = ()


Group = tuple[Choice, ...]
Picks = tuple[int, ...]  # for each group the index of its choice


def used(groups: Sequence[Group], picks: Picks, limits: int) -> Costs:
    """What a solution takes of each of so many limits."""
    chosen = [group[pick] for group, pick in zip(groups, picks, strict=True)]
    return tuple(sum(choice.costs[k] for choice in chosen) for k in range(limits))


def fits(groups: Sequence[Group], picks: Picks, capacities: Costs) -> bool:
    """Whether a solution is within every limit, exactly."""
    return within(used(groups, picks, len(capacities)), capacities)


def within(amounts: Sequence[int], capacities: Costs) -> bool:
    """Whether no amount exceeds its capacity."""
    return all(amount <= capacity for amount, capacity in zip(amounts, capacities, strict=True))


# ---- the program --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A cvxpy problem, its variables (a flat x), and where the variables of each group begin."""

    problem: "cp.Problem"
    x: Any
    starts: list[int]


def build(
    groups: Sequence[Group],
    capacities: Costs,
    objective: Sequence[Sequence[float]],
    excluded: Sequence[Picks] = (),
) -> Program:
    """State the program. `excluded` solutions are cut off."""
    import cvxpy as cp  # a second to import: only for who allocates

    starts = [0]
    for group in groups:
        starts.append(starts[-1] + len(group))
    x = cp.Variable(starts[-1], boolean=True)
    owner = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    one_each = np.arange(len(groups))[:, None] == owner
    rows, limits = _rows(groups, capacities)
    for picks in excluded:
        rows.append(
            [float(i == pick) for group, pick in zip(groups, picks, strict=True) for i in range(len(group))]
        )
        limits.append(len(groups) - 1)
    constraints = [one_each.astype(np.float64) @ x == 1]
    if rows:
        constraints.append(np.array(rows) @ x <= np.array(limits))
    return Program(cp.Problem(cp.Minimize(_scaled(objective) @ x), constraints), x, starts)


def _rows(groups: Sequence[Group], capacities: Costs) -> tuple[list[list[float]], list[float]]:
    """Coefficients above each group's least cost, divided by what they share: small whole numbers."""
    rows: list[list[float]] = []
    limits: list[float] = []
    for k, capacity in enumerate(capacities):
        lows = [min(c.costs[k] for c in group) for group in groups]
        above = [c.costs[k] - low for group, low in zip(groups, lows, strict=True) for c in group]
        shared = math.gcd(*above) or 1
        rows.append([a / shared for a in above])
        limits.append((capacity - sum(lows)) // shared + SLACK)
    return rows, limits


def _scaled(objective: Sequence[Sequence[float]]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Scores above each group's best, the largest of them SCALE."""
    above = np.array([score - min(row) for row in objective for score in row], dtype=np.float64)
    return above / (above.max() or 1.0) * SCALE


def solve(program: Program) -> bool:
    """Run HiGHS to a gap of zero, on one thread so that runs repeat. False: infeasible."""
    import cvxpy as cp

    _hush()
    options = {"mip_rel_gap": 0.0, "mip_abs_gap": 0.0, "threads": 1, "random_seed": 0}
    program.problem.solve(solver=cp.HIGHS, **options)  # type: ignore[no-untyped-call]
    status = program.problem.status
    assert status in (cp.OPTIMAL, cp.INFEASIBLE), f"HiGHS says {status}"
    return bool(status == cp.OPTIMAL)


@cache
def _hush() -> None:
    """HiGHS 1.16 writes a banner to standard output when a process makes its first solver: not to ours."""
    import highspy

    if os.name != "posix":
        return
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        highspy.Highs()  # type: ignore[no-untyped-call]
        ctypes.CDLL(None).fflush(None)  # what C still holds back would come out later
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def read_back(program: Program) -> Picks:
    """The chosen index of each group."""
    values = np.asarray(program.x.value)
    bounds = zip(program.starts, program.starts[1:], strict=False)
    return tuple(int(np.argmax(values[start:end])) for start, end in bounds)


def solve_within(
    groups: Sequence[Group], capacities: Costs, objective: Sequence[Sequence[float]]
) -> Picks | None:
    """One program. A solution that floating point let through above a limit is cut off, and so on."""
    excluded: list[Picks] = []
    while within(least(groups, capacities), capacities):
        program = build(groups, capacities, objective, excluded)
        if not solve(program):
            return None
        picks = read_back(program)
        if fits(groups, picks, capacities):
            return picks
        excluded.append(picks)
    return None


def least(groups: Sequence[Group], capacities: Costs) -> list[int]:
    """What the cheapest choices take of each limit."""
    return [sum(min(c.costs[k] for c in group) for group in groups) for k in range(len(capacities))]
