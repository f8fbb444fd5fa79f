"""Calibration, candidates, scores and quantization, on a small module written by hand."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_module import VOCAB, llama

from gammac.cache import PassCache
from gammac.calibration import Stream, inputs_of, next_token_loss, run_segment, segments
from gammac.diagnostics import CompileError
from gammac.formats import Quantized, load_float, parse_format
from gammac.ir import Builder, Function, Module, Op, Operand, Value, rewrite, to_text, verify
from gammac.ir.interpret import run
from gammac.passes.candidates import Candidates
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.quantize import Quantize
from gammac.passes.sensitivity import STRATEGIES, Fisher
from gammac.pipeline import Context, Pipeline
from gammac.targets.target import load_target
from gammac.texts import Calibration
from gammac.weights import WeightStore

FORMATS = "w2g32+w4g32+w8g32"
DENSITIES = "s28w4g32+s48w4g32+s68w4g32"


def context(store: WeightStore, cache: Path | None = None, windows: int = 12, **options: Any) -> Context:
    tokens = torch.randint(0, VOCAB, (windows, 24), generator=torch.Generator().manual_seed(1))
    return Context(load_target("cpu-x86"), store, (), Calibration(tokens), cache=PassCache(cache), **options)


def scored(strategy: str = "fisher", store: WeightStore | None = None) -> tuple[Module, Context]:
    store = store or WeightStore()
    ctx = context(store)
    formats = FORMATS
    if strategy == "owl":  # which is about densities
        ctx, formats = replace(ctx, target=load_target("reference")), DENSITIES
    passes = (CollectGrams(), Candidates(formats, "w4g64+w8g64"), STRATEGIES[strategy]())
    return Pipeline(passes).run(llama(store), ctx), ctx


def test_segments_are_the_blocks() -> None:
    function = llama(WeightStore(), blocks=3).functions["forward"]
    found = segments(function)
    assert [s.name for s in found] == [
        "before the blocks", "block 0", "block 1", "block 2", "behind the blocks",
    ]  # fmt: skip
    assert sum(len(s.ops) for s in found) == len(function.ops)
    assert [v.type for v in found[1].live_in] == [v.type for v in found[2].live_in]


def test_grams_are_those_of_the_inputs() -> None:
    store = WeightStore()
    module, ctx = llama(store), context(store)
    found = CollectGrams().run(module, ctx)
    assert ctx.calibration is not None
    seen: dict[str, torch.Tensor] = {}
    stream = Stream(module.functions["forward"], ctx.calibration.tokens)
    stream.start()

    def visit(segment: object, weights: object, op: Any, tensors: list[torch.Tensor]) -> None:
        x = tensors[0].flatten(0, -2)
        if op.name == "linear":
            seen[op.weight().name] = seen.get(op.weight().name, 0) + x.T @ x

    for index in range(len(stream.segments)):
        run_segment(module, stream, store, visit, index)
    assert set(seen) == {n for n, w in found.weights.items() if "gram" in w.attrs}
    for name, total in seen.items():
        gram = store.tensor(str(found.weights[name].attrs["gram"]))
        torch.testing.assert_close(gram, total / (12 * 24), rtol=1e-4, atol=1e-5)
    q, k = (found.weights[f"layers.0.{p}.weight"].attrs["gram"] for p in "qk")
    assert q == k


def probed(function: Function, name: str) -> Function:
    """The function with a parameter added to what one linear puts out, and that linear's input returned."""
    (linear,) = (op for op in function.ops if op.weight() is not None and op.weight().name == name)  # type: ignore[union-attr]
    probe = Value(linear.result.type, "probe")

    def rule(builder: Builder, op: Op, operands: tuple[Operand, ...]) -> tuple[Value, ...] | None:
        if op is not linear:
            return None
        return (builder.emit("add", builder.emit("linear", *operands), probe),)

    wider = dataclasses.replace(
        function, returns=(*function.returns, linear.operands[0]), return_names=("logits", "input")
    )
    found = rewrite(wider, rule)
    return dataclasses.replace(found, params=(*found.params, probe))


