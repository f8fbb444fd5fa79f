"""2:4 masks learnt block by block inside a compile."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from learning_models import context, kill_at
from llama_module import llama
from test_cli import QUICK, Run, fails
from test_cli import cache as cache  # fixtures
from test_cli import gammac as gammac

from gammac.diagnostics import CompileError
from gammac.formats import is_two_four, load_float
from gammac.ir import Module, to_text, verify
from gammac.passes import Choices, default_pipeline
from gammac.passes.allocate import Allocate
from gammac.passes.candidates import Candidates
from gammac.passes.choices import sparsify_of
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.quantize import Quantize
from gammac.passes.sensitivity import WeightMse
from gammac.passes.sparsify import TRAINED_MASKS, Sparsify
from gammac.pipeline import Pipeline
from gammac.targets.target import load_target
from gammac.weights import WeightStore

SHORT = Sparsify(steps=60, rate=3e-3)


def sparse(module: Module) -> list[str]:
    return [n for n, w in module.weights.items() if "sparse" in w.attrs]


@pytest.mark.parametrize("method", TRAINED_MASKS)
def test_every_method_leaves_two_of_four(method: str) -> None:
    store = WeightStore()
    module = llama(store)
    found = dataclasses.replace(SHORT, method=method).run(module, context(store))
    assert verify(found) == []
    linears = [n for n, w in module.weights.items() if w.attrs.get("role") == "block"]
    assert {*sparse(found)} <= {*linears} and sparse(found)
    assert all(bool(is_two_four(load_float(found.weights[n], store)).all()) for n in sparse(found))


@pytest.mark.parametrize("forced", [True, False])
def test_what_is_learnt_loses_less_than_magnitudes_masks(forced: bool) -> None:
    store = WeightStore()
    found = dataclasses.replace(SHORT, forced=forced).run(llama(store), context(store))
    report: Any = found.attrs["sparsifying"]
    assert 0 < report["learnt"] < 0.95 * report["magnitude"]


def test_a_block_that_does_not_become_better_is_left_to_the_sweep() -> None:
    store = WeightStore()
    module = llama(store)
    found = Sparsify(method="ast", steps=1, rate=1.0).run(module, context(store))
    report: Any = found.attrs["sparsifying"]
    assert report["learnt"] == report["magnitude"] > 0
    assert found.weights == module.weights


@pytest.mark.parametrize("method", TRAINED_MASKS)
def test_what_is_sparse_already_stays_as_it_is(method: str) -> None:
    store = WeightStore()
    module = llama(store)
    once = SHORT.run(module, context(store))
    twice = dataclasses.replace(SHORT, method=method).run(once, context(store))
    assert {n: w.digest for n, w in twice.weights.items()} == {n: w.digest for n, w in once.weights.items()}
    assert sparse(twice) == sparse(once)


def test_norms_learn_along_and_nothing_outside_the_blocks_moves() -> None:
    store = WeightStore()
    module = llama(store)
    found = SHORT.run(module, context(store))
    moved = {n for n, w in found.weights.items() if w.digest != module.weights[n].digest}
    assert moved - set(sparse(found)), "gains of norms"
    tables = {n for n, w in module.weights.items() if w.attrs.get("role") == "table"}
    assert not moved & tables


def test_curvature_can_be_had_of_a_block() -> None:
    """Attention that can be differentiated twice, and another result than by gradients alone."""
    store = WeightStore()
    first, second = (
        Sparsify(steps=10, score=score).run(llama(store), context(store))
        for score in ("hessian_obd", "magnitude")
    )
    assert to_text(first) != to_text(second)


def test_a_killed_run_goes_on_behind_its_last_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = WeightStore(tmp_path / "weights")
    module, short = llama(store), Sparsify(steps=6)
    whole = to_text(short.run(module, context(store)))
    with monkeypatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            short.run(module, context(store, tmp_path / "cache"))
    keys = kill_at(100, monkeypatch)
    assert to_text(short.run(module, context(store, tmp_path / "cache"))) == whole
    assert len(keys) == 1, "what was done is not done again"


def test_zeros_stay_through_rounding_and_a_dense_format_is_refused() -> None:
    store = WeightStore()
    ctx = dataclasses.replace(context(store), target=load_target("reference"))

    def through(formats: str) -> Module:
        passes = (
            SHORT, CollectGrams(), Candidates(formats, "w8g32", "gptq"), WeightMse(),
            Allocate(tie=False), Quantize(),
        )  # fmt: skip
        return Pipeline(passes).run(llama(store), ctx)

    learnt, stored = SHORT.run(llama(store), ctx), through("s24w4g32")
    for name in sparse(stored):
        gone = load_float(learnt.weights[name], store) == 0
        assert not bool(load_float(stored.weights[name], store)[gone].any())
    with pytest.raises(CompileError, match="is 2:4, and stored as w4g32"):
        through("w4g32")


def test_options_and_text_are_checked_before_any_work() -> None:
    with pytest.raises(CompileError, match="no method 'dense'"):
        Sparsify(method="dense")
    with pytest.raises(CompileError, match="no score 'wishes'"):
        Sparsify(score="wishes")
    with pytest.raises(CompileError, match="steps=0"):
        Sparsify(steps=0)
    store = WeightStore()
    few = dataclasses.replace(context(store), calibration=None)
    with pytest.raises(CompileError, match="windows of calibration text"):
        Sparsify().run(llama(store), few)


def test_the_pass_follows_from_the_choice() -> None:
    for wrong, said in (
        ("ast{score=fisher}", "ast has no option score"), ("maskllm{rate=0.1}", "maskllm has no option rate"),
        ("ast{method=cast}", "ast has no option method"), ("ast{steps=4", "is no mask"),
        ("lottery", "nothing learns masks by 'lottery'"), ("ast{wishes=1}", "no option 'wishes=1'"),
    ):  # fmt: skip
        with pytest.raises(CompileError, match=said):
            sparsify_of(Choices(block="s24w4g64", mask=wrong))
    choices = Choices(block="s24w4g64", mask="ast{steps=5,rate=0.01}")
    assert sparsify_of(choices) == (Sparsify(method="ast", steps=5, rate=0.01),)
    names = [p.name for p in default_pipeline(choices, "tvm", compiler=True)]
    assert names.index("sparsify") < names.index("collect_grams")
    with pytest.raises(CompileError, match="w4g64 would not store its zeros"):
        sparsify_of(Choices(block="w4g64+s24w4g64", mask="sparseforge"))


def test_a_compile_learns_masks(gammac: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("tiny", "--sparsity", "2:4", "--formats", "w4g64", "--table-formats", "w8g64", "--strategy",
             "uniform", "--backend", "tvm", "--calibration-windows", "8", "--calibration-length",
             "32")  # fmt: skip
    mask = ("--mask", "sparseforge{steps=40,score=magnitude}")
    with monkeypatch.context() as patch:
        patch.setattr(Sparsify, "run", lambda *_: pytest.fail("a dry run trains nothing"))
        told = gammac("compile", *asked, *mask, "--dry-run", "-o", str(tmp_path / "out"))
    assert told.exit_code == 0, told.output
    once = [part for part in asked if part not in ("--strategy", "uniform")]
    swept = gammac("sweep", *once, *mask, "--budgets", "3", "-o", str(tmp_path / "sweep"))
    fails(swept, "learnt masks make another of it")
    result = gammac("compile", *asked, *mask, "--dump-ir", str(tmp_path / "ir"), "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    (dump,) = (tmp_path / "ir").glob("*-sparsify.gir")
    assert "sparsifying = {" in dump.read_text() and 'sparse = "2:4"' in dump.read_text()
    fails(
        gammac("compile", *asked, "--mask", "wishes", "-o", str(tmp_path / "no")),
        "no mask 'wishes'",
        "sparseforge",
    )
    dense = ["tiny", "--formats", "w4g64", "--mask", "sparseforge", *QUICK]
    fails(gammac("compile", *dense, "-o", str(tmp_path / "no")), "which weights stay in sparse formats")


def test_seeds_and_equal_bits() -> None:
    texts = []
    for seed in (0, 0, 1):
        store = WeightStore()
        texts.append(to_text(SHORT.run(llama(store), context(store, seed=seed))))
    assert texts[0] == texts[1] != texts[2]
