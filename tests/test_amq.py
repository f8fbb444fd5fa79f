"""The strategies that measure allocations end to end: `greedy_kl`, and `amq` with its search."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_module import VOCAB, llama

from gammac.budget import parse_budgets
from gammac.cache import PassCache
from gammac.diagnostics import CompileError
from gammac.ir import Module, to_text
from gammac.passes.allocate import Allocate
from gammac.passes.candidates import Candidates
from gammac.passes.sensitivity import measured
from gammac.passes.sensitivity.amq import Amq
from gammac.passes.sensitivity.amq_decisions import decisions_of
from gammac.passes.sensitivity.amq_search import Space, Surrogate, propose, ranks
from gammac.passes.sensitivity.greedy_kl import GreedyKl
from gammac.pipeline import Context, Pass, Pipeline
from gammac.targets.target import load_target
from gammac.texts import Calibration
from gammac.trials import Trial, run_trials
from gammac.weights import WeightStore

SMALL = Amq(initial=5, iterations=2, per_iteration=3)


def with_candidates(cache: Path | None = None, tie: bool = True, **options: Any) -> tuple[Module, Context]:
    store = WeightStore()
    tokens = torch.randint(0, VOCAB, (3, 24), generator=torch.Generator().manual_seed(1))
    target = dataclasses.replace(load_target("cpu-x86"), tie=tie)
    ctx = Context(target, store, (), Calibration(tokens), cache=PassCache(cache), **options)
    pass_ = Candidates("w2g32+w3g32+w4g32+w8g32", "w4g64+w8g64", quantizer="rtn")
    return pass_.run(llama(store), ctx), ctx


def within(ctx: Context, budget: str) -> Context:
    return dataclasses.replace(ctx, budgets=parse_budgets(budget))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The assignments that are really run."""
    seen: list[dict[str, str]] = []

    def watched(module: Module, store: WeightStore, tokens: torch.Tensor, assignments: Any) -> list[Trial]:
        seen.extend(assignments)
        return run_trials(module, store, tokens, assignments)

    monkeypatch.setattr(measured, "run_trials", watched)
    return seen


def test_greedy_kl_measures_one_weight_at_a_time() -> None:
    module, ctx = with_candidates()
    assert ctx.calibration is not None
    scored = GreedyKl(windows=3).run(module, ctx)
    for name in ("layers.1.up.weight", "embed.weight"):
        scores: Any = scored.weights[name].attrs["scores"]
        for format_, score in scores.items():
            (trial,) = run_trials(module, ctx.store, ctx.calibration.tokens, [{name: format_}])
            assert score == pytest.approx(trial.kl, rel=1e-5)


def test_a_weight_that_nothing_reads_scores_nothing() -> None:
    module, ctx = with_candidates()
    module = module.with_weights(dataclasses.replace(module.weights["layers.0.q.weight"], name="idle"))
    scores: Any = GreedyKl().run(module, ctx).weights["idle"].attrs["scores"]
    assert scores == dict.fromkeys(("w2g32", "w3g32", "w4g32", "w8g32"), 0.0)


@pytest.mark.parametrize("strategy", [GreedyKl(), SMALL], ids=lambda s: s.name)
def test_a_killed_run_goes_on_where_it_stopped(
    strategy: Pass, tmp_path: Path, tried: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "PIECE", 4)
    module, ctx = with_candidates()
    whole = to_text(strategy.run(module, ctx))
    total = len(tried)
    tried.clear()

    class Killed(Exception):
        pass

    def dying(items: Sequence[Any], title: str) -> Iterator[Any]:
        for index, item in enumerate(items):
            if index == 2:
                raise Killed
            yield item

    module, ctx = with_candidates(tmp_path)
    with pytest.raises(Killed):
        strategy.run(module, dataclasses.replace(ctx, progress=dying))
    before = len(tried)
    assert 0 < before < total
    assert to_text(strategy.run(module, ctx)) == whole
    assert len(tried) == total


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("budget", ["2.5", "3", "3.3bpw", "3+3.5bpw"])
def test_allocate_lands_on_a_design_that_was_measured(
    budget: str, tie: bool, tmp_path: Path, tried: list[dict[str, str]]
) -> None:
    module, ctx = with_candidates(tmp_path, tie)
    found = Pipeline((SMALL, Allocate())).run(module, within(ctx, budget))
    assert ctx.calibration is not None
    chosen = {n: str(w.attrs["format"]) for n, w in found.weights.items() if w.attrs.get("role") == "block"}
    amq: Any = found.attrs["amq"]
    allocation: Any = found.attrs["allocation"]
    assert chosen in tried
    assert amq["evaluations"] == len(tried)
    assert amq["payload_bits"] == pytest.approx(allocation["payload_bits"], rel=1e-5)
    (trial,) = run_trials(module, ctx.store, ctx.calibration.spread(2).tokens, [chosen])
    assert amq["kl"] == pytest.approx(trial.kl, rel=1e-5)


