"""Budgets along a front: from the least that can be met to what the widest formats take."""

import re

import pytest
from allocation_models import MODEL

from gammac.budget import PREFILL, parse_budget
from gammac.diagnostics import CompileError
from gammac.ir import parse
from gammac.pareto import TRADED, parse_front, spread
from gammac.passes.allocate import Allocate
from gammac.pipeline import Context
from gammac.targets.target import load_target

CTX = Context(load_target("cpu-x86"))


def loss(budget: str) -> float:
    attrs = Allocate(budget=budget).run(parse(MODEL), CTX).attrs["allocation"]
    assert isinstance(attrs, dict)
    return float(attrs["objective"])


@pytest.mark.parametrize("kind", TRADED)
def test_a_front_runs_from_the_cheapest_to_the_best(kind: str) -> None:
    found = spread(parse(MODEL), CTX, kind, 5)
    budgets = [parse_budget(text) for text in found]
    assert {b.kind for b in budgets} == {kind} and {b.tokens for b in budgets} == {TRADED[kind]}
    values = [b.value for b in budgets]
    assert values == sorted(values) and len(values) > 2
    losses = [loss(text) for text in found]
    assert losses == sorted(losses, reverse=True)
    # ONNX Runtime multiplies many tokens fastest by 8 bits: there quality costs no time
    assert losses[0] > losses[-1] or kind == PREFILL
    assert losses[-1] == pytest.approx(loss(""))
    # less than the first is impossible
    number = re.match(r"[\d.]+", found[0])
    assert number is not None
    with pytest.raises(CompileError, match="the smallest possible is"):
        loss(f"{0.9 * float(number[0]):.6f}{found[0][number.end() :]}")


@pytest.mark.parametrize(
    "text", ["latency", "quality", "quality,speed", "latency,size", "quality,size,energy"]
)
def test_other_fronts_are_refused(text: str) -> None:
    with pytest.raises(CompileError, match=r"is no front[^$]*quality,latency"):
        parse_front(text)
    assert parse_front("memory, quality") == "memory"
