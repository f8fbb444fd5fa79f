"""Dual binary weights from end to end: learnt, priced, packed, run, and refused where they can't be."""

from pathlib import Path

import onnx
import pytest
import torch
from llama_module import VOCAB, llama
from onnx_models import Shape, decoder
from test_onnx import EXACT, ROUNDED, Build, distance, needs_compiler
from test_onnx import build as build  # a fixture
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import DualBinaryFormat, Quantized, parse_format
from gammac.ir import Module
from gammac.passes import Choices, default_pipeline
from gammac.passes.allocate import Allocate
from gammac.passes.candidates import Candidates
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.finetune import LearnRounding
from gammac.passes.finetune.latents import Latents, latents_of
from gammac.passes.legalize_onnx import LegalizeOnnx
from gammac.passes.quantize import stored_as
from gammac.passes.quantizers import make_quantizer
from gammac.passes.sensitivity import WeightMse
from gammac.pipeline import Context, Pipeline
from gammac.targets import cost
from gammac.targets.onnx.emit import emit
from gammac.targets.target import load_target
from gammac.texts import Calibration
from gammac.weights import WeightStore


def chosen(weight: Tensor, name: str) -> Quantized:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, weight.shape[1], generator=generator)
    (found,) = make_quantizer("db_llm").quantize(weight, x.T @ x / 200, [parse_format(name)])
    return found


# ---- learnt -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fdb2g32", "fdb2channel"])
def test_latents_begin_at_the_quantizers_codes(name: str) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    start = chosen(weight, name)
    assert bool((start.scales[..., 0] < 0).any() and (start.scales[..., 0] > 0).any()), "both orders"
    found = latents_of(weight, start).quantized()
    assert all(torch.equal(found.parts[n], start.parts[n]) for n in start.parts)


def moved(latents: Latents, target: Tensor, rate: float, scale_rate: float) -> Quantized:
    """After 200 steps towards a target."""
    for step in range(200):
        left = 1 - step / 200
        latents.move(2 * (latents.quantized().dequantize() - target), rate * left, scale_rate * left)
    return latents.quantized()


def test_steps_find_other_codes() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    start = chosen(weight, "fdb2g32")
    format_ = start.format
    assert isinstance(format_, DualBinaryFormat)
    wanted = (format_.codes_of(start.parts) + 1).clamp(max=3)
    target = format_.quantized(wanted, start.scales).dequantize()
    found = moved(latents_of(weight, start), target, 0.03, 0.0)
    assert torch.equal(format_.codes_of(found.parts), wanted) and torch.equal(found.scales, start.scales)


def test_steps_find_other_scales_in_order() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    start = chosen(weight, "fdb2g32")
    planes = [start.parts[name].float().reshape(16, 2, 32) for name in ("first", "second")]
    scales = start.scales.float() * torch.tensor([1.1, 0.8])
    target = sum(s[..., None] * p for s, p in zip(scales.unbind(-1), planes, strict=True)).reshape(16, 64)
    found = moved(latents_of(weight, start), target, 0.0, 0.004)
    assert torch.allclose(found.scales.float(), scales, rtol=0.01)
    far = moved(latents_of(weight, start), -target, 0.0, 0.02).scales.float()
    assert bool((far.prod(-1) < 0).all() and (far[..., 1].abs() < far[..., 0].abs()).all())


def test_trained_planes_lose_less_than_a_trained_2_bit_grid() -> None:
    store = WeightStore()
    tokens = torch.randint(0, VOCAB, (64, 24), generator=torch.Generator().manual_seed(1))
    ctx = Context(load_target("cpu-x86"), store, (), Calibration(tokens))
    rounding = {}
    for quantizer, name in (("gptq", "w2g32-sym"), ("db_llm", "fdb2g32")):
        candidates = Candidates(name, "w8g32", quantizer)
        passes = (CollectGrams(), candidates, WeightMse(), Allocate(budget="2", tie=False))
        module = Pipeline((*passes, LearnRounding(steps=60))).run(llama(store), ctx)
        rounding[name] = module.attrs["rounding"]
    grid, planes = rounding["w2g32-sym"], rounding["fdb2g32"]
    assert isinstance(grid, dict) and isinstance(planes, dict)
    assert planes["after"] < 0.98 * planes["before"], "training is worth it"
    assert planes["after"] < 0.9 * grid["after"] < grid["before"]


