"""Guided Gram matrices, against gradients taken through the whole module at once."""

import pytest
import torch
from llama_module import VOCAB, llama
from torch import Tensor

from gammac.calibration import inputs_of, next_token_loss
from gammac.diagnostics import CompileError
from gammac.ir import Module, WeightRef
from gammac.ir.interpret import Env, bind, run_op
from gammac.passes import Choices, default_pipeline
from gammac.passes.candidates import Candidates
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.collect_guided_grams import CollectGuidedGrams
from gammac.passes.quantizers import output_error
from gammac.passes.sensitivity.scores import candidate
from gammac.pipeline import Context, Pipeline
from gammac.targets.target import load_target
from gammac.texts import Calibration
from gammac.weights import WeightStore

TOKENS = torch.randint(0, VOCAB, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ctx() -> Context:
    return Context(load_target("cpu-x86"), WeightStore(), (), Calibration(TOKENS))


@pytest.fixture(scope="module")
def module(ctx: Context) -> Module:
    return llama(ctx.store)


def input_and_gradient(module: Module, ctx: Context, loc: str) -> tuple[Tensor, Tensor]:
    """x and ∂L/∂y of the linear at `loc`, L the summed cross entropy; [tokens, features] both."""
    function = module.functions["forward"]
    found, sizes = bind(function, inputs_of(function, TOKENS))
    env: Env = dict(found)
    x = y = torch.empty(0)
    for op in function.ops:
        operands = [
            ctx.store.tensor(module.weights[o.name].digest) if isinstance(o, WeightRef) else env[o]
            for o in op.operands
        ]
        results = run_op(op, operands, sizes)
        if op.name == "linear" and op.loc == loc:
            x, y = operands[0], results[0].detach().requires_grad_()
            results = (y,)
        env.update(zip(op.results, results, strict=True))
    logits = env[function.ops[-1].result]
    (gradient,) = torch.autograd.grad(next_token_loss(logits, TOKENS), y)
    return x.detach().flatten(0, -2), gradient.flatten(0, -2)


@pytest.mark.parametrize(
    "shared", [("layers.0.q", "layers.0.k", "layers.0.v"), ("layers.1.down",), ("head",)]
)
def test_tokens_count_by_the_gradient(module: Module, ctx: Context, shared: tuple[str, ...]) -> None:
    weight = torch.zeros(TOKENS.numel())
    for loc in shared:
        x, gradient = input_and_gradient(module, ctx, loc)
        weight += gradient.square().mean(-1)
    expected = (x.T * weight) @ x / weight.sum()
    found = CollectGuidedGrams().run(module, ctx)
    for loc in shared:
        name = "embed.weight" if loc == "head" else f"{loc}.weight"
        gram = ctx.store.tensor(str(found.weights[name].attrs["gram"]))
        torch.testing.assert_close(gram, expected, rtol=1e-3, atol=1e-6)


def test_the_same_weights_have_matrices_and_tokens_differ(module: Module, ctx: Context) -> None:
    plain, guided = CollectGrams().run(module, ctx), CollectGuidedGrams().run(module, ctx)
    for name, weight in plain.weights.items():
        assert ("gram" in weight.attrs) == ("gram" in guided.weights[name].attrs)
        assert "gram" not in weight.attrs or weight.attrs["gram"] != guided.weights[name].attrs["gram"]


def test_candidates_lose_less_where_it_matters(module: Module, ctx: Context) -> None:
    """By the guided measure guided candidates beat plain ones, on the whole."""
    make = Candidates("w2g32", "w8g32")
    plain = Pipeline((CollectGrams(), make)).run(module, ctx)
    guided = Pipeline((CollectGuidedGrams(), make)).run(module, ctx)
    lost = {"plain": 0.0, "guided": 0.0}
    for name, weight in guided.weights.items():
        if weight.attrs.get("role") != "block":
            continue
        gram, w = ctx.store.tensor(str(weight.attrs["gram"])), ctx.store.tensor(weight.digest)
        for how, found in (("plain", plain), ("guided", guided)):
            lost[how] += output_error(w, candidate(found.weights[name], "w2g32", ctx), gram)
    assert lost["guided"] < 0.97 * lost["plain"]


def test_only_full_inputs_have_gradients() -> None:
    with pytest.raises(CompileError, match="guided needs its inputs"):
        default_pipeline(Choices(guided=True, inputs="quantized"), "onnx", compiler=True)
    names = [p.name for p in default_pipeline(Choices(guided=True), "onnx", compiler=True)]
    assert "collect_guided_grams" in names and "collect_grams" not in names
    assert "collect_guided_grams" not in [
        p.name for p in default_pipeline(Choices(guided=True, quantizer="rtn"), "onnx", compiler=True)
    ]


def test_text_is_needed(module: Module, ctx: Context) -> None:
    with pytest.raises(CompileError, match="needs calibration text"):
        CollectGuidedGrams().run(module, Context(ctx.target, ctx.store))
