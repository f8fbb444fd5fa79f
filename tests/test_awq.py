"""AWQ: scales that keep the function and lower the loss they are chosen by, and the clip search."""

import dataclasses

import pytest
import torch
from llama_module import llama
from scaling_models import context, inputs_at, logits_of, raised, with_outliers
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import IntegerFormat, parse_format
from gammac.ir import Builder, Module, Op, Operand, rewrite, to_text
from gammac.passes import Choices, default_pipeline
from gammac.passes.awq import Awq, rounding_loss, scales_for
from gammac.passes.candidates import Candidates
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.insert_kv_cache import InsertKvCache
from gammac.passes.quantizers import make_quantizer, output_error
from gammac.passes.quantizers.awq import search_clip
from gammac.passes.quantizers.grid import round_to_grid
from gammac.passes.scale_sites import find_sites, fold_scales, query_key_weights
from gammac.passes.sensitivity.scores import candidate
from gammac.pipeline import Context, Pass, Pipeline
from gammac.weights import WeightStore

AWQ = Awq("w3g32")


@pytest.fixture(scope="module")
def ctx() -> Context:
    return context(WeightStore())


@pytest.fixture(scope="module")
def module(ctx: Context) -> Module:
    return with_outliers(llama(ctx.store), ctx.store)


def scaled(module: Module, ctx: Context, **options: object) -> Module:
    return Pipeline((dataclasses.replace(AWQ, **options),)).run(module, ctx)  # type: ignore[arg-type]


# ---- sites --------------------------------------------------------------------------------------

BY_NORM = ["q-k-v", "gate-up", "down"]
SITES = {
    "llama": BY_NORM, "gemma3": BY_NORM, "phi3": ["qkv", "gate_up", "down"],
    "gpt2": ["c_attn", "c", "c_fc"],  # gelu lets no factor pass: its second projection is left out
    "opt": ["q-k-v", "out", "fc1", "fc2"],
    "opt-after": ["out", "fc2"],  # norms whose results are added to the residual stream too
}  # fmt: skip


@pytest.mark.parametrize("family", SITES)
def test_what_is_scaled_together(family: str) -> None:
    module, _ = raised(family)
    named = [
        "-".join(name.split(".")[-2].removesuffix("_proj") for name in site.weights())
        for site in find_sites(module, "awq")
    ]
    assert named == SITES[family] * 2


@pytest.mark.parametrize("family", SITES)
def test_families_keep_their_outputs(family: str) -> None:
    module, ctx = raised(family)
    after = Pipeline((AWQ,)).run(module, ctx)
    moved = [n for n, w in after.weights.items() if w.digest != module.weights[n].digest]
    assert len(moved) >= 4
    torch.testing.assert_close(
        logits_of(after, ctx.store), logits_of(module, ctx.store), rtol=1e-4, atol=1e-4
    )


def test_any_scale_keeps_the_function(module: Module, ctx: Context) -> None:
    generator = torch.Generator().manual_seed(2)
    sites = find_sites(module, "awq")
    wild = {s: torch.exp(2 * torch.randn(s.channels, generator=generator)) for s in sites}
    after = fold_scales(module, wild, ctx)
    torch.testing.assert_close(
        logits_of(after, ctx.store), logits_of(module, ctx.store), rtol=1e-4, atol=1e-4
    )


def test_values_that_heads_share_are_no_site(module: Module, ctx: Context) -> None:
    """Grouped-query attention: o has more columns than v has rows."""
    names = [name for site in find_sites(module, "awq") for name in site.weights()]
    assert "layers.0.v.weight" in names and "layers.0.o.weight" not in names


def test_a_norm_that_something_else_reads_is_no_site(module: Module, ctx: Context) -> None:
    def rule(b: Builder, op: Op, operands: tuple[Operand, ...]) -> list[Operand] | None:
        if op.loc != "layers.0.gate":
            return None
        y = b.emit("linear", *operands, loc=op.loc)
        return [b.emit("add", y, b.emit("concat", operands[0], operands[0], dim=2), loc=op.loc)]

    branched = module.with_functions(rewrite(module.functions["forward"], rule))
    found = [site.weights() for site in find_sites(branched, "awq")]
    assert ["layers.0.gate.weight", "layers.0.up.weight"] not in found
    assert ["layers.1.gate.weight", "layers.1.up.weight"] in found
    after = scaled(branched, ctx)
    torch.testing.assert_close(
        logits_of(after, ctx.store), logits_of(branched, ctx.store), rtol=1e-4, atol=1e-4
    )


