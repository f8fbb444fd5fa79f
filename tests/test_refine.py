"""The step behind the allocation: its KL and slopes against plain runs, and what it keeps and improves."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

import pytest
import torch
from llama_module import VOCAB, llama
from torch import Tensor

from gammac.budget import parse_budgets
from gammac.calibration import inputs_of
from gammac.diagnostics import CompileError
from gammac.formats import candidates_of, load_float, parse_format
from gammac.ir import Module, to_text
from gammac.ir.interpret import run
from gammac.passes import PASSES, Choices, default_pipeline, refine_of, strategy_of
from gammac.passes.allocate import Allocate, problem, tie_groups
from gammac.passes.allocation_search import upgraded
from gammac.passes.candidates import Candidates
from gammac.passes.kl_gradient import FULL, KlGradient
from gammac.passes.options import parse_passes
from gammac.passes.refine import Refine, _predicted, split
from gammac.passes.sensitivity import Fisher, Gamma
from gammac.passes.sensitivity.random_feasible import RandomFeasible
from gammac.passes.sensitivity.scores import candidate
from gammac.pipeline import Context, Pipeline
from gammac.targets import cost
from gammac.targets.target import load_target
from gammac.texts import Calibration
from gammac.trials import Trial, run_trials
from gammac.weights import WeightStore

WINDOWS: Final = 12  # as many as refine reads
BUDGETS: Final = ["2.5", "3", "4", "3.3bpw", "90KB", "130us/token", "3+3.7bpw+90KB+130us/token"]


@pytest.fixture(scope="module")
def prepared() -> tuple[Module, Context]:
    """Three blocks with candidates, not yet scored."""
    store = WeightStore()
    tokens = torch.randint(0, VOCAB, (WINDOWS, 24), generator=torch.Generator().manual_seed(1))
    ctx = Context(load_target("cpu-x86"), store, (), Calibration(tokens))
    candidates = Candidates("w2g32+w3g32+w4g32+w8g32", "w4g64+w8g64", quantizer="rtn")
    return candidates.run(llama(store, blocks=3), ctx), ctx


@pytest.fixture(scope="module")
def scored(prepared: tuple[Module, Context]) -> dict[str, Module]:
    module, ctx = prepared
    return {"fisher": Fisher().run(module, ctx), "random": RandomFeasible().run(module, ctx)}


def formats(module: Module) -> dict[str, str]:
    return {n: str(w.attrs["format"]) for n, w in module.weights.items() if "format" in w.attrs}


def tokens_of(ctx: Context) -> Tensor:
    assert ctx.calibration is not None
    return ctx.calibration.tokens


def refinement(module: Module) -> dict[str, float]:
    found = module.attrs["refinement"]
    assert isinstance(found, dict)
    return found


# ---- the gradient -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8, None])
def test_the_kl_is_that_of_trials(prepared: tuple[Module, Context], bits: int | None) -> None:
    """All weights at one width, or each at another one; an allocation may leave weights as they are."""
    module, ctx = prepared
    wanted: dict[str, str] = {}
    for i, weight in enumerate(w for w in module.weights.values() if "candidates" in w.attrs):
        names = list(candidates_of(weight))
        if bits is None and i % 5 == 0:
            continue
        width = bits or (2, 3, 4, 8)[i % 4]
        wanted[weight.name] = min(names, key=lambda n: abs(parse_format(n).bits - width))
    found, _ = KlGradient(module, tokens_of(ctx), ctx).measure(wanted, "")
    (trial,) = run_trials(module, ctx.store, tokens_of(ctx), [wanted])
    # f32 keeps seven digits of log-probabilities near −5, so not more than this of a small KL
    assert found == pytest.approx(trial.kl, rel=1e-5, abs=1e-8)


def log_p(module: Module, ctx: Context, weights: Mapping[str, Tensor]) -> Tensor:
    """f64 from the whole module's f32 logits, [windows, length - 1, vocab]."""
    function = module.functions["forward"]
    with torch.no_grad():
        found = run(function, inputs_of(function, tokens_of(ctx)), weights.__getitem__)
    return found["logits"][:, :-1].double().log_softmax(-1)


