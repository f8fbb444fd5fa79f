"""The choice is the optimum: equal to brute force, never above a limit, the same every time."""

import itertools
import math

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gammac.passes.allocation_problem import Choice, Costs, Group, Picks, fits, used
from gammac.passes.allocation_search import Infeasible, choose

# a program takes some ten milliseconds; a busy machine more
FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def score_of(groups: list[Group], picks: Picks) -> float:
    return math.fsum(group[pick].score for group, pick in zip(groups, picks, strict=True))


def brute_force(groups: list[Group], capacities: Costs) -> float | None:
    scores = [
        score_of(groups, picks)
        for picks in itertools.product(*(range(len(g)) for g in groups))
        if fits(groups, picks, capacities)
    ]
    return min(scores, default=None)


def same(groups: list[Group], found: float, expected: float) -> bool:
    """Equal up to what the solver can tell apart: 1e-9 of the largest score."""
    return math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-9 * max(c.score for g in groups for c in g))


@st.composite
def programs(draw: st.DrawFn, limits: int = 1, most: int = 6) -> tuple[list[Group], Costs]:
    """Groups whose wider formats cost more, and capacities somewhere between too tight and generous."""
    groups: list[Group] = []
    scores = st.one_of(st.integers(0, 5).map(float), st.floats(1e-12, 1e6), st.floats(0.1, 10))
    for _ in range(draw(st.integers(1, most))):
        size = draw(st.sampled_from([1, 2, 3, 1000, 331_776, 884_736]))
        costs = [
            tuple(bits * size * (k + 1) + (draw(st.integers(0, 997)) if k else 0) for k in range(limits))
            for bits in draw(st.lists(st.sampled_from([2, 3, 4, 8]), min_size=1, max_size=4, unique=True))
        ]
        groups.append(tuple(Choice(f"f{i}", draw(scores), c) for i, c in enumerate(costs)))
    capacities = []
    for k in range(limits):
        low = sum(min(c.costs[k] for c in g) for g in groups)
        high = sum(max(c.costs[k] for c in g) for g in groups)
        capacities.append(draw(st.integers(low - (high - low) // 10, high + 1)))
    return groups, tuple(capacities)


@FEW
@given(st.integers(0, 3).flatmap(programs))
def test_equals_brute_force(program: tuple[list[Group], Costs]) -> None:
    groups, capacities = program
    expected = brute_force(groups, capacities)
    try:
        picks = choose(groups, capacities)
    except Infeasible as error:
        assert expected is None
        needed = tuple(error.needed if k == error.limit else 10**12 for k in range(len(capacities)))
        assert error.needed > capacities[error.limit]
        assert brute_force(groups, needed) is not None
        return
    assert expected is not None and fits(groups, picks, capacities)
    assert same(groups, score_of(groups, picks), expected)


@FEW
@given(programs())
def test_is_deterministic_and_leaves_no_upgrade(program: tuple[list[Group], Costs]) -> None:
    groups, (capacity,) = program
    assume(capacity >= sum(min(c.costs[0] for c in g) for g in groups))
    picks = choose(groups, (capacity,))
    assert picks == choose(groups, (capacity,))
    slack = capacity - used(groups, picks, 1)[0]
    assert slack >= 0
    for group, pick in zip(groups, picks, strict=True):
        for choice in group:
            if choice.score < group[pick].score:
                assert choice.costs[0] - group[pick].costs[0] > slack


@FEW
@given(programs())
def test_more_budget_is_never_worse(program: tuple[list[Group], Costs]) -> None:
    groups, _ = program
    low = sum(min(c.costs[0] for c in g) for g in groups)
    high = sum(max(c.costs[0] for c in g) for g in groups)
    scores = [score_of(groups, choose(groups, (low + (high - low) * i // 4,))) for i in range(5)]
    for tighter, wider in itertools.pairwise(scores):
        assert wider <= tighter or same(groups, wider, tighter)
    assert scores[-1] == math.fsum(min(c.score for c in g) for g in groups)


@FEW
@given(programs(), st.floats(0.0, 10.0))
def test_a_price_on_bits_changes_nothing_where_the_budget_binds(
    program: tuple[list[Group], Costs], price: float
) -> None:
    """Scores plus κ·bits, κ ≤ 0: with the budget taken in full the added term is the same constant."""
    groups, (capacity,) = program
    assume(capacity >= sum(min(c.costs[0] for c in g) for g in groups))
    picks = choose(groups, (capacity,))
    bound = used(groups, picks, 1)
    most = max(c.costs[0] for g in groups for c in g)
    priced = [tuple(Choice(c.name, c.score - price * c.costs[0] / most, c.costs) for c in g) for g in groups]
    again = choose(priced, bound)
    assert same(groups, score_of(groups, again), score_of(groups, picks))


def test_equal_groups_get_their_choices_in_order() -> None:
    group = (Choice("w2", 1.0, (2,)), Choice("w4", 0.0, (4,)))
    assert choose([group] * 5, (14,)) == (1, 1, 0, 0, 0)


def test_equal_scores_take_the_smaller() -> None:
    group = (Choice("w8", 0.0, (8,), (8,)), Choice("w2", 0.0, (2,), (2,)), Choice("w4", 0.0, (4,), (4,)))
    assert choose([group] * 2, (100,)) == (1, 1)
    assert choose([group] * 2, ()) == (1, 1)


def test_three_limits_that_exclude_each_other() -> None:
    choices = tuple(Choice(f"f{i}", 0.0, tuple(9 * (i == k) for k in range(3))) for i in range(3))
    with pytest.raises(Infeasible):
        choose([choices] * 3, (5, 5, 5))


def test_picks_are_indices_of_the_given_choices() -> None:
    groups: list[Group] = [(Choice("bad", 5.0, (9,)), Choice("good", 1.0, (3,)), Choice("best", 0.0, (4,)))]
    expected: Picks = (1,)
    assert choose(groups, (3,)) == expected
