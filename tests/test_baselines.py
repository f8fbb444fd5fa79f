"""Strategies to compare with: their formulas, what `allocate` makes of them, and options as text."""

import dataclasses
import itertools
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from llama_module import VOCAB, Weights, llama
from test_allocate import large_module
from torch import Tensor

from gammac.cache import PassCache
from gammac.calibration import Stream, block_index, inputs_of, next_token_loss
from gammac.cli import main
from gammac.diagnostics import CompileError
from gammac.driver import Request, make_plan
from gammac.dryrun import scoring_work
from gammac.formats import candidates_of, load_float, parse_format
from gammac.ir import Builder, Function, Module, Sym, TensorType, Value, to_text
from gammac.ir.interpret import run
from gammac.passes import STRATEGIES, Choices, default_pipeline
from gammac.passes.allocate import Allocate
from gammac.passes.candidates import Candidates
from gammac.passes.options import parse_strategy
from gammac.passes.sensitivity import DeltaLoss, Fisher, Hawq
from gammac.passes.sensitivity.first_last_high import FirstLastHigh
from gammac.passes.sensitivity.hawq import Probe, at_least_its_error
from gammac.passes.sensitivity.random_feasible import RandomFeasible
from gammac.passes.sensitivity.scores import candidate
from gammac.passes.sensitivity.uniform import Uniform
from gammac.pipeline import Context, Pass, Pipeline
from gammac.targets.target import load_target
from gammac.texts import Calibration
from gammac.weights import WeightStore

WIDTHS = (2, 3, 4, 8)


@pytest.fixture(scope="module")
def prepared() -> tuple[Module, Context]:
    """A Llama of eight blocks with candidates, not yet scored."""
    store = WeightStore()
    tokens = torch.randint(0, VOCAB, (4, 16), generator=torch.Generator().manual_seed(1))
    ctx = Context(load_target("cpu-x86"), store, (), Calibration(tokens))
    candidates = Candidates("w2g32+w3g32+w4g32+w8g32", "w4g64+w8g64", quantizer="rtn")
    return Pipeline((candidates,)).run(llama(store, blocks=8), ctx), ctx


def widths(scored: Module, budget: str, ctx: Context) -> dict[str, int]:
    """Weight name → the bits that it gets, over the linears of the blocks."""
    found = Allocate(budget=budget, tie=False).run(scored, ctx).weights.values()
    return {
        w.name: parse_format(str(w.attrs["format"])).bits for w in found if w.attrs.get("role") == "block"
    }


# ---- uniform, first_last_high, random ------------------------------------------------------------


def are_neighbours(found: set[int]) -> bool:
    return len(found) == 1 or sorted(found) in [list(pair) for pair in itertools.pairwise(WIDTHS)]


@pytest.mark.parametrize(
    "budget", ["2", "2.13", "2.5", "3", "3.3", "3.97", "4.5", "7", "3.1bpw", "5bpw", "150KB"]
)
def test_uniform_differs_by_one_step_at_most(prepared: tuple[Module, Context], budget: str) -> None:
    module, ctx = prepared
    assert are_neighbours(set(widths(Uniform().run(module, ctx), budget, ctx).values()))


@pytest.mark.parametrize("count", [5, 21, 40])
def test_uniform_hands_the_wider_out_in_order(prepared: tuple[Module, Context], count: int) -> None:
    module, ctx = prepared
    sizes = {n: w.type.numel() for n, w in module.weights.items() if w.attrs.get("role") == "block"}
    first = list(sizes)[:count]
    bits = 2 + sum(sizes[n] for n in first) / sum(sizes.values())
    found = widths(Uniform().run(module, ctx), f"{bits + 1e-9:.9f}", ctx)
    assert {n for n, width in found.items() if width == 3} == set(first)


