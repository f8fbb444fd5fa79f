"""The integer program: one choice for each group of weights, the least total score, within all limits.

    minimise    Σ score[g, c] x[g, c]
    such that   Σ_c x[g, c] = 1              for each group g
                Σ cost[g, c, k] x[g, c] ≤ capacity[k]     for each limit k
                x binary

Costs and capacities are integers (bits, bytes, nanoseconds), so that "within the limit" is exact. Build,
solve and read back are three functions; `choose` puts them together.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
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


class Infeasible(Exception):
    """The limits cannot be met. `limit` is the tightest, `needed` the least capacity that would do."""

    def __init__(self, limit: int, needed: int) -> None:
        super().__init__(f"limit {limit} needs {needed}")
        self.limit, self.needed = limit, needed


def choose(groups: Sequence[Group], capacities: Costs) -> Picks:
    """The best choice for each group, the same for equal inputs. Raises Infeasible."""
    kept = [undominated(group) for group in groups]
    small = [tuple(group[i] for i in rows) for group, rows in zip(groups, kept, strict=True)]
    picks: Picks = (0,) * len(small)  # the first of each is its best
    if not fits(small, picks, capacities):
        check_each_limit(small, capacities)
        found = _solve_exactly(small, capacities, [[c.score for c in group] for group in small])
        if found is None:
            raise least_excess(small, capacities)
        picks = first_the_best(small, upgraded(small, found, capacities))
    return tuple(rows[i] for rows, i in zip(kept, picks, strict=True))


def _rank(choice: Choice) -> tuple[float, Costs, tuple[int, ...], str]:
    return (choice.score, choice.costs, choice.size, choice.name)


def undominated(group: Group) -> list[int]:
    """Indices of the choices that no other one beats in score and in every cost, the best score first."""
    kept: list[int] = []
    for index in sorted(range(len(group)), key=lambda i: _rank(group[i])):
        costs = group[index].costs
        # whoever is kept already scores at least as well
        if not any(all(a <= b for a, b in zip(group[k].costs, costs, strict=True)) for k in kept):
            kept.append(index)
    return kept


def used(groups: Sequence[Group], picks: Picks, limits: int) -> Costs:
    """What a solution takes of each of so many limits."""
    chosen = [group[pick] for group, pick in zip(groups, picks, strict=True)]
    return tuple(sum(choice.costs[k] for choice in chosen) for k in range(limits))


def fits(groups: Sequence[Group], picks: Picks, capacities: Costs) -> bool:
    """Whether a solution is within every limit, exactly."""
    return _within(used(groups, picks, len(capacities)), capacities)


def _within(amounts: Sequence[int], capacities: Costs) -> bool:
    return all(amount <= capacity for amount, capacity in zip(amounts, capacities, strict=True))


def score_of(groups: Sequence[Group], picks: Picks) -> float:
    """The total score."""
    return math.fsum(group[pick].score for group, pick in zip(groups, picks, strict=True))


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
        least = [min(c.costs[k] for c in group) for group in groups]
        above = [c.costs[k] - low for group, low in zip(groups, least, strict=True) for c in group]
        shared = math.gcd(*above) or 1
        rows.append([a / shared for a in above])
        limits.append((capacity - sum(least)) // shared + SLACK)
    return rows, limits


def _scaled(objective: Sequence[Sequence[float]]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Scores above each group's best, the largest of them SCALE."""
    above = np.array([score - min(row) for row in objective for score in row], dtype=np.float64)
    return above * (SCALE / (above.max() or 1.0))


def solve(program: Program) -> bool:
    """Run HiGHS to a gap of zero, on one thread so that runs repeat. False: infeasible."""
    import cvxpy as cp

    options = {"mip_rel_gap": 0.0, "mip_abs_gap": 0.0, "threads": 1, "random_seed": 0}
    program.problem.solve(solver=cp.HIGHS, **options)  # type: ignore[no-untyped-call]
    status = program.problem.status
    assert status in (cp.OPTIMAL, cp.INFEASIBLE), f"HiGHS says {status}"
    return bool(status == cp.OPTIMAL)


