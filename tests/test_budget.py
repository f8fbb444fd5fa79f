"""Budgets: what is read, how it is shown, what is refused."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gammac.budget import ENERGY, LATENCY, PAYLOAD, SIZE, TRUE, parse_budget, parse_budgets, spelled
from gammac.diagnostics import CompileError

READ = {
    "3": (PAYLOAD, 3.0, "3"),
    "3bit": (PAYLOAD, 3.0, "3"),
    "2.50bits": (PAYLOAD, 2.5, "2.5"),
    "3bpw": (TRUE, 3.0, "3bpw"),
    "80MB": (SIZE, 80e6, "80MB"),
    "1.2GB": (SIZE, 1.2e9, "1.2GB"),
    "500 kb": (SIZE, 5e5, "500KB"),
    "75MiB": (SIZE, 75 * 2**20, "75MiB"),
    "12ms/token": (LATENCY, 0.012, "12ms/token"),
    "0.5s/token": (LATENCY, 0.5, "0.5s/token"),
    "0.5J/token": (ENERGY, 0.5, "0.5J/token"),
}


@pytest.mark.parametrize("text", READ)
def test_reads(text: str) -> None:
    budget = parse_budget(text)
    assert (budget.kind, budget.value, str(budget)) == READ[text]
    assert parse_budget(str(budget)) == budget


@pytest.mark.parametrize("text", ["", "three", "3 apples", "80 M B", "12ms", "1e3", "nan", "3..5", "MB"])
def test_bad_text_lists_the_spellings(text: str) -> None:
    with pytest.raises(CompileError, match=r"2\.5bits, 3bpw, 80MB"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["0", "-3", "0MB", "-1ms/token", "0.000bpw"])
def test_nothing_is_refused(text: str) -> None:
    with pytest.raises(CompileError, match="grants nothing"):
        parse_budget(text)


def test_several() -> None:
    assert [str(b) for b in parse_budgets("3+80MB")] == ["3", "80MB"]
    assert [b.kind for b in parse_budgets("3bpw, 5ms/token")] == [TRUE, LATENCY]


def test_exact_is_the_decimal_number() -> None:
    assert parse_budget("2.3").exact == Fraction(23, 10)
    assert parse_budget("12ms/token").exact == Fraction(12, 1000)


@given(st.sampled_from([PAYLOAD, TRUE, SIZE, LATENCY]), st.fractions(Fraction(1, 1000), 10**12))
def test_what_a_message_spells_is_enough(kind: str, amount: Fraction) -> None:
    budget = parse_budget(spelled(kind, amount))
    assert budget.kind == kind
    # floats hold 15 digits
    assert budget.exact >= amount * (1 - Fraction(1, 10**15))