@pytest.mark.parametrize("budget", ["2.5", "3.3", "3.2bpw", "62MB", "75MB"])
def test_uniform_of_210_weights_is_even_and_quick(budget: str) -> None:
    module = large_module()
    module = module.with_weights(
        *(w.with_attrs(candidates=w.attrs["scores"]) for w in module.weights.values())
    )
    ctx = Context(load_target("cpu-x86"))
    started = time.process_time()
    assert are_neighbours(set(widths(Uniform().run(module, ctx), budget, ctx).values()))
    # under two seconds on an idle core, the import of cvxpy aside; a gentler slope takes 50
    assert time.process_time() - started < 10


@pytest.mark.parametrize("budget", ["2.3", "2.6", "3", "3.5", "4.5", "3.1bpw"])
@pytest.mark.parametrize("blocks", [None, 1, 3])
def test_the_ends_get_no_less_than_the_middle(
    prepared: tuple[Module, Context], blocks: int | None, budget: str
) -> None:
    module, ctx = prepared
    found = widths(FirstLastHigh(blocks).run(module, ctx), budget, ctx)
    count = blocks or 1  # an eighth of eight
    ends = {n for n in found if not count <= (block_index(n) or 0) < 8 - count}
    middle = found.keys() - ends
    assert len(ends) == 2 * count * 7
    if budget != "2.3":  # which is not enough for all of the ends
        assert min(found[n] for n in ends) >= max(found[n] for n in middle)
    assert statistics.fmean(found[n] for n in ends) > statistics.fmean(found[n] for n in middle)
    assert are_neighbours({found[n] for n in middle})


def test_without_ends_it_is_uniform(prepared: tuple[Module, Context]) -> None:
    assert to_text(FirstLastHigh(blocks=0).run(*prepared)) == to_text(Uniform().run(*prepared))


def test_random_is_the_seed_s_and_fits(prepared: tuple[Module, Context]) -> None:
    module, ctx = prepared
    scored = [RandomFeasible().run(module, dataclasses.replace(ctx, seed=seed)) for seed in (0, 0, 1)]
    first, again, other = (widths(s, "3", ctx) for s in scored)
    assert first == again and to_text(scored[0]) == to_text(scored[1])
    assert sum(first[n] != other[n] for n in first) > len(first) / 4
    sizes = {n: module.weights[n].type.numel() for n in first}
    for found in (first, other):
        mean = sum(bits * sizes[n] for n, bits in found.items()) / sum(sizes.values())
        assert 2.95 < mean <= 3


# ---- delta_loss ----------------------------------------------------------------------------------


def gradients_at(module: Module, ctx: Context, bits: int) -> dict[str, Tensor]:
    """Of the summed loss at the model whose weights all have this width, or the nearest one they can have."""
    leaves: dict[str, Tensor] = {}
    for weight in module.weights.values():
        if "candidates" in weight.attrs:
            names = candidates_of(weight)
            nearest = min(names, key=lambda n: abs(parse_format(n).bits - bits))
            leaves[weight.name] = candidate(weight, nearest, ctx).requires_grad_()
        else:
            leaves[weight.name] = load_float(weight, ctx.store)
    assert ctx.calibration is not None
    function, tokens = module.functions["forward"], ctx.calibration.tokens
    next_token_loss(
        run(function, inputs_of(function, tokens), leaves.__getitem__)["logits"], tokens
    ).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_delta_loss_is_what_it_says(prepared: tuple[Module, Context], bits: int) -> None:
    """Against plain autograd over the whole model; the tied embedding and head are one weight."""
    module, ctx = prepared
    assert ctx.calibration is not None
    scored, gradients = DeltaLoss(windows=4).run(module, ctx), gradients_at(module, ctx, bits)
    for name in ("layers.0.q.weight", "layers.3.down.weight", "layers.7.up.weight", "embed.weight"):
        weight, scores = module.weights[name], scored.weights[name].attrs["scores"]
        assert isinstance(scores, dict)
        for format_ in candidates_of(weight):
            if parse_format(format_).bits == bits:
                delta = candidate(weight, format_, ctx) - load_float(weight, ctx.store)
                expected = float((gradients[name] * delta).abs().sum()) / ctx.calibration.tokens.numel()
                assert scores[format_] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("strategy", ["delta_loss", "hawq{probes=2}"])
