"""SmoothQuant and rounded activations: the function kept, the law of the maxima, and what rounding costs."""

from pathlib import Path

import onnx
import pytest
import torch
from llama_module import llama
from onnx_models import Shape, decoder, quantized
from scaling_models import context, inputs_at, logits_of, raised, with_outliers
from test_onnx import distance
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.ir import Builder, Module, TensorType, Value, parse, to_text
from gammac.ir.interpret import run_op
from gammac.passes import Choices, default_pipeline
from gammac.passes.candidates import Candidates
from gammac.passes.insert_kv_cache import InsertKvCache
from gammac.passes.legalize_onnx import LegalizeOnnx
from gammac.passes.quantize import Quantize
from gammac.passes.quantize_activations import QuantizeActivations, parse_activations, round_inputs
from gammac.passes.smooth_quant import SmoothQuant, smoothing
from gammac.pipeline import Context, Pipeline
from gammac.targets.onnx.emit import emit
from gammac.weights import WeightStore

# a tipped code moves a result by 0.33 / top of its deviation
TIPPED = 1.0


@pytest.fixture(scope="module")
def ctx() -> Context:
    return context(WeightStore())


@pytest.fixture(scope="module")
def module(ctx: Context) -> Module:
    return with_outliers(llama(ctx.store), ctx.store)


def smoothed(module: Module, ctx: Context, alpha: float = 0.85) -> Module:
    return Pipeline((SmoothQuant(alpha),)).run(module, ctx)


def rounded(module: Module, ctx: Context, bits: int, activations: str, smooth: bool = True) -> Module:
    """Weights and activations as SmoothQuant deploys them."""
    name = f"w{bits}channel-sym"
    module = smoothed(module, ctx) if smooth else module
    module = Candidates(name, "w8g32", "rtn", "none").run(module, ctx)
    roles = {n: w.attrs["role"] for n, w in module.weights.items() if "role" in w.attrs}
    module = module.with_weights(
        *(module.weights[n].with_attrs(format=name if r == "block" else "w8g32") for n, r in roles.items())
    )
    return Pipeline((Quantize(quantizer="rtn"), QuantizeActivations(activations))).run(module, ctx)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean() / expected.var())