def test_a_module_with_a_cache_is_refused(module: Module, ctx: Context) -> None:
    with pytest.raises(CompileError, match="captured function alone"):
        AWQ.run(Pipeline((InsertKvCache(),)).run(module, ctx), ctx)


# ---- scales -------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("q", "k", "v"), ("gate", "up"), ("down",)])
def test_alpha_is_the_best_of_its_grid(module: Module, ctx: Context, names: tuple[str, ...]) -> None:
    """Losses and scales against activations and outputs computed by hand."""
    x = inputs_at(module, ctx, f"layers.1.{names[0]}")
    weights = [ctx.store.tensor(module.weights[f"layers.1.{n}.weight"].digest) for n in names]
    losses = {}
    for step in range(20):
        scales = scales_for(x.abs().mean(0), step / 20)
        lost = 0.0
        for weight in weights:
            (q,) = make_quantizer("rtn", clip="none").quantize(weight * scales, None, [IntegerFormat(3, 32)])
            lost += float(
                ((x / scales) @ q.dequantize().T - x @ weight.T).square().sum()
                / (x @ weight.T).square().sum()
            )
        losses[step / 20] = lost
    after = scaled(module, ctx)
    said = after.weights[f"layers.1.{names[0]}.weight"].attrs["awq"]
    assert isinstance(said, dict)
    assert said["alpha"] == min(losses, key=losses.__getitem__)
    assert said["loss"] == pytest.approx(min(losses.values()), rel=1e-3)
    assert said["unscaled"] == pytest.approx(losses[0.0], rel=1e-3)
    columns = ctx.store.tensor(after.weights[f"layers.1.{names[0]}.weight"].digest)
    if names != ("q", "k", "v"):  # rows of v, of up and of nothing else are divided, too
        ratio = columns / weights[0]
        torch.testing.assert_close(ratio, scales_for(x.abs().mean(0), said["alpha"]).expand_as(ratio))


def test_scaling_is_never_worse_than_none(module: Module, ctx: Context) -> None:
    said = [w.attrs["awq"] for w in scaled(module, ctx).weights.values() if "awq" in w.attrs]
    assert len(said) == 12
    for one in said:
        assert isinstance(one, dict) and float(str(one["loss"])) <= float(str(one["unscaled"]))
    # outliers behind the norms are worth a scale
    assert any(float(str(one["loss"])) < 0.8 * float(str(one["unscaled"])) for one in said)  # type: ignore[index]


def test_alpha_zero_changes_nothing() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scales_for(torch.rand(64), 0.0), torch.ones(64))
    (plain,) = make_quantizer("rtn", clip="none").quantize(weight, None, [IntegerFormat(3, 32)])
    found = rounding_loss([weight], torch.eye(64), torch.ones(64), IntegerFormat(3, 32))
    assert found == pytest.approx(output_error(weight, plain.dequantize(), None), rel=1e-5)


def test_scales_lie_around_one() -> None:
    scales = scales_for(torch.tensor([0.0, 1e-3, 1.0, 50.0]), 0.6)
    assert float(scales.max() * scales.min()) == pytest.approx(1.0, rel=1e-5)


def test_equal_runs_give_equal_modules(module: Module, ctx: Context) -> None:
    assert to_text(scaled(module, ctx)) == to_text(scaled(module, ctx))
    assert to_text(scaled(module, ctx)) != to_text(scaled(module, ctx, format="w2g32"))


def test_text_is_needed_and_options_are_checked(module: Module, ctx: Context) -> None:
    with pytest.raises(CompileError, match="awq needs calibration text"):
        AWQ.run(module, Context(ctx.target, ctx.store))
    with pytest.raises(CompileError, match="steps is 1 or more"):
        Awq(steps=0).run(module, ctx)
    with pytest.raises(CompileError, match="no weight format"):
        Awq("3").run(module, ctx)


# ---- clip search --------------------------------------------------------------------------------