@pytest.mark.parametrize("name", ["layers.0.q.weight", "layers.1.down.weight"])
def test_fisher_is_what_it_says(name: str) -> None:
    """Against plain autograd over the whole model."""
    module, ctx = scored()
    assert ctx.calibration is not None
    tokens, weight = ctx.calibration.tokens, module.weights[name]
    probe = torch.zeros(*tokens.shape, int(str(weight.type.shape[0])), requires_grad=True)
    inputs = {**inputs_of(module.functions["forward"], tokens), "probe": probe}
    found = run(
        probed(module.functions["forward"], name), inputs, lambda n: load_float(module.weights[n], ctx.store)
    )
    next_token_loss(found["logits"], tokens).backward()
    assert probe.grad is not None
    candidates: Any = weight.attrs["candidates"]
    scores: Any = weight.attrs["scores"]
    for format_, digest in candidates.items():
        candidate = Quantized(parse_format(format_), ctx.store.get(digest)).dequantize()
        delta = candidate - load_float(weight, ctx.store)
        change = torch.nn.functional.linear(found["input"].detach(), delta)
        expected = 0.5 * float((change * probe.grad).square().sum()) / tokens.numel()
        assert scores[format_] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_weight_gets_scores_that_fall_with_bits(strategy: str) -> None:
    module, _ = scored(strategy)
    assert verify(module) == []
    for weight in module.weights.values():
        if "role" in weight.attrs:
            scores: Any = weight.attrs["scores"]
            values = list(scores.values())
            assert scores.keys() == weight.attrs["candidates"].keys()  # type: ignore[union-attr]
            assert all(math.isfinite(v) and v >= 0 for v in values)
            assert values == sorted(values, reverse=True), weight.name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scores_are_the_same_every_time(strategy: str) -> None:
    assert to_text(scored(strategy)[0]) == to_text(scored(strategy)[0])


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Kill it in every block in turn: the end is the same, and finished blocks are not run again."""
    store = WeightStore(tmp_path / "weights")
    module = llama(store)
    whole = to_text(CollectGrams().run(module, context(store)))
    started: list[str] = []

    class Killed(Exception):
        pass

    def dying(at: int) -> Any:
        def progress(items: Sequence[Any], title: str) -> Iterator[Any]:
            for index, item in enumerate(items):
                if index == at:
                    raise Killed
                yield item

        return progress

    for at in (1, 2, 3):
        with pytest.raises(Killed):
            CollectGrams().run(module, context(store, tmp_path / "cache", progress=dying(at)))
    original = Stream.start
    Stream.start = lambda self: started.append("again")  # type: ignore[method-assign]
    try:
        again = CollectGrams().run(module, context(store, tmp_path / "cache"))
    finally:
        Stream.start = original  # type: ignore[method-assign]
    assert to_text(again) == whole
    assert not started, "the first segment was finished and must not run again"


def test_a_killed_run_whose_states_are_gone_makes_them_again(tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "weights")
    module, ctx = llama(store), context(store, tmp_path / "cache")
    whole = to_text(CollectGrams().run(module, context(store)))
    to_text(CollectGrams().run(module, ctx))
    records = sorted((tmp_path / "cache" / "records").rglob("*.json"), key=lambda p: p.stat().st_mtime_ns)
    for path in records[2:]:
        path.unlink()
    assert to_text(CollectGrams().run(module, ctx)) == whole


def test_two_processes_don_t_share_a_stream(tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "weights")
    module, ctx = llama(store), context(store, tmp_path / "cache")
    CollectGrams().run(module, ctx)
    assert not list((tmp_path / "cache" / "streams").iterdir()), "nothing is left behind"
    for path in (tmp_path / "cache" / "records").rglob("*.json"):
        path.unlink()
    original = Stream.start

    def start(self: Stream) -> None:
        (self.folder / "pid").write_text("1")
        original(self)
        with pytest.raises(CompileError, match="process 1 is calibrating"):
            CollectGrams().run(module, ctx)

    Stream.start = start  # type: ignore[method-assign]
    try:
        CollectGrams().run(module, ctx)
    finally:
        Stream.start = original  # type: ignore[method-assign]


def test_passes_are_remembered_by_content(tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "weights")
    ctx = context(store, tmp_path / "cache")
    steps: list[bool] = []
    passes = (CollectGrams(), Candidates(FORMATS, "w8g64"), Fisher(windows=4))
    for expected in (False, True):
        steps.clear()
        Pipeline(passes, (lambda s: steps.append(s.cached),)).run(llama(store), ctx)
        assert steps == [expected] * 3
    steps.clear()
    Pipeline((*passes[:2], Fisher(windows=6)), (lambda s: steps.append(s.cached),)).run(llama(store), ctx)
    assert steps == [True, True, False]
    # other calibration text: nothing that read it is found
    other = dataclasses.replace(ctx, calibration=context(store, windows=11).calibration)
    steps.clear()
    Pipeline(passes, (lambda s: steps.append(s.cached),)).run(llama(store), other)
    assert steps == [False] * 3


def test_a_damaged_cache_entry_is_computed_again(tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "weights")
    ctx = context(store, tmp_path / "cache")
    first = to_text(Pipeline((CollectGrams(),)).run(llama(store), ctx))
    for path in (tmp_path / "cache" / "modules").rglob("*.gir"):
        path.write_text(path.read_text()[:100])
    assert to_text(Pipeline((CollectGrams(),)).run(llama(store), ctx)) == first


def with_formats(module: Module, name: str) -> Module:
    return module.with_weights(
        *(w.with_attrs(format=name if w.attrs["role"] == "block" else "w8g64")
          for w in module.weights.values() if "role" in w.attrs)
    )  # fmt: skip


def loss(module: Module, ctx: Context) -> float:
    assert ctx.calibration is not None
    function, tokens = module.functions["forward"], ctx.calibration.tokens
    with torch.no_grad():
        logits = run(
            function, inputs_of(function, tokens), lambda n: load_float(module.weights[n], ctx.store)
        )
    return float(next_token_loss(logits["logits"], tokens))


def test_quantize_stores_the_candidates_that_were_scored() -> None:
    module, ctx = scored()
    done = Quantize().run(with_formats(module, "w4g32"), ctx)
    for name, weight in done.weights.items():
        if "role" in weight.attrs:
            candidates: Any = module.weights[name].attrs["candidates"]
            assert weight.digest == candidates[weight.attrs["stored"]]
            assert "candidates" not in weight.attrs and "scores" in weight.attrs
    assert abs(loss(done, ctx) - loss(module, ctx)) < 0.05 * loss(module, ctx)


def test_quantized_inputs_are_those_of_the_quantized_blocks() -> None:
    module, ctx = scored()
    allocated = with_formats(module, "w2g32")
    full, on_quantized = (Quantize(inputs=i).run(allocated, ctx) for i in ("full", "quantized"))
    same = [n for n, w in full.weights.items() if w.digest == on_quantized.weights[n].digest]
    assert "layers.1.down.weight" not in same
    assert all("stored" in w.attrs for w in on_quantized.weights.values() if "role" in w.attrs)


def test_mistakes_are_named() -> None:
    store = WeightStore()
    with pytest.raises(CompileError, match="needs calibration text"):
        CollectGrams().run(llama(store), dataclasses.replace(context(store), calibration=None))
    with pytest.raises(CompileError, match=r"weight.*has no candidates"):
        Pipeline((Fisher(),)).run(llama(store), context(store))
    with pytest.raises(CompileError, match="inputs is full or quantized"):
        Pipeline((Quantize(inputs="half"),)).run(with_formats(llama(store), "w4g32"), context(store))
    stock = dataclasses.replace(context(store), target=stock_only())
    with pytest.raises(CompileError, match=r"layers.0.q.weight: cpu-x86 runs none of w3g64"):
        Candidates("w3g64", "w8g64").formats_for(llama(store).weights["layers.0.q.weight"], stock)


def stock_only() -> Any:
    """A target with stock kernels only."""
    target = load_target("cpu-x86")
    return dataclasses.replace(target, kernels=tuple(k for k in target.kernels if not k.needs_compiler))