# ---- smoothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2"])
def test_families_keep_their_outputs(family: str) -> None:
    module, ctx = raised(family)
    after = smoothed(module, ctx)
    marked = [n for n, w in after.weights.items() if w.attrs.get("smoothed") == 0.85]
    assert marked and not [n for n in marked if "down" in n or "o_proj" in n]
    torch.testing.assert_close(
        logits_of(after, ctx.store), logits_of(module, ctx.store), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_channels_follow_the_law(module: Module, ctx: Context, alpha: float) -> None:
    """max |X_j| becomes (max |X_j| · max |W_j|)^(1−α), over all calibration tokens and all readers' rows."""
    x = inputs_at(module, ctx, "layers.1.gate").abs().amax(0)
    names = ["layers.1.gate.weight", "layers.1.up.weight"]
    columns = torch.cat([ctx.store.tensor(module.weights[n].digest) for n in names]).abs().amax(0)
    found = inputs_at(smoothed(module, ctx, alpha), ctx, "layers.1.gate").abs().amax(0)
    torch.testing.assert_close(found, (x * columns).pow(1 - alpha), rtol=1e-3, atol=1e-5)


def test_a_channel_of_zeros_keeps_its_scale() -> None:
    found = smoothing(torch.tensor([0.0, 4.0]), torch.tensor([1.0, 0.0]), 0.5)
    assert found[0] == 1.0 and torch.isfinite(found).all()


def test_smoothing_twice_or_wrongly_is_refused(module: Module, ctx: Context) -> None:
    with pytest.raises(CompileError, match="smoothed already"):
        smoothed(smoothed(module, ctx), ctx)
    with pytest.raises(CompileError, match="at least 0 and at most 1"):
        smoothed(module, ctx, 1.5)
    with pytest.raises(CompileError, match="captured function alone"):
        SmoothQuant().run(InsertKvCache().run(module, ctx), ctx)
    with pytest.raises(CompileError, match="smooth_quant needs calibration text"):
        SmoothQuant().run(module, Context(ctx.target, ctx.store))


def test_equal_runs_give_equal_modules(module: Module, ctx: Context) -> None:
    assert to_text(smoothed(module, ctx)) == to_text(smoothed(module, ctx))
    assert to_text(smoothed(module, ctx)) != to_text(smoothed(module, ctx, 0.5))


# ---- rounding -----------------------------------------------------------------------------------


def fake_quantize(x: Tensor, **attrs: float) -> Tensor:
    b, value = Builder(), Value(TensorType("f32", tuple(x.shape)), "x")
    b.emit("fake_quantize", value, **attrs)
    (found,) = run_op(b.ops[0], [x], {})
    return found


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_a_linear_is_integers_times_integers(bits: int) -> None:
    """What the interpreter computes, and what an engine does with int32 sums and two scales."""
    generator = torch.Generator().manual_seed(bits)
    x, w = torch.randn(7, 64, generator=generator), torch.randn(5, 64, generator=generator)
    top = 2 ** (bits - 1) - 1
    steps, scales = x.abs().amax(1, keepdim=True) / top, w.abs().amax(1) / top
    codes, weights = ((x / steps).round().long(), (w / scales[:, None]).round().long())
    assert int(codes.abs().max()) == top
    expected = (codes @ weights.T) * steps * scales
    found = fake_quantize(x, bits=bits) @ (weights * scales[:, None]).T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_static_step_cuts_off_what_stands_out() -> None:
    x = torch.tensor([[-9.0, -0.26, 0.0, 0.24, 0.5]])
    torch.testing.assert_close(
        fake_quantize(x, bits=3, scale=0.25), torch.tensor([[-0.75, -0.25, 0.0, 0.25, 0.5]])
    )
    assert torch.equal(fake_quantize(torch.zeros(2, 4), bits=8), torch.zeros(2, 4))


def test_static_steps_come_from_the_calibration_text(module: Module, ctx: Context) -> None:
    found = Pipeline((InsertKvCache(), QuantizeActivations("a6tensor"))).run(module, ctx)
    largest = float(inputs_at(module, ctx, "layers.1.down").abs().max())
    for function in found.functions.values():
        producers = function.producers()
        steps = {
            op.loc: producers[op.operands[0]].attrs["scale"]  # type: ignore[index]
            for op in function.ops
            if op.name == "linear" and op.loc != "head"
        }
        assert len(steps) == 14 and steps["layers.1.down"] == pytest.approx(largest / 31, rel=1e-4)
        assert steps["layers.0.q"] == steps["layers.0.v"]
        # o, down, and one for q, k, v and for gate, up each
        assert sum(op.name == "fake_quantize" for op in function.ops) == 8
    assert to_text(parse(to_text(found))) == to_text(found)


def test_smoothing_saves_static_integers(module: Module, ctx: Context) -> None:
    """One step for all channels is too coarse beside outliers; weights that have them are not hurt."""
    expected = inputs_at(module, ctx, "layers.0.q")

    def lost(module: Module) -> float:
        x = inputs_at(module, ctx, "layers.0.q")
        w = ctx.store.tensor(module.weights["layers.0.q.weight"].digest)
        y = fake_quantize(x, bits=8, scale=float(x.abs().max() / 127)) @ w.T
        return error(y, x @ w.T)

    assert expected.abs().amax(0).max() > 10 * expected.abs().amax(0).median()
    assert lost(smoothed(module, ctx)) < 0.3 * lost(module)
    exact = logits_of(module, ctx.store)
    errors = [
        error(logits_of(rounded(module, ctx, 8, "a8tensor", s), ctx.store), exact) for s in (True, False)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_eight_bits_are_nearly_exact_and_four_are_not(ctx: Context) -> None:
    module = llama(ctx.store)
    exact = logits_of(module, ctx.store)
    errors = {b: error(logits_of(rounded(module, ctx, b, f"a{b}"), ctx.store), exact) for b in (8, 6, 4)}
    assert errors[8] < 1e-3 and errors[8] < 0.2 * errors[6] and errors[6] < 0.2 * errors[4]


def test_formats_are_spelled_and_inputs_are_rounded_once(module: Module, ctx: Context) -> None:
    assert parse_activations("a8") == parse_activations("a8token")
    assert parse_activations("a4tensor").static and parse_activations("a4tensor").weights == "w4channel-sym"
    for wrong in ("8", "a9", "a1", "a8channel"):
        with pytest.raises(CompileError, match="no activation format"):
            parse_activations(wrong)
    once = QuantizeActivations().run(module, ctx)
    with pytest.raises(CompileError, match=r"layers.0.q: its input is quantized already"):
        QuantizeActivations().run(once, ctx)
    with pytest.raises(CompileError, match="quantize_activations needs calibration text"):
        QuantizeActivations("a8tensor").run(module, Context(ctx.target, ctx.store))


# ---- the artifact -------------------------------------------------------------------------------


@pytest.mark.parametrize(("activations", "bits"), [("a8", 8), ("a8tensor", 8), ("a6", 6), ("a4", 4)])
def test_the_artifact_computes_what_the_module_says(activations: str, bits: int, tmp_path: Path) -> None:
    store = WeightStore()
    module = quantized(decoder(Shape(), store), store, {"proj": f"w{bits}channel-sym"})
    if activations.endswith("tensor"):
        given = {n: 3.1 for n, w in module.weights.items() if w.attrs.get("role") == "block"}
        format_ = parse_activations(activations)
        module = round_inputs(module, format_, given)
    else:
        module = QuantizeActivations(activations).run(module, context(store))
    module = LegalizeOnnx().run(module, context(store))
    names = [op.name for op in module.functions["decode"].ops]
    assert names.count("fake_quantize") == 8, "q, k, v and gate, up are fused behind one rounding"
    emit(module, store, tmp_path)
    nodes = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node
    assert sum(n.op_type == "MatMulInteger" for n in nodes) == 8
    # float sums in another order may tip a few codes that lie between two, each by a step
    assert distance(module, tmp_path, store) < TIPPED / (2 ** (bits - 1) - 1)
    wanted = sum(w.type.numel() for w in module.weights.values() if w.attrs.get("role") == "block") * bits / 8
    embedding = 64 * 64 * 4
    stored = (tmp_path / "model.onnx.data").stat().st_size - embedding
    assert stored == pytest.approx(wanted, rel=0.1)


def test_other_emitters_refuse_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import gammac.passes

    monkeypatch.setattr(gammac.passes, "LEGALIZERS", {"onnx": LegalizeOnnx, "slow": LegalizeOnnx})
    default_pipeline(Choices(), "slow", compiler=True)
    with pytest.raises(CompileError, match="slow runs no activations of 8 bits") as caught:
        default_pipeline(Choices(activations="a8"), "slow", compiler=True)
    assert "onnx does" in str(caught.value)
    with pytest.raises(CompileError, match="no activation format"):
        default_pipeline(Choices(activations="int8"), "onnx", compiler=True)


def test_few_bits_need_one_scale_a_row() -> None:
    rows = Choices(block="w4channel-sym", activations="a4")
    assert default_pipeline(rows, "onnx", compiler=True)
    for choices, compiler in ((rows, False), (Choices(block="w4g64", activations="a4"), True)):
        with pytest.raises(CompileError, match="one scale a row") as caught:
            default_pipeline(choices, "onnx", compiler=compiler)
        assert "w4channel-sym" in str(caught.value)
    assert default_pipeline(Choices(activations="a8"), "onnx", compiler=False)


def test_where_the_pipeline_smooths_and_rounds() -> None:
    chosen = Choices(smooth_quant=True, smooth_alpha=0.7, activations="a8")
    passes = default_pipeline(chosen, "onnx", compiler=True)
    names = [p.name for p in passes]
    assert names.index("smooth_quant") < names.index("insert_kv_cache")
    assert names.index("quantize") < names.index("quantize_activations") < names.index("legalize_onnx")
    assert SmoothQuant(0.7) in passes and QuantizeActivations("a8") in passes


def test_a_model_without_such_norms_is_refused() -> None:
    module, ctx = raised("bert")
    with pytest.raises(CompileError, match="nothing can be smoothed") as caught:
        SmoothQuant().run(module, ctx)
    assert "--smooth-quant" in str(caught.value)