def test_each_group_gets_the_best_range_by_its_own_gram_matrix() -> None:
    """Against every offer tried by hand on the group's inputs."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(96, 96, generator=generator)
    x = torch.randn(400, 96, generator=generator) @ mixing
    weight, format_ = torch.randn(5, 96, generator=generator), IntegerFormat(2, 32)
    found = round_to_grid(weight, search_clip(weight, x.T @ x / 400, format_), format_).dequantize()
    shrinks = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44)
    for row in range(5):
        for start in (0, 32, 64):
            w, inputs = weight[row, start : start + 32], x[:, start : start + 32]
            least = min(
                float((inputs @ (_rounded(w, low, high) - w)).square().mean())
                for low in shrinks
                for high in shrinks
            )
            lost = float((inputs @ (found[row, start : start + 32] - w)).square().mean())
            assert lost == pytest.approx(least, rel=1e-3)


def _rounded(w: Tensor, down: float, up: float) -> Tensor:
    low, high = w.min().clamp(max=0) * down, w.max().clamp(min=0) * up
    scale = ((high - low) / 3).half().float()
    zero = (-low / scale).round().clamp(0, 3)
    return (((w / scale).round() + zero).clamp(0, 3) - zero) * scale


def test_a_ragged_last_group_is_searched_too() -> None:
    generator = torch.Generator().manual_seed(4)
    weight, x = torch.randn(6, 80, generator=generator), torch.randn(200, 80, generator=generator)
    (found,) = make_quantizer("awq").quantize(weight, x.T @ x / 200, [IntegerFormat(3, 32)])
    (plain,) = make_quantizer("rtn", clip="none").quantize(weight, None, [IntegerFormat(3, 32)])
    assert found.scales.shape == (6, 3)
    assert output_error(weight, found.dequantize(), x.T @ x) < output_error(
        weight, plain.dequantize(), x.T @ x
    )


def test_queries_and_keys_are_not_clipped(module: Module, ctx: Context) -> None:
    kept = query_key_weights(module.functions["forward"])
    assert kept == [f"layers.{i}.{n}.weight" for i in (0, 1) for n in "qk"]
    passes: tuple[Pass, ...] = (
        dataclasses.replace(AWQ, keep_qk_range=True), CollectGrams(), Candidates("w3g32", "w8g32", "awq"),
    )  # fmt: skip
    after = Pipeline(passes).run(module, ctx)
    for name in ("q", "k", "v", "up"):
        weight = after.weights[f"layers.0.{name}.weight"]
        values = ctx.store.tensor(weight.digest)
        (whole,) = make_quantizer("awq", clip="none").quantize(values, torch.eye(64), [parse_format("w3g32")])
        unclipped = torch.equal(candidate(weight, "w3g32", ctx), whole.dequantize())
        assert unclipped == (name in "qk")


# ---- the whole ----------------------------------------------------------------------------------


def test_the_search_loses_less_than_rounding(module: Module, ctx: Context) -> None:
    """Output error of the blocks' linears at 3 bits: scales and clips against min-max."""
    plain = Pipeline((CollectGrams(), Candidates("w3g32", "w8g32", "rtn", clip="none"))).run(module, ctx)
    found = Pipeline((AWQ, CollectGrams(), Candidates("w3g32", "w8g32", "awq"))).run(module, ctx)
    names = [n for n, w in module.weights.items() if w.attrs.get("role") == "block"]
    errors = [
        (float(str(p)), float(str(f)))
        for n in names
        if isinstance(p := _error(plain, n), float) and isinstance(f := _error(found, n), float)
    ]
    assert len(errors) == len(names) and all(f < p for p, f in errors)
    assert sum(f for _, f in errors) < 0.7 * sum(p for p, _ in errors)


def _error(module: Module, name: str) -> object:
    errors = module.weights[name].attrs["errors"]
    assert isinstance(errors, dict)
    return errors["w3g32"]


def test_where_the_pipeline_scales() -> None:
    def names(**choices: object) -> list[str]:
        return [p.name for p in default_pipeline(Choices(**choices), "onnx", compiler=True)]  # type: ignore[arg-type]

    assert "awq" not in names() and "awq" in names(quantizer="awq") and "awq" in names(awq_scales=True)
    assert "awq" not in names(quantizer="awq", awq_scales=False)
    (found,) = (
        p for p in default_pipeline(Choices(quantizer="awq"), "onnx", compiler=True) if p.name == "awq"
    )
    assert found == Awq("w2g64", keep_qk_range=True)
    order = names(awq_scales=True, rotate=True)
    assert order.index("rotate") < order.index("awq") < order.index("insert_kv_cache")