@pytest.mark.parametrize(
    "name", ["layers.0.q.weight", "layers.1.down.weight", "layers.2.v.weight", "embed.weight"]
)
def test_slopes_are_those_of_the_kl(prepared: tuple[Module, Context], name: str) -> None:
    """Against central differences over the whole module; the tied embedding and head move together."""
    module, ctx = prepared
    wanted = {
        n: ("w3g32" if i % 2 else "w2g32") if w.attrs["role"] == "block" else "w4g64"
        for i, (n, w) in enumerate(module.weights.items())
        if "candidates" in w.attrs
    }
    _, slopes = KlGradient(module, tokens_of(ctx), ctx).measure(wanted, "")
    assert slopes.keys() == wanted.keys()
    full = {n: load_float(w, ctx.store) for n, w in module.weights.items()}
    here = {**full, **{n: candidate(module.weights[n], f, ctx) for n, f in wanted.items()}}
    reference = log_p(module, ctx, full)

    def kl(change: Tensor) -> float:
        found = log_p(module, ctx, {**here, name: here[name] + change})
        return float((reference.exp() * (reference - found)).sum(-1).mean())

    assert set(slopes[name]) == {FULL, *candidates_of(module.weights[name])}
    # in f32 a step's two ends must differ by more than 1e-7 of what they are; the third order stays small
    step = 0.02
    for format_, slope in slopes[name].items():
        there = candidate(module.weights[name], format_, ctx) if format_ else full[name]
        delta = step * (there - here[name])
        expected = (kl(delta) - kl(-delta)) / (2 * step)
        assert slope == pytest.approx(expected, rel=0.05, abs=2e-5), format_
        assert format_ != wanted[name] or slope == 0
    assert slopes[name][FULL] < 0, "towards full precision the KL falls"


def test_what_a_step_adds_is_what_weights_lose_alone(scored: dict[str, Module]) -> None:
    """Scores may have in them what the others do; the slope has that already."""
    module = scored["fisher"]
    now = {n: next(iter(candidates_of(w))) for n, w in module.weights.items() if "scores" in w.attrs}
    slopes = {n: {f: 0.25 for f in candidates_of(module.weights[n])} for n in now}
    alone = {n: {f: 0.5 + i for i, f in enumerate(candidates_of(module.weights[n]))} for n in now}
    known = module.with_weights(*(module.weights[n].with_attrs(losses_alone=own) for n, own in alone.items()))
    found = _predicted(known, now, 2.0, slopes)
    unit = 2.0 / sum(alone[n][now[n]] for n in now)
    for name, own in found.items():
        for format_, change in own.items():
            stays = format_ == now[name]
            expected = 0.0 if stays else 0.25 + unit * (alone[name][format_] + alone[name][now[name]])
            assert change == pytest.approx(expected)
    assert _predicted(module, now, 2.0, slopes) != found


def test_slopes_are_half_what_the_scores_let_expect(scored: dict[str, Module]) -> None:
    """Slopes that follow from the scores are believed; what a few windows add to them, half."""
    module = scored["fisher"]
    generator = torch.Generator().manual_seed(0)
    now = {n: next(iter(candidates_of(w))) for n, w in module.weights.items() if "scores" in w.attrs}
    own, others = (
        {
            n: {f: float(torch.rand(1, generator=generator)) for f in candidates_of(module.weights[n])}
            for n in now
        }
        for _ in range(2)
    )
    known = module.with_weights(
        *(
            module.weights[n].with_attrs(
                losses_alone=own[n], scores={f: own[n][f] + others[n][f] for f in own[n]}
            )
            for n in now
        )
    )
    slopes = {
        n: {f: 3 * (others[n][f] - others[n][a]) - 2 * own[n][a] * (f != a) for f in own[n]}
        for n, a in now.items()
    }
    unit = 2.0 / sum(own[n][a] for n, a in now.items())
    # not among the slopes that follow: a weight whose two steps differ only by noise, of opposite signs
    name = next(n for n in now if len(own[n]) == 4)
    noisy = {**slopes, name: {**slopes[name], "w3g32": slopes[name]["w3g32"] + 0.1}}
    exact, found = (_predicted(known, now, 2.0, s) for s in (slopes, noisy))
    for n, changes in exact.items():
        for f, change in changes.items():
            step = unit * (own[n][f] + own[n][now[n]])
            assert change == pytest.approx(slopes[n][f] + step if f != now[n] else 0.0, abs=1e-9)
    change = found[name]["w3g32"] - exact[name]["w3g32"]
    assert 0.05 < change < 0.06, "half of what was added, and a little by the fit"