def test_narrower_is_never_better_in_total(prepared: tuple[Module, Context], strategy: str) -> None:
    module, ctx = prepared
    scored = parse_strategy(strategy, STRATEGIES).run(module, ctx)
    totals = dict.fromkeys(("w2g32", "w3g32", "w4g32", "w8g32"), 0.0)
    for weight in scored.weights.values():
        if weight.attrs.get("role") == "block":
            scores: Any = weight.attrs["scores"]
            assert all(math.isfinite(s) and s >= 0 for s in scores.values())
            totals = {name: total + scores[name] for name, total in totals.items()}
    assert list(totals.values()) == sorted(totals.values(), reverse=True)


# ---- hawq ----------------------------------------------------------------------------------------

ROWS, MIDDLE = 5, 3


def two_linears() -> tuple[Module, Context]:
    """tokens → a table that nothing probes → `a` [3, 3] → `b` [5, 3] → logits."""
    store = WeightStore()
    weights, builder = Weights(store, seed=3), Builder()
    ids = Value(TensorType("i64", (Sym.named("batch"), Sym.named("seq"))), "input_ids")
    x = builder.emit("embedding", ids, weights("table", ROWS, MIDDLE), loc="table")
    for name, rows in (("a", MIDDLE), ("b", ROWS)):
        x = builder.emit("linear", x, weights(name, rows, MIDDLE, role="block"), loc=name)
    function = Function("forward", (ids,), tuple(builder.ops), (x,), ("logits",))
    found = {n: w.with_attrs(candidates={}) if w.attrs else w for n, w in weights.found.items()}
    tokens = torch.randint(0, ROWS, (3, 7), generator=torch.Generator().manual_seed(2))
    ctx = Context(load_target("cpu-x86"), store, (), Calibration(tokens))
    return Module("two", {"forward": function}, found, {"kind": "decoder"}), ctx


def loss_of(module: Module, ctx: Context) -> Any:
    """The loss a token as a function of `a` and `b`."""
    assert ctx.calibration is not None
    tokens, table = ctx.calibration.tokens, ctx.store.tensor(module.weights["table"].digest)
    return lambda a, b: next_token_loss(table[tokens] @ a.T @ b.T, tokens) / tokens.numel()


def test_a_probe_is_the_hessian_s_quadratic_form() -> None:
    """(Hv)ᵢ · vᵢ / ‖vᵢ‖² with v over both weights: the blocks off the diagonal are in one probe's value."""
    module, ctx = two_linears()
    floats = {n: ctx.store.tensor(module.weights[n].digest) for n in ("a", "b")}
    for index, probe in enumerate(Probe(f"0.{i}", Hawq().epsilon) for i in range(3)):
        v = {n: probe.direction(n, w) for n, w in floats.items()}
        _, products = torch.autograd.functional.hvp(
            loss_of(module, ctx), tuple(floats.values()), tuple(v.values())
        )
        estimates = Hawq(probes=3).mean_curvatures(module, ctx)
        for name, product in zip(floats, products, strict=True):
            expected = float((product * v[name]).sum() / v[name].square().sum())
            assert estimates[name][index] == pytest.approx(expected, rel=1e-2, abs=1e-4)


def test_hawq_finds_the_traces_and_the_better_the_more_probes() -> None:
    module, ctx = two_linears()
    floats = tuple(ctx.store.tensor(module.weights[n].digest) for n in ("a", "b"))
    hessians = torch.autograd.functional.hessian(loss_of(module, ctx), floats)
    estimates = Hawq(probes=256).mean_curvatures(module, ctx)
    for index, name in enumerate(("a", "b")):
        size = floats[index].numel()
        trace = float(hessians[index][index].reshape(size, size).diagonal().mean())
        found = estimates[name]
        error = statistics.stdev(found) / 16
        assert abs(statistics.fmean(found) - trace) < 3 * error < 0.5 * trace

        def mean_error(probes: int, found: list[float] = found, trace: float = trace) -> float:
            groups = [found[i : i + probes] for i in range(0, 256, probes)]
            return statistics.fmean(abs(statistics.fmean(g) - trace) for g in groups)

        assert mean_error(64) < 0.6 * mean_error(8) < 0.36 * mean_error(1)


