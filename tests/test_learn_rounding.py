"""Learned rounding: latents by themselves, and what is learnt of a small Llama."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from learning_models import allocated_llama, context, kill_at
from llama_module import VOCAB, llama
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import Quantized, candidates_of, parse_format
from gammac.ir import Module, to_text
from gammac.passes import Choices, default_pipeline
from gammac.passes.allocate import Allocate
from gammac.passes.candidates import Candidates
from gammac.passes.finetune import LearnRounding
from gammac.passes.finetune.latents import GUMBEL, GumbelLatents, latents_of
from gammac.passes.kl_gradient import KlGradient
from gammac.passes.quantize import Quantize
from gammac.passes.quantizers import make_quantizer
from gammac.passes.sensitivity import WeightMse
from gammac.pipeline import Context, Pipeline
from gammac.weights import WeightStore

LEARN = LearnRounding(steps=30)
MIXED = LearnRounding(steps=100, by=GUMBEL)


# ---- latents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w1g32", "w2g32", "w3g64", "w4g32-sym", "w8channel", "w3channel-sym"])
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_latents_begin_at_the_quantizers_codes(name: str, quantizer: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 64, generator=generator), torch.randn(200, 64, generator=generator)
    (start,) = make_quantizer(quantizer).quantize(weight, x.T @ x / 200, (parse_format(name),))
    found = latents_of(weight, start).quantized()
    assert torch.equal(found.codes, start.codes) and torch.equal(found.scales, start.scales)
    assert found.zeros is start.zeros and found.format == start.format


def test_a_step_lowers_a_quadratic_loss() -> None:
    """‖W_q − target‖² towards other codes and larger scales: both are found, and no code leaves its range."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    (start,) = make_quantizer("rtn").quantize(weight, None, (parse_format("w3g32"),))
    moved = Quantized(start.format, {**start.parts, "codes": (start.codes + 1).clamp(max=7)})
    target = 1.02 * moved.dequantize()
    latents, losses = latents_of(weight, start), []
    for step in range(100):
        error = latents.quantized().dequantize() - target
        losses.append(float(error.square().sum()))
        latents.move(2 * error, 0.03 * (1 - step / 100), 0.002 * (1 - step / 100))
    assert losses[-1] < 0.3 * losses[0]
    assert latents.quantized().codes.max() <= 7


def gumbel(name: str, seed: int = 0) -> tuple[Tensor, GumbelLatents]:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    (start,) = make_quantizer("rtn").quantize(weight, None, (parse_format(name),))
    latents = latents_of(weight, start, GUMBEL)
    assert isinstance(latents, GumbelLatents)
    return weight, latents


@pytest.mark.parametrize("name", ["w1g32", "w2g32", "w3g64", "w4g32-sym", "w8channel"])
def test_logits_begin_at_the_quantizers_codes(name: str) -> None:
    _, latents = gumbel(name)
    found, start = latents.quantized(), latents.start
    assert torch.equal(found.codes, start.codes) and torch.equal(found.scales, start.scales)


def test_mixtures_end_at_the_likeliest_codes() -> None:
    """At first a draw is between codes; when no step is left it is the codes, but for a few near ties."""
    _, latents = gumbel("w3g64")
    codes = latents.quantized().dequantize()
    generator = torch.Generator().manual_seed(0)
    first = (latents.drawn(1.0, generator) - codes).abs()
    last = (latents.drawn(0.0, generator) - codes).abs()
    assert float(first.mean()) > 1e-3 and float(last.max()) < 1e-6
    assert torch.equal(latents.chances.argmax(0), latents.logits.argmax(0))


def test_what_a_mixture_moves_is_its_gradient() -> None:
    """The logits' gradient is autograd's, for the noise that was drawn."""
    _, latents = gumbel("w2g32")
    seen = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    latents.drawn(0.5, torch.Generator().manual_seed(2))
    momentum = latents.momenta[0]
    logits = latents.logits.clone().requires_grad_()
    latents.logits = logits
    (wanted,) = torch.autograd.grad(latents.drawn(0.5, torch.Generator().manual_seed(2)), logits, seen)
    latents.logits, latents.chances = logits.detach(), latents.chances.detach()
    latents.move(seen, 0.01, 0.0)
    # one step from nothing leaves a tenth of the gradient as momentum
    assert torch.allclose(momentum, 0.1 * wanted, atol=1e-6)


def test_mixtures_find_other_codes() -> None:
    """‖W_q − target‖² towards codes two steps away, which no code leaves its range for."""
    _, latents = gumbel("w3g32")
    moved = latents.format.quantized(
        (latents.start.codes + 2).clamp(max=7), latents.start.scales, latents.start.zeros
    )
    target, generator = moved.dequantize(), torch.Generator().manual_seed(0)
    before = float((latents.quantized().dequantize() - target).square().sum())
    for step in range(100):
        left = 1 - step / 100
        latents.move(2 * (latents.drawn(left, generator) - target), 0.24 * left, 0.0)
    found = latents.quantized()
    assert float((found.dequantize() - target).square().sum()) < 0.05 * before
    assert found.codes.max() <= 7