# ---- what it keeps ------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("strategy", ["fisher", "random"])
def test_budgets_and_ties_are_kept_and_the_kl_never_rises(
    prepared: tuple[Module, Context], scored: dict[str, Module], strategy: str, budget: str, tie: bool
) -> None:
    module, ctx = prepared
    allocated = Allocate(budget=budget, tie=tie).run(scored[strategy], ctx)
    refined = Pipeline((Refine(budget=budget, tie=tie),)).run(allocated, ctx)
    found, before, after = refinement(refined), formats(allocated), formats(refined)
    trials = run_trials(module, ctx.store, split(tokens_of(ctx))[1], [before, after])
    assert found["kl_before"] == pytest.approx(trials[0].kl, rel=1e-5)
    assert found["kl_after"] == pytest.approx(trials[1].kl, rel=1e-5)
    assert found["kl_after"] <= found["kl_before"]
    assert found["changed"] == sum(before[n] != after[n] for n in before)
    assert (found["changed"] > 0) == (found["kl_after"] < found["kl_before"])
    costs = cost.module_cost(module, ctx.target, after)
    taken = {
        "payload": costs.payload_bits,
        "true": costs.true_bits,
        "size": costs.bytes,
        "latency": costs.decode_seconds,
    }
    assert all(taken[b.kind] <= b.value for b in parse_budgets(budget))
    assert not tie or all(len({after[n] for n in names}) == 1 for names in tie_groups(module))
    limits, rows = problem(refined, ctx, budget, tie, 0)
    groups = [group for _, group in rows]
    picks = tuple(next(i for i, c in enumerate(g) if c.name == after[names[0]]) for names, g in rows)
    if found["changed"]:
        assert upgraded(groups, picks, tuple(limit.capacity for limit in limits)) == picks, "an upgrade fits"
    # what allocate says of its choice is said of the refined one
    allocation: Any = refined.attrs["allocation"]
    assert allocation["payload_bits"] == round(costs.payload_bits, 6) and allocation["bytes"] == costs.bytes
    same = {"format", "allocation", "refinement"}
    for name, weight in refined.weights.items():
        other = allocated.weights[name]
        assert {k: v for k, v in weight.attrs.items() if k not in same} == {
            k: v for k, v in other.attrs.items() if k not in same
        }


def test_extra_bytes_count(prepared: tuple[Module, Context], scored: dict[str, Module]) -> None:
    _, ctx = prepared
    options: dict[str, Any] = {"budget": "100KB", "extra_bytes": 30_000, "tie": False}
    refined = Refine(**options).run(Allocate(**options).run(scored["random"], ctx), ctx)
    assert refinement(refined)["changed"] > 0
    allocation: Any = refined.attrs["allocation"]
    assert 30_000 + cost.module_cost(refined, ctx.target, formats(refined)).bytes == allocation["bytes"]
    assert allocation["bytes"] <= 100_000


def test_budgets_of_the_compile_are_used(prepared: tuple[Module, Context], scored: dict[str, Module]) -> None:
    _, ctx = prepared
    own = dataclasses.replace(ctx, budgets=parse_budgets("3+90KB"))
    text = to_text(Pipeline((Allocate(), Refine())).run(scored["random"], own))
    given = (Allocate(budget="3+90KB"), Refine(budget="3+90KB"))
    assert text == to_text(Pipeline(given).run(scored["random"], ctx))
    assert text == to_text(Pipeline((Allocate(), Refine())).run(scored["random"], own)), "the same every time"