def test_another_budget_measures_nothing_again(tmp_path: Path, tried: list[dict[str, str]]) -> None:
    module, ctx = with_candidates(tmp_path)
    kls: list[float] = []
    for budget in ("2.4", "3", "4"):
        found: Any = SMALL.run(module, within(ctx, budget)).attrs["amq"]
        kls.append(found["kl"])
        assert found["evaluations"] == len(tried)
    assert kls == sorted(kls, reverse=True) and kls[0] > kls[-1]


def test_a_budget_that_no_design_fits_is_met_all_the_same(tmp_path: Path) -> None:
    module, ctx = with_candidates(tmp_path)
    found = Pipeline((SMALL, Allocate())).run(module, within(ctx, "2.1"))
    amq: Any = found.attrs["amq"]
    allocation: Any = found.attrs["allocation"]
    assert amq["payload_bits"] > 2.1, "something is pinned"
    assert 2 < allocation["payload_bits"] <= 2.1


def test_bytes_are_left_to_allocate(tmp_path: Path) -> None:
    module, ctx = with_candidates(tmp_path)
    found = Pipeline((SMALL, Allocate())).run(module, within(ctx, "40KB"))
    allocation: Any = found.attrs["allocation"]
    assert allocation["bytes"] <= 40_000 and allocation["payload_bits"] < 4


def test_the_search_follows_the_seed() -> None:
    texts = []
    for seed in (0, 0, 1):
        module, ctx = with_candidates(seed=seed)
        texts.append(to_text(SMALL.run(module, within(ctx, "2.8"))))
    assert texts[0] == texts[1] != texts[2]


def test_tied_linears_make_one_decision() -> None:
    module, _ = with_candidates()
    tied, alone = (decisions_of(module, tie, widest=4) for tie in (True, False))
    assert [len(d.weights) for d in tied] == [3, 1, 2, 1] * 2 and len(alone) == 14
    assert all([f.name for f in d.formats] == ["w2g32", "w3g32", "w4g32"] for d in (*tied, *alone))
    assert [f.name for f in decisions_of(module, True, widest=1)[0].formats] == ["w2g32"]


def test_an_encoder_is_refused() -> None:
    module, ctx = with_candidates()
    for strategy in (GreedyKl(), SMALL):
        with pytest.raises(CompileError, match="predicts the next token"):
            strategy.run(module.with_attrs(kind="encoder"), ctx)


def a_space(decisions: int = 8) -> tuple[Space, Any]:
    """A space, and a loss that each decision adds to in its own measure."""
    rng = np.random.default_rng(5)
    noise = np.tile([1.0, 0.25, 0.0625], (decisions, 1))
    bits = np.tile([2.0, 3.0, 4.0], (decisions, 1))
    high = np.full(decisions, 2)
    weights = rng.lognormal(0.0, 1.5, decisions)
    space = Space(bits, noise, np.zeros(decisions, dtype=np.int64), high)

    def loss(designs: Any) -> Any:
        return np.expm1(0.1 * space.features(designs) @ weights)

    return space, loss


def test_the_surrogate_passes_through_what_was_measured() -> None:
    space, loss = a_space()
    rng = np.random.default_rng(0)
    designs = np.unique(space.random(60, rng), axis=0)
    surrogate = Surrogate(space, designs, loss(designs))
    np.testing.assert_allclose(surrogate(designs), loss(designs), rtol=1e-6, atol=1e-8)
    other = space.random(50, rng)
    assert np.corrcoef(surrogate(other), loss(other))[0, 1] > 0.95


def test_rounds_come_nearer_to_the_front() -> None:
    """Of all 3^8 designs; random ones as many as were measured stay behind."""
    space, loss = a_space()
    every = np.stack(np.meshgrid(*[np.arange(3)] * 8, indexing="ij"), -1).reshape(-1, 8)
    rng = np.random.default_rng(0)
    designs = space.first(20, rng)
    for _ in range(5):
        fresh = propose(space, designs, loss(designs), 8, rng)
        assert len(fresh) == 8 and not {tuple(r) for r in fresh} & {tuple(r) for r in designs}
        designs = np.concatenate([designs, fresh])
    other = space.first(len(designs), np.random.default_rng(1))

    def excess(found: Any) -> float:
        """How much more the best design within each number of bits loses than the best there is."""
        total = 0.0
        for limit in np.arange(18, 32):
            best, of = (loss(d[space.bits_of(d) <= limit]).min() for d in (every, found))
            total += float(of / best - 1)
        return total

    assert excess(designs) < 0.3 * excess(other)


def test_ranks_are_those_of_domination() -> None:
    rng = np.random.default_rng(2)
    losses, bits = rng.integers(0, 12, (2, 60)).astype(float)
    points = sorted(set(zip(losses, bits, strict=True)))
    losses, bits = np.array(points).T
    left, expected = set(range(len(points))), np.zeros(len(points), dtype=int)
    rank = 0
    while left:
        front = {
            i for i in left
            if not any(losses[j] <= losses[i] and bits[j] <= bits[i] for j in left - {i})
        }  # fmt: skip
        for i in front:
            expected[i] = rank
        left, rank = left - front, rank + 1
    np.testing.assert_array_equal(ranks(losses, bits), expected)