# ---- a small Llama ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> WeightStore:
    return WeightStore()


@pytest.fixture(scope="module")
def allocated(store: WeightStore) -> Module:
    return allocated_llama(store)


def kl_of(module: Module, ctx: Context) -> float:
    """On tokens that nothing was learnt from."""
    tokens = torch.randint(0, VOCAB, (8, 24), generator=torch.Generator().manual_seed(2))
    formats = {n: str(w.attrs["format"]) for n, w in module.weights.items() if "format" in w.attrs}
    return KlGradient(module, tokens, ctx).measure(formats, "")[0]


@pytest.mark.parametrize("learn", [LEARN, MIXED], ids=["sign", "gumbel"])
def test_what_is_learnt_loses_less_everywhere(
    allocated: Module, store: WeightStore, learn: LearnRounding
) -> None:
    ctx = context(store)
    found = learn.run(allocated, ctx)
    rounding = found.attrs["rounding"]
    assert isinstance(rounding, dict) and rounding["after"] < 0.9 * rounding["before"]
    assert kl_of(found, ctx) < 0.85 * kl_of(allocated, ctx)


@pytest.mark.parametrize("learn", [LEARN, MIXED], ids=["sign", "gumbel"])
def test_formats_stay_and_codes_fit(allocated: Module, store: WeightStore, learn: LearnRounding) -> None:
    found = learn.run(allocated, context(store))
    changed = 0
    for name, before in allocated.weights.items():
        after = found.weights[name]
        assert after.attrs.get("format") == before.attrs.get("format") and after.digest == before.digest
        if before.attrs.get("role") != "block":
            assert after == before
            continue
        format_ = str(before.attrs["format"])
        old, new = (
            Quantized(parse_format(format_), store.get(candidates_of(w)[format_])) for w in (before, after)
        )
        changed += not torch.equal(old.codes, new.codes)
        assert new.codes.max() <= new.format.levels and new.scales.dtype == torch.float16
        assert old.zeros is not None and new.zeros is not None and torch.equal(old.zeros, new.zeros)
    assert changed >= 10


def test_quantize_stores_what_was_learnt(allocated: Module, store: WeightStore) -> None:
    found = LEARN.run(allocated, context(store))
    stored = Quantize().run(found, context(store))
    for name, weight in found.weights.items():
        if "format" in weight.attrs:
            assert stored.weights[name].digest == candidates_of(weight)[str(weight.attrs["format"])]


@pytest.mark.parametrize("learn", [LEARN, MIXED], ids=["sign", "gumbel"])
def test_equal_seeds_equal_codes(allocated: Module, store: WeightStore, learn: LearnRounding) -> None:
    same = [to_text(learn.run(allocated, context(store, seed=seed))) for seed in (0, 0, 1)]
    assert same[0] == same[1] != same[2]


def test_a_block_that_gains_nothing_stays(
    allocated: Module, store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gammac.passes.finetune.learn_rounding._Learner._error", lambda *_: 0.25)
    found = LEARN.run(allocated, context(store))
    assert found.weights == allocated.weights
    assert found.attrs["rounding"] == {"before": 0.25, "after": 0.25}


def test_a_killed_run_goes_on_behind_the_last_block(
    allocated: Module, store: WeightStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = to_text(LEARN.run(allocated, context(store)))
    ctx = context(store, tmp_path)
    learnt = kill_at(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        LEARN.run(allocated, ctx)
    assert to_text(LEARN.run(allocated, ctx)) == whole
    assert len(set(learnt)) == 3 and len(learnt) == 4, "before the blocks, and two blocks, one of them twice"


def test_wrong_wishes_are_refused(allocated: Module, store: WeightStore) -> None:
    with pytest.raises(CompileError, match="steps is at least 1"):
        LearnRounding(steps=0)
    with pytest.raises(CompileError, match="nothing learns by 'luck'"):
        LearnRounding(by="luck")
    with pytest.raises(CompileError, match=r"by gumbel does not learn fdb2g64"):
        wish = Choices(block="fdb2g64", quantizer="db_llm", learn_rounding=True, learn_by=GUMBEL)
        default_pipeline(wish, "onnx", compiler=True)
    with pytest.raises(CompileError, match="calibration text"):
        LEARN.run(allocated, dataclasses.replace(context(store), calibration=None))
    with pytest.raises(CompileError, match="full-precision inputs"):
        default_pipeline(Choices(learn_rounding=True, inputs="quantized"), "onnx", compiler=True)


def test_without_a_choice_nothing_is_learnt(store: WeightStore) -> None:
    """A module whose blocks have no formats: nothing to do, and nothing claimed."""
    passes = (Candidates("w4g32", "w8g32", "rtn"), WeightMse(), Allocate(budget="4", tie=False))
    module = Pipeline(passes).run(llama(store), context(store))
    bare = module.with_weights(
        *(
            dataclasses.replace(w, attrs={k: v for k, v in w.attrs.items() if k != "role"})
            for w in module.weights.values()
        )
    )
    found = LEARN.run(bare, context(store))
    assert "rounding" not in found.attrs and math.isfinite(kl_of(found, context(store)))