# ---- what it improves ---------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("budget", ["2.5", "3"])
def test_a_bad_allocation_gets_better(
    prepared: tuple[Module, Context], scored: dict[str, Module], budget: str, tie: bool
) -> None:
    """The narrowest formats where fisher says that they hurt most."""
    _, ctx = prepared
    fisher = scored["fisher"]
    # each weight's scores divided by the square of their level: the order of the levels is reversed
    bad = fisher.with_weights(
        *(w.with_attrs(scores=reversed_level(w.attrs["scores"])) for w in weights_of(fisher))
    )
    allocated = fisher.with_weights(
        *(
            fisher.weights[n].with_attrs(format=f)
            for n, f in formats(Allocate(budget=budget, tie=tie).run(bad, ctx)).items()
        )
    )
    once, often = (refinement(Refine(budget=budget, tie=tie, rounds=r).run(allocated, ctx)) for r in (1, 12))
    best = Refine(budget=budget, tie=tie).run(Allocate(budget=budget, tie=tie).run(fisher, ctx), ctx)
    assert once["kl_before"] == often["kl_before"] > 1.5 * refinement(best)["kl_after"]
    assert once["kl_after"] < 0.95 * once["kl_before"]
    assert often["kl_after"] < 0.8 * often["kl_before"]


def weights_of(module: Module) -> list[Any]:
    return [w for w in module.weights.values() if "scores" in w.attrs]


def reversed_level(scores: Mapping[str, float]) -> dict[str, float]:
    return {f: s / max(scores.values()) ** 2 for f, s in scores.items()}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_one_round_changes_no_more_than_its_share(
    prepared: tuple[Module, Context], scored: dict[str, Module], share: float
) -> None:
    _, ctx = prepared
    allocated = Allocate(budget="2.5", tie=False).run(scored["random"], ctx)
    refined = Refine(budget="2.5", tie=False, share=share, rounds=1).run(allocated, ctx)
    decisions = len(formats(allocated))
    assert 0 <= refinement(refined)["changed"] <= max(2, round(share * decisions))


def test_windows_are_those_of_the_calibration(
    prepared: tuple[Module, Context], scored: dict[str, Module]
) -> None:
    module, ctx = prepared
    assert ctx.calibration is not None
    allocated = Allocate(budget="3").run(scored["random"], ctx)
    found = refinement(Refine(budget="3", windows=2).run(allocated, ctx))
    few = ctx.calibration.spread(4).tokens
    (trial,) = run_trials(module, ctx.store, split(few)[1], [formats(allocated)])
    assert len(few) == 4 and found["kl_before"] == pytest.approx(trial.kl, rel=1e-5)


@pytest.mark.parametrize(("windows", "learnt", "judging"), [(12, 6, 6), (5, 3, 2), (2, 1, 1), (1, 1, 1)])
def test_proposals_are_judged_on_other_windows(windows: int, learnt: int, judging: int) -> None:
    tokens = torch.arange(windows)[:, None]
    parts = split(tokens)
    assert [len(part) for part in parts] == [learnt, judging]
    assert windows == 1 or sorted(torch.cat(parts).flatten().tolist()) == list(range(windows))