# ---- packed -------------------------------------------------------------------------------------


def legal(shape: Shape, name: str, store: WeightStore) -> Module:
    """A decoder with all block linears in a format."""
    module = decoder(shape, store)
    for weight in module.weights.values():
        if weight.attrs.get("role") == "block":
            q = chosen(store.tensor(weight.digest), name)
            weight = weight.with_attrs(format=q.format.name)
            module = module.with_weights(stored_as(weight, q.format.name, store.put(q.parts), 0.0))
    return LegalizeOnnx().run(module, Context(load_target("cpu-x86"), store))


@needs_compiler
@pytest.mark.parametrize("shape", [Shape(), Shape(bias=True)], ids=["plain", "bias"])
def test_the_sum_of_two_products_matches(shape: Shape, tmp_path: Path, build: Build) -> None:
    store = WeightStore()
    module = legal(shape, "fdb2g64", store)
    emit(module, store, tmp_path, target=load_target("cpu-x86"), build=build)
    assert 1e-5 < distance(module, tmp_path, store) < ROUNDED


@pytest.mark.parametrize("name", ["fdb2g32", "fdb2channel"])
def test_it_is_exact_without_the_library(name: str, tmp_path: Path) -> None:
    store = WeightStore()
    module = legal(Shape(hidden=96, ffn=160, layers=1), name, store)
    emit(module, store, tmp_path, compiler=False)
    assert distance(module, tmp_path, store) < EXACT


def test_bits_on_disk_are_the_formats(tmp_path: Path) -> None:
    store, cpu = WeightStore(), load_target("cpu-x86")
    module = legal(Shape(vocab=32, hidden=256, ffn=512, dim=64, rotary=64, layers=1), "fdb2g64", store)
    emit(module, store, tmp_path, compiler=False)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    sizes = {
        t.name: int(next(e.value for e in t.external_data if e.key == "length"))
        for t in graph.initializer
        if t.external_data
    }
    for weight in module.weights.values():
        if "stored" in weight.attrs:
            format_ = parse_format(str(weight.attrs["stored"]))
            found = sum(size for name, size in sizes.items() if name.startswith(f"{weight.name}."))
            rows, columns = (int(str(d)) for d in weight.type.shape)
            assert 8 * found == pytest.approx(format_.storage_bits(rows, columns), rel=0.01)
            assert found == cost.stored_bytes(rows, columns, format_, cpu)
            assert weight.name not in sizes and sizes, "no floats beside the planes"


def test_two_products_take_twice_as_long() -> None:
    cpu = load_target("cpu-x86")
    two, one = (
        cost.linear_seconds(4096, 4096, parse_format(name), cpu, 512) for name in ("fdb2g64", "w1g64-sym")
    )
    assert 1.8 < two / one <= 2.01


# ---- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (Choices("fdb2g64", quantizer="gptq"), r"gptq does not write fdb2g64(.|\n)*--quantizer db_llm does"),
        (Choices("w2g64", quantizer="db_llm"), r"db_llm does not write w2g64(.|\n)*rtn or gptq"),
        (Choices("w2g64", table="nf4g64"), ""),
        (Choices("w2g64", table="fdb2g64"), "gptq does not write fdb2g64"),
        (
            Choices("pb2g64", quantizer="pb_llm", learn_rounding=True),
            "does not learn pb2g64",
        ),
        (Choices("fdb2g64", quantizer="db_llm", learn_rounding=True), ""),
    ],
)
def test_quantizers_write_their_own_formats_only(choices: Choices, said: str) -> None:
    if not said:
        assert default_pipeline(choices, "onnx", compiler=True)
        return
    with pytest.raises(CompileError, match=said):
        default_pipeline(choices, "onnx", compiler=True)