def read_back(program: Program) -> Picks:
    """The chosen index of each group."""
    values = np.asarray(program.x.value)
    bounds = zip(program.starts, program.starts[1:], strict=False)
    return tuple(int(np.argmax(values[start:end])) for start, end in bounds)


def _solve_exactly(
    groups: Sequence[Group], capacities: Costs, objective: Sequence[Sequence[float]]
) -> Picks | None:
    """The optimum within the limits; None if there is no solution.

    A solution that floating point let through above a limit is cut off and the program solved again.
    """
    excluded: list[Picks] = []
    while True:
        program = build(groups, capacities, objective, excluded)
        if not solve(program):
            return None
        picks = read_back(program)
        if fits(groups, picks, capacities):
            return picks
        excluded.append(picks)


# ---- around it ----------------------------------------------------------------------------------


def check_each_limit(groups: Sequence[Group], capacities: Costs) -> None:
    """Raises Infeasible for the limit that is exceeded the most even by the cheapest choices."""
    over: list[tuple[float, int, int]] = []
    for k, capacity in enumerate(capacities):
        needed = sum(min(c.costs[k] for c in group) for group in groups)
        if needed > capacity:
            over.append((needed / max(capacity, 1), k, needed))
    if over:
        _, limit, needed = max(over)
        raise Infeasible(limit, needed)


def least_excess(groups: Sequence[Group], capacities: Costs) -> Infeasible:
    """Limits that only together cannot be met: the one whose capacity must grow least, and to what."""
    found: list[tuple[float, int, int]] = []
    for k, capacity in enumerate(capacities):
        others = [tuple(_without(c, k) for c in group) for group in groups]
        wanted = [[float(c.costs[k]) for c in group] for group in groups]
        picks = _solve_exactly(others, capacities[:k] + capacities[k + 1 :], wanted)
        if picks is not None:
            needed = used(groups, picks, len(capacities))[k]
            found.append((needed / max(capacity, 1), k, needed))
    assert found, "each limit alone can be met, so one of them can grow until all are"
    _, limit, needed = min(found)
    return Infeasible(limit, needed)


def _without(choice: Choice, k: int) -> Choice:
    return Choice(choice.name, choice.score, choice.costs[:k] + choice.costs[k + 1 :])


def upgraded(groups: Sequence[Group], picks: Picks, capacities: Costs) -> Picks:
    """Take better choices while one fits, so that what is left of a limit is less than any upgrade needs.

    An optimum has none left; what the solver's tolerance hid is found here.
    """
    found, spent = list(picks), used(groups, picks, len(capacities))
    while True:
        better = [
            (group[found[g]].score - choice.score, -g, -i)
            for g, group in enumerate(groups)
            for i, choice in enumerate(group)
            if choice.score < group[found[g]].score
            and _within(_moved(spent, group[found[g]], choice), capacities)
        ]
        if not better:
            return tuple(found)
        _, g, i = max(better)
        spent = _moved(spent, groups[-g][found[-g]], groups[-g][-i])
        found[-g] = -i


def _moved(spent: Costs, old: Choice, new: Choice) -> Costs:
    return tuple(s - a + b for s, a, b in zip(spent, old.costs, new.costs, strict=True))


def first_the_best(groups: Sequence[Group], picks: Picks) -> Picks:
    """Among groups with equal choices it does not matter which gets what: the first get the best."""
    alike: dict[Group, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        alike[group].append(index)
    found = list(picks)
    for group, members in alike.items():
        ranks = {i: _rank(choice) for i, choice in enumerate(group)}
        ordered = sorted((picks[m] for m in members), key=ranks.__getitem__)
        for member, pick in zip(members, ordered, strict=True):
            found[member] = pick
    return tuple(found)