def test_what_only_the_gradients_windows_gain_from_is_not_kept(
    prepared: tuple[Module, Context], scored: dict[str, Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proposals that are worse where they are judged leave the allocation as it is, after one round."""
    _, ctx = prepared
    allocated = Allocate(budget="2.5").run(scored["random"], ctx)
    tried: list[int] = []

    def worse(*args: Any) -> list[Trial]:
        tried.append(len(args[3]))
        return [Trial(kl=1.0 + i, nll=1.0, top1=0.5) for i in range(len(args[3]))]

    monkeypatch.setattr("gammac.passes.refine.run_trials", worse)
    refined = Refine(budget="2.5", rounds=5).run(allocated, ctx)
    assert refinement(refined) == {"kl_before": 1, "kl_after": 1, "changed": 0}
    assert formats(refined) == formats(allocated) and len(tried) == 1 and tried[0] > 1


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("rounds=0", "rounds is at least 1"),
        ("windows=0", "windows is at least 1"),
        ("share=-0.1", "share is at least 0 and at most 1"),
        ("share=1.5", "share is at least 0 and at most 1"),
        ("round=3", "no option 'round=3'"),
    ],
)
def test_wrong_options_are_refused(options: str, said: str) -> None:
    refused: list[Callable[[], object]] = [
        lambda: parse_passes(f"allocate,refine{{{options}}}", PASSES),
        lambda: refine_of(Choices(strategy=f"fisher+refine{{{options}}}")),
    ]
    for attempt in refused:
        with pytest.raises(CompileError, match=r"^refine: ") as caught:
            attempt()
        assert said in str(caught.value)


def test_text_and_a_next_token_are_needed(
    prepared: tuple[Module, Context], scored: dict[str, Module]
) -> None:
    _, ctx = prepared
    allocated = Allocate(budget="3").run(scored["random"], ctx)
    for module, own in (
        (allocated.with_attrs(kind="encoder"), ctx),
        (allocated, dataclasses.replace(ctx, calibration=None)),
    ):
        with pytest.raises(CompileError, match="refine needs calibration text and a model that predicts"):
            Refine(budget="3").run(module, own)


def test_another_budget_is_refused(prepared: tuple[Module, Context], scored: dict[str, Module]) -> None:
    _, ctx = prepared
    allocated = Allocate(budget="4").run(scored["random"], ctx)
    with pytest.raises(CompileError, match="the allocation is not within the budgets"):
        Refine(budget="2.5").run(allocated, ctx)


def test_what_it_needs_is_named(prepared: tuple[Module, Context], scored: dict[str, Module]) -> None:
    _, ctx = prepared
    with pytest.raises(CompileError, match=r"has no format(.|\n)*run allocate first"):
        Pipeline((Refine(budget="3"),)).run(scored["random"], ctx)
    bare = llama(ctx.store, blocks=1)
    bare = bare.with_weights(
        *(
            w.with_attrs(scores={"w3g32": 1.0}, format="w3g32")
            for w in bare.weights.values()
            if "role" in w.attrs
        )
    )
    with pytest.raises(CompileError, match="has no candidates"):
        Pipeline((Refine(budget="3"),)).run(bare, ctx)


# ---- its place ----------------------------------------------------------------------------------


def names_of(choices: Choices) -> list[str]:
    return [p.name for p in default_pipeline(choices, "onnx", compiler=True)]


@pytest.mark.parametrize(
    ("strategy", "refine", "expected"),
    [
        ("gamma", None, Refine()),
        ("gamma{windows=3}", None, Refine()),
        ("gamma", False, None),
        ("fisher", None, None),
        ("fisher", True, Refine()),
        ("fisher+refine", None, Refine()),
        ("fisher+refine{rounds=5}", None, Refine(rounds=5)),
        ("fisher{windows=3}+refine{rounds=5,share=0.2}", None, Refine(rounds=5, share=0.2)),
        ("gamma+refine{windows=9}", False, Refine(windows=9)),
    ],
)
def test_gamma_is_refined_and_others_if_asked(
    strategy: str, refine: bool | None, expected: Refine | None
) -> None:
    choices = Choices(strategy=strategy, refine=refine)
    found = names_of(choices)
    at = found.index("allocate")
    assert found[at - 1] == strategy_of(choices).name == strategy.partition("+")[0].partition("{")[0]
    assert found[at + 1 : -2] == ["refine"] * bool(expected)
    assert found[-2:] == ["quantize", "legalize_onnx"]
    assert refine_of(choices) == ((expected,) if expected else ())


def test_the_default_is_gamma_refined() -> None:
    assert strategy_of(Choices()) == Gamma() and refine_of(Choices()) == (Refine(),)


def test_it_gets_what_the_allocation_gets() -> None:
    passes = default_pipeline(Choices(tie=False), "onnx", compiler=True, extra_bytes=77)
    (allocate,) = (p for p in passes if isinstance(p, Allocate))
    (refine,) = (p for p in passes if isinstance(p, Refine))
    assert (refine.tie, refine.extra_bytes) == (allocate.tie, allocate.extra_bytes) == (False, 77)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("fisher+refin", "no step behind the allocation 'refin'"),
        ("fisher+", "'' is no step behind the allocation"),
        ("fisher+refine+refine", "'refine+refine' is no step behind the allocation"),
        ("fisher+refine{rounds=5", "is no step behind the allocation"),
        ("+refine", "'' is no strategy"),
        ("refine", "no strategy 'refine'"),
    ],
)
def test_a_wrong_step_is_refused(strategy: str, said: str) -> None:
    with pytest.raises(CompileError) as caught:
        default_pipeline(Choices(strategy=strategy), "onnx", compiler=True)
    assert said in str(caught.value)
