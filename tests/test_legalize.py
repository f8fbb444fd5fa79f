"""Legalization for ONNX and the splitting of rows: the same numbers, in the shapes that are emitted."""

from dataclasses import replace

import pytest
import torch
from onnx_models import Shape, cached_inputs, decoder, quantized

from gammac.diagnostics import CompileError
from gammac.formats import load_float
from gammac.ir import Module, verify
from gammac.ir.interpret import run
from gammac.passes.fuse_parallel_linears import FuseParallelLinears
from gammac.passes.legalize_onnx import LegalizeOnnx
from gammac.passes.legalize_tvm import LegalizeTvm
from gammac.passes.split_rows import SplitRows
from gammac.pipeline import Context
from gammac.targets.target import load_target
from gammac.weights import WeightStore

MIXED = {"k_proj": "w3g32", "embed": "w8g32", "down": "w2g64-sym", "": "w4g32"}
SHAPES = {
    "llama": Shape(),
    "qk_norm": Shape(qk_norm=True, window=3),
    "bias": Shape(bias=True, tied=False),
    "partial_rotary": Shape(dim=32, rotary=16, softcap=5.0),
    "odd_rotary": Shape(rotary=8),
    "odd_heads": Shape(dim=12, rotary=12),
}


def context(store: WeightStore) -> Context:
    return Context(load_target("cpu-x86"), store)


def same_numbers(before: Module, after: Module, store: WeightStore, atol: float = 1e-5) -> None:
    assert not verify(after)
    for seq, past in ((6, 0), (1, 6), (3, 7)):
        inputs = cached_inputs(before, seq, past)
        expected, found = (
            run(m.functions["decode"], inputs, lambda n, m=m: load_float(m.weights[n], store))  # type: ignore[misc]
            for m in (before, after)
        )
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=atol, rtol=1e-5)


def names(module: Module) -> list[str]:
    return [op.name for op in module.functions["decode"].ops]


@pytest.mark.parametrize("formats", [{}, MIXED], ids=["float", "mixed"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_legalized_module_gives_the_same_numbers(shape: Shape, formats: dict[str, str]) -> None:
    store = WeightStore()
    module = quantized(decoder(shape, store), store, formats)
    same_numbers(module, LegalizeOnnx().run(module, context(store)), store)


def test_what_becomes_of_a_llama_block() -> None:
    store = WeightStore()
    legal = LegalizeOnnx().run(quantized(decoder(Shape(), store), store, {"": "w4g32"}), context(store))
    block = ["rms_norm", "linear", "gqa", "linear", "residual_add"]
    block += ["rms_norm", "linear", "split", "silu", "mul", "linear", "residual_add"]
    assert names(legal) == ["embedding", *block, *block, "rms_norm", "linear"]
    assert "model.layers.0.attn.q_proj-k_proj-v_proj.weight" in legal.weights
    fused = legal.weights["model.layers.0.mlp.gate_proj-up_proj.weight"]
    assert fused.attrs["parts"] == tuple(f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up"))
    assert fused.attrs["stored"] == fused.attrs["format"] == "w4g32"


@pytest.mark.parametrize(("shape", "kept"), [("odd_rotary", "rope"), ("odd_heads", "attention")])
def test_what_the_runtime_has_no_operator_for_stays(shape: str, kept: str) -> None:
    store = WeightStore()
    legal = LegalizeOnnx().run(decoder(SHAPES[shape], store), context(store))
    assert kept in names(legal) and ("gqa" in names(legal)) == (kept == "rope")


def test_weights_stored_differently_are_not_fused() -> None:
    store = WeightStore()
    module = quantized(decoder(Shape(), store), store, {"k_proj": "w3g32", "": "w4g32"})
    fused = FuseParallelLinears().run(module, context(store))
    assert "model.layers.0.attn.q_proj-v_proj.weight" in fused.weights
    assert "model.layers.0.attn.k_proj.weight" in fused.weights


@pytest.mark.parametrize("parts", [2, 3])
def test_split_rows_gives_the_same_numbers(parts: int) -> None:
    store = WeightStore()
    module = decoder(Shape(bias=True), store)
    cut = SplitRows(parts).run(module, context(store))
    same_numbers(module, cut, store)
    halves = [w for n, w in cut.weights.items() if n.startswith("model.layers.0.mlp.up_proj.weight.")]
    assert [w.attrs for w in halves] == [{"role": "block", "part": i} for i in range(parts)]
    assert sum(w.type.numel() for w in halves) == 128 * 64


def test_split_rows_mixes_widths_and_is_undone_where_it_does_not() -> None:
    store = WeightStore()
    cut = SplitRows().run(decoder(Shape(bias=True), store), context(store))
    mixed = quantized(cut, store, {"part0": "w2g64", "": "w4g32"})
    same_numbers(mixed, LegalizeOnnx().run(mixed, context(store)), store)
    alike = quantized(cut, store, {"": "w4g32"})
    legal = LegalizeOnnx().run(alike, context(store))
    same_numbers(alike, legal, store)
    assert "concat" not in names(legal)


def test_split_rows_comes_before_quantize() -> None:
    store = WeightStore()
    module = quantized(decoder(Shape(), store), store, {"": "w4g32"})
    with pytest.raises(CompileError, match=r"q_proj.*quantized already"):
        SplitRows().run(module, context(store))
    with pytest.raises(CompileError, match="parts"):
        SplitRows(1).run(module, context(store))


def test_the_module_before_is_left_alone() -> None:
    store = WeightStore()
    module = decoder(Shape(), store)
    copy = replace(module)
    LegalizeOnnx().run(module, context(store))
    assert module.functions == copy.functions and module.weights == copy.weights


def test_tvm_computes_the_same_with_gates_apart() -> None:
    store = WeightStore()
    module = quantized(decoder(Shape(dim=12, rotary=10, bias=True), store), store, {"": "w4g32"})
    legal = LegalizeTvm().run(module, context(store))
    same_numbers(module, legal, store)
    linears = [op.operands[1].name for op in legal.functions["decode"].ops if op.name == "linear"]  # type: ignore[union-attr]
    assert "model.layers.0.attn.q_proj-k_proj-v_proj.weight" in linears
    assert {f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up")} <= set(linears)
    # heads of any size are raised, where ONNX Runtime's kernel asks for multiples
    assert names(legal).count("gqa") == 2 and "gqa" not in names(LegalizeOnnx().run(module, context(store)))


def test_a_context_is_what_was_asked_for() -> None:
    store = WeightStore()
    module = decoder(Shape(), store).with_attrs(max_positions=4096)
    found = [kind(n).run(module, context(store)).attrs["max_positions"]
             for kind in (LegalizeOnnx, LegalizeTvm) for n in (0, 64)]  # fmt: skip
    assert found == [4096, 64, 2048, 64]