def test_an_estimate_is_at_least_its_error() -> None:
    assert at_least_its_error([3.0, 3.5, 2.5]) == pytest.approx(3.0)
    assert at_least_its_error([-1.0, -2.0, -3.0]) == pytest.approx(1 / math.sqrt(3))


def test_finished_probes_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, ctx = two_linears()
    ctx = dataclasses.replace(ctx, cache=PassCache(tmp_path))
    starts: list[str] = []
    original = Stream.start
    monkeypatch.setattr(Stream, "start", lambda self: (starts.append("start"), original(self)))
    two = Hawq(probes=2).mean_curvatures(module, ctx)
    three = Hawq(probes=3).mean_curvatures(module, ctx)
    assert len(starts) == 2 * 3, "two gradients a probe"
    assert {name: found[:2] for name, found in three.items()} == two
    assert Hawq(probes=2).mean_curvatures(module, dataclasses.replace(ctx, seed=1)) != two


# ---- strategies as text --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fisher", Fisher()),
        ("fisher{windows=32}", Fisher(32)),
        ("hawq{probes=4,epsilon=0.01}", Hawq(probes=4, epsilon=0.01)),
        ("first_last_high{blocks=2}", FirstLastHigh(2)),
        ("delta-loss{ windows=2 }", DeltaLoss(2)),
    ],
)
def test_a_strategy_s_text_may_have_options(text: str, expected: Pass) -> None:
    assert expected in default_pipeline(Choices(strategy=text), "onnx", compiler=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gama{windows=3}", "no strategy 'gama'"),
        ("fisher{window=3}", "fisher: no option 'window=3'"),
        ("fisher{windows=many}", "windows='many' is no int"),
        ("fisher{windows=0}", "windows is at least 1"),
        ("hawq{epsilon=2}", "epsilon is at least 1e-06 and at most 1"),
        ("random{spread=nan}", "spread is at least 0 and at most 10"),
        ("fisher,hawq", "'fisher,hawq' is no strategy"),
        ("fisher{windows=3", "is no strategy"),
        ("", "'' is no strategy"),
    ],
)
def test_wrong_options_are_refused_before_any_work(text: str, said: str) -> None:
    with pytest.raises(CompileError) as caught:
        make_plan(Request("no-such-model", choices=Choices(strategy=text)))
    assert said in str(caught.value)


@pytest.mark.parametrize("strategy", ["fisher", "delta_loss", "hawq"])
def test_a_next_token_is_needed(prepared: tuple[Module, Context], strategy: str) -> None:
    module, ctx = prepared
    for wrong in [
        (module.with_attrs(kind="encoder"), ctx),
        (module, dataclasses.replace(ctx, calibration=None)),
    ]:
        with pytest.raises(
            CompileError, match=f"{strategy} needs calibration text and a model that predicts"
        ):
            STRATEGIES[strategy]().run(*wrong)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_dry_run_knows_what_scoring_takes(strategy: str) -> None:
    """Windows only where text is read, and products only of windows."""
    windows, products = scoring_work(STRATEGIES[strategy](), weights=36, formats=4)
    assert (windows > 0) == (products > 0) == ("calibration" in STRATEGIES[strategy].reads)


def test_the_help_lists_the_strategies_and_nothing_else_imports_torch() -> None:
    text = CliRunner().invoke(main, ["compile", "--help"]).output
    assert all(name in text for name in STRATEGIES)
    code = "import sys, gammac.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
