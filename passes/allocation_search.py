"""From groups of choices to the best one for each: shortcuts, the integer program, and its loose ends.

Dominated choices go first, and a budget that is met by everyone's best needs no program. Behind the program
come two exact steps: no upgrade that still fits is left, and equal groups get their choices in order.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Final

from gammac.passes.allocation_problem import (
    Choice,
    Costs,
    Group,
    Picks,
    fits,
    least,
    solve_within,
    used,
    within,
)

# Programs below this many groups are solved as they are; at most so many are made of a larger one.
MANY: Final = 32
MOST_PROGRAMS: Final = 8


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
        found = optimum(small, capacities, [[c.score for c in group] for group in small])
        if found is None:
            raise least_excess(small, capacities)
        picks = first_the_best(small, upgraded(small, found, capacities))
    return tuple(rows[i] for rows, i in zip(kept, picks, strict=True))


def undominated(group: Group) -> list[int]:
    """Indices of the choices that no other one beats in score and in every cost, the best score first."""
    kept: list[int] = []
    for index in sorted(range(len(group)), key=lambda i: _rank(group[i])):
        costs = group[index].costs
        # whoever is kept already scores at least as well
        if not any(all(a <= b for a, b in zip(group[k].costs, costs, strict=True)) for k in kept):
            kept.append(index)
    return kept


def _rank(choice: Choice) -> tuple[float, Costs, tuple[int, ...], str]:
    return (choice.score, choice.costs, choice.size, choice.name)


def optimum(groups: Sequence[Group], capacities: Costs, objective: Sequence[Sequence[float]]) -> Picks | None:
    """The optimum within the limits; None if there is no solution.

    A group that outweighs the others, as an embedding does, makes the bound of the relaxed program loose
    and the search long: each of its choices is tried as a program of its own.
    """
    best: tuple[float, Picks] | None = None
    heavy = _heavy(groups, capacities)
    for tried in product(*(range(len(groups[g])) for g in heavy)):
        only = dict(zip(heavy, tried, strict=True))
        part = [(group[only[g]],) if g in only else group for g, group in enumerate(groups)]
        wanted = [[row[only[g]]] if g in only else row for g, row in enumerate(objective)]
        found = solve_within(part, capacities, wanted)
        if found is not None:
            picks = tuple(only.get(g, pick) for g, pick in enumerate(found))
            total = math.fsum(row[pick] for row, pick in zip(objective, picks, strict=True))
            best = min(best or (math.inf, picks), (total, picks))
    return best[1] if best else None


def _heavy(groups: Sequence[Group], capacities: Costs) -> list[int]:
    """The few groups that take more than a tenth of what choosing can change."""
    if len(groups) < MANY:
        return []
    shares = [0.0] * len(groups)
    for k in range(len(capacities)):
        spans = [max(c.costs[k] for c in group) - min(c.costs[k] for c in group) for group in groups]
        shares = [max(s, span / max(1, sum(spans))) for s, span in zip(shares, spans, strict=True)]
    found: list[int] = []
    for g in sorted((g for g, s in enumerate(shares) if s > 0.1), key=lambda g: -shares[g]):
        if math.prod(len(groups[h]) for h in [*found, g]) <= MOST_PROGRAMS:
            found.append(g)
    return found


def check_each_limit(groups: Sequence[Group], capacities: Costs) -> None:
    """Raises Infeasible for the limit that is exceeded the most even by the cheapest choices."""
    over: list[tuple[float, int, int]] = []
    for k, (needed, capacity) in enumerate(zip(least(groups, capacities), capacities, strict=True)):
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
        picks = optimum(others, capacities[:k] + capacities[k + 1 :], wanted)
        if picks is not None:
            needed = used(groups, picks, len(capacities))[k]
            found.append((needed / max(capacity, 1), k, needed))
    if not found:  # even without any one of them: then without the last
        fewer = [tuple(_without(c, len(capacities) - 1) for c in group) for group in groups]
        return least_excess(fewer, capacities[:-1])
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
            (choice.score - group[found[g]].score, g, i)
            for g, group in enumerate(groups)
            for i, choice in enumerate(group)
            if choice.score < group[found[g]].score
            and within(_moved(spent, group[found[g]], choice), capacities)
        ]
        if not better:
            return tuple(found)
        _, g, i = min(better)
        spent, found[g] = _moved(spent, groups[g][found[g]], groups[g][i]), i


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
