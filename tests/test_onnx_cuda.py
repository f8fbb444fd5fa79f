"""ONNX artifacts for the CUDA provider. Its graphs run on the processor here, in the same types."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from onnx_models import Shape, cached_inputs, decoder, quantized

from gammac.backends import backend_of
from gammac.cli import main
from gammac.diagnostics import CompileError
from gammac.driver import Request, compile_model, make_plan
from gammac.formats import load_float, parse_format
from gammac.ir import Module
from gammac.ir.interpret import run
from gammac.notes import never_run
from gammac.passes import Choices
from gammac.passes.legalize_onnx import LegalizeOnnx
from gammac.pipeline import Context
from gammac.runtime import session as sessions
from gammac.runtime.cache import CPU_PROVIDER, CUDA_PROVIDER, NUMPY_TYPES
from gammac.targets.onnx.emit import emit, outer_name
from gammac.targets.target import BLOCK, TABLE, load_target, parse_target, target_names, target_text
from gammac.weights import WeightStore

GPUS = [name for name in target_names() if load_target(name).archs]
FORMATS = {"embed": "w8g64", "down": "w8g32", "": "w4g32"}
# keys, values and what is made of them have 11 bits
HALF = 2e-2


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Module, WeightStore, Path]:
    folder, store, target = tmp_path_factory.mktemp("cuda"), WeightStore(), load_target("cuda", "onnx")
    module = quantized(decoder(Shape(), store), store, FORMATS)
    module = LegalizeOnnx().run(module, Context(target, store))
    emit(module, store, folder, target=target)
    return module, store, folder


def types_of(session: ort.InferenceSession) -> set[str]:
    values = [*session.get_inputs(), *session.get_outputs()]
    return {v.type for v in values if v.name.startswith(("past", "present"))}


def test_the_cache_is_in_halves_and_the_rest_as_the_module_says(
    emitted: tuple[Module, WeightStore, Path],
) -> None:
    module, store, folder = emitted
    session = ort.InferenceSession(folder / "model.onnx", providers=[CPU_PROVIDER])
    assert types_of(session) == {"tensor(float16)"}
    dtypes = {v.name: NUMPY_TYPES[v.type] for v in session.get_inputs() if v.type in NUMPY_TYPES}
    worst, past, function = 0.0, 0, module.functions["decode"]
    for seq in (7, 1, 1, 3):
        inputs = cached_inputs(module, seq, past, 1)
        feed = {outer_name(n): t.numpy() for n, t in inputs.items() if n != "position_ids"}
        feed = {name: array.astype(dtypes.get(name, array.dtype)) for name, array in feed.items()}
        feed["attention_mask"] = np.ones((1, past + seq), np.int64)
        found = session.run([outer_name(n) for n in function.return_names], feed)
        expected = run(function, inputs, lambda n: load_float(module.weights[n], store))
        for array, tensor in zip(found, expected.values(), strict=True):
            worst = max(worst, float((torch.from_numpy(array).float() - tensor).std() / tensor.std()))
        past += seq
    assert 1e-6 < worst < HALF


def test_a_machine_without_cuda_says_so_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAMMAC_CACHE", str(tmp_path / "cache"))
    choices = Choices(block="w4g64", strategy="weight_mse", quantizer="rtn")
    plan = make_plan(Request("tiny", "cuda", "4", choices, backend="onnx"), tmp_path / "cache")
    compiled = compile_model(plan, tmp_path / "out")
    assert compiled.manifest.provider == "cuda"
    monkeypatch.setattr(sessions.ort, "get_available_providers", lambda: [CPU_PROVIDER])
    out = str(tmp_path / "out")
    run = CliRunner().invoke(main, ["run", out, "--prompt", "The", "--max-new-tokens", "2"])
    assert run.exit_code == 0 and "the processor runs it" in " ".join(run.stderr.split())
    bench = CliRunner().invoke(main, ["bench", out])
    assert bench.exit_code == 1 and "onnxruntime-gpu" in bench.stderr


def test_only_attention_is_in_halves(emitted: tuple[Module, WeightStore, Path]) -> None:
    _, _, folder = emitted
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    kinds = {node.op_type: node for node in graph.node}
    assert not any(a.name == "accuracy_level" for a in kinds["MatMulNBits"].attribute)
    halves = [n for n in graph.node if n.op_type == "Cast" and n.attribute[0].i == onnx.TensorProto.FLOAT16]
    attention = [n for n in graph.node if n.op_type == "GroupQueryAttention"]
    read = {name for node in attention for name in node.input}
    # q, k and v are one product; besides the two rotary tables, which all share
    assert {n.output[0] for n in halves} <= read and len(halves) == len(attention) + 2


def test_genai_is_told_the_provider(emitted: tuple[Module, WeightStore, Path]) -> None:
    config = json.loads((emitted[2] / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]


@pytest.mark.parametrize(
    ("wanted", "there", "found"),
    [
        ("cuda", [CUDA_PROVIDER, CPU_PROVIDER], [CUDA_PROVIDER, CPU_PROVIDER]),
        ("cuda", [CPU_PROVIDER], [CPU_PROVIDER]),
        ("cpu", [CUDA_PROVIDER, CPU_PROVIDER], [CPU_PROVIDER]),
    ],
)
def test_the_provider_is_taken_where_it_is(
    wanted: str, there: list[str], found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions.ort, "get_available_providers", lambda: there)
    assert sessions.providers_for(wanted) == found


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_figures_for_it(name: str) -> None:
    target = load_target(name, "onnx")
    assert target.provider == "cuda" and not target.last_logits
    for text, runs in (
        ("w4g64", True),
        ("w8g128", True),
        ("w3g64", False),
        ("w2g64", False),
        ("nf4g64", False),
    ):
        for role in (BLOCK, TABLE):
            assert (target.kernel_for(parse_format(text), role, 1024) is not None) == runs


def test_what_it_refuses(tmp_path: Path) -> None:
    target = load_target("cuda", "onnx")
    with pytest.raises(CompileError, match="CUDA's operators multiply floats"):
        backend_of(target, tmp_path, product_inputs="int8")
    assert backend_of(target, tmp_path).activations == "float"
    text = target_text("cuda").replace('provider = "cuda"', 'provider = "rocm"')
    with pytest.raises(CompileError, match="provider is cpu or cuda, not 'rocm'"):
        parse_target(text, "own.toml", "onnx")


def test_a_listed_format_that_no_weight_can_have_is_named(tmp_path: Path) -> None:
    choices = Choices(block="w3g64+w4g64+w8g64", strategy="weight_mse")
    plan = make_plan(Request("tiny", "cuda", "5", choices, backend="onnx"), tmp_path)
    assert list(never_run(choices, plan.target, plan.module, compiler=True)) == ["w3g64"]
    assert list(never_run(Choices(), plan.target, plan.module, compiler=True)) == []
