"""The ONNX emitter: ONNX Runtime against the interpreter, what is on disk, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx_models import Shape, cached_inputs, decoder, quantized

from gammac.diagnostics import CompileError
from gammac.formats import CHANNEL, Format, load_float, parse_format
from gammac.ir import Module
from gammac.ir.interpret import run
from gammac.passes.legalize_onnx import LegalizeOnnx
from gammac.passes.quantize_activations import QuantizeActivations
from gammac.pipeline import Context
from gammac.targets.onnx.any_bits import build_library, find_compiler
from gammac.targets.onnx.emit import emit, emitted_function, outer_name
from gammac.targets.onnx.kernels import ANY_BITS, NBITS, kernel_for
from gammac.targets.target import BLOCK, load_target, target_names
from gammac.weights import WeightStore

Build = Callable[[Path], Path]

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

# floats: 1e-4 of the logits' deviation. Codes: activations are rounded to 8 bits by block, which on
# these narrow random layers moves the logits by 1 to 2 % of their deviation
EXACT, ROUNDED = 1e-4, 4e-2
W4 = {"": "w4g32"}
STOCK = {"embed": "w8g64", "down": "w2g64", "o_proj": "w4g16-sym", "": "w4g32"}
MIXED = {
    "embed": "w8g64",
    "k_proj": "w3g32-sym",
    "down": "w2g64",
    "gate": "w6channel",
    "o_proj": "w8g16",
    "": "w3g32",
}


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Puts the operator library into a folder, compiled once for all tests."""
    library = build_library(tmp_path_factory.mktemp("library"))
    return lambda folder: Path(shutil.copy(library, folder))


def legal(shape: Shape, formats: dict[str, str], store: WeightStore) -> Module:
    module = quantized(decoder(shape, store), store, formats)
    return LegalizeOnnx().run(module, Context(load_target("cpu-x86"), store))


def open_model(folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    for library in folder.glob("libgammac_op.*"):
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(folder / "model.onnx", options)


def distance(module: Module, folder: Path, store: WeightStore, batch: int = 1) -> float:
    """The largest deviation of any result in units of its own spread, over a prefill and some steps."""
    session, function = open_model(folder), emitted_function(module)
    worst, past = 0.0, 0
    for seq in (7, 1, 1, *((3, 1) if batch == 1 else ())):
        inputs = cached_inputs(module, seq, past, batch)
        feed = {outer_name(n): t.numpy() for n, t in inputs.items() if n != "position_ids"}
        feed["attention_mask"] = np.ones((batch, past + seq), np.int64)
        found = session.run([outer_name(n) for n in function.return_names], feed)
        expected = run(function, inputs, lambda n: load_float(module.weights[n], store))
        for array, tensor in zip(found, expected.values(), strict=True):
            assert array.shape == tuple(tensor.shape)
            worst = max(worst, float((torch.from_numpy(array) - tensor).std() / tensor.std()))
        past += seq
    return worst


SHAPES = {
    "llama": Shape(),
    "window_softcap_qk_norm": Shape(window=4, softcap=5.0, qk_norm=True),
    "bias_untied": Shape(bias=True, tied=False),
    "partial_rotary": Shape(dim=32, rotary=16),
    "odd_rotary": Shape(rotary=8),
    "no_gqa": Shape(dim=12, rotary=12, window=3, softcap=4.0),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float_models_are_exact(shape: Shape, batch: int, tmp_path: Path) -> None:
    store = WeightStore()
    module = legal(shape, {}, store)
    emit(module, store, tmp_path)
    assert distance(module, tmp_path, store, batch) < EXACT


@pytest.mark.parametrize("formats", [W4, STOCK], ids=["w4", "stock"])
def test_stock_kernels_match(formats: dict[str, str], tmp_path: Path) -> None:
    store = WeightStore()
    module = legal(Shape(), formats, store)
    files = emit(module, store, tmp_path)
    assert [f.name for f in files] == ["model.onnx", "model.onnx.data", "genai_config.json"]
    assert 1e-5 < distance(module, tmp_path, store) < ROUNDED


@needs_compiler
@pytest.mark.parametrize("formats", [MIXED, {"": "w3g32"}, {"": "w5channel"}], ids=["mixed", "w3", "w5"])
def test_any_width_matches_with_the_library(formats: dict[str, str], tmp_path: Path, build: Build) -> None:
    store = WeightStore()
    module = legal(Shape(), formats, store)
    files = emit(module, store, tmp_path, build=build)
    assert len(files) == 4 and files[2].name in (tmp_path / "genai_config.json").read_text()
    assert 1e-5 < distance(module, tmp_path, store) < ROUNDED


@needs_compiler
def test_rounded_activations_match_in_groups(tmp_path: Path, build: Build) -> None:
    """The kernel rounds what is rounded already once more, to 8 bits by block."""
    store, ctx = WeightStore(), Context(load_target("cpu-x86"))
    module = quantized(decoder(Shape(), store), store, MIXED)
    module = LegalizeOnnx().run(QuantizeActivations("a8").run(module, ctx), replace(ctx, store=store))
    emit(module, store, tmp_path, build=build)
    assert distance(module, tmp_path, store) < ROUNDED


@pytest.mark.parametrize("name", ["w3g32", "w5g64-sym", "w1g32", "w7channel"])
def test_any_width_is_exact_without_the_library(name: str, tmp_path: Path) -> None:
    store = WeightStore()
    module = legal(Shape(layers=1), {"": name}, store)
    files = emit(module, store, tmp_path, compiler=False)
    assert len(files) == 3
    assert distance(module, tmp_path, store) < EXACT


def test_rows_of_a_multiple_of_32(tmp_path: Path) -> None:
    # 96 inputs: no group of 64 fits, packed rows end in the middle of a chunk
    store = WeightStore()
    module = legal(Shape(hidden=96, ffn=160, layers=1), {"": "w3g96"}, store)
    emit(module, store, tmp_path, compiler=False)
    assert distance(module, tmp_path, store) < EXACT


@needs_compiler
def test_the_target_says_which_operator(tmp_path: Path, build: Build) -> None:
    target = load_target("cpu-x86")
    rows = (replace(k, groups=(32,)) for k in target.kernels if k.op == ANY_BITS)
    ours = replace(target, kernels=(*rows, *target.kernels))
    store = WeightStore()
    module = legal(Shape(), W4, store)
    for compiler, kinds in ((True, {ANY_BITS + "Zeros", NBITS}), (False, {NBITS})):
        emit(module, store, tmp_path, target=ours, compiler=compiler, build=build)
        nodes = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node
        assert {n.op_type for n in nodes if "MatMul" in n.op_type} == kinds
        assert distance(module, tmp_path, store) < ROUNDED


def test_rows_of_a_batch_may_differ_in_length(tmp_path: Path) -> None:
    store = WeightStore()
    module = legal(Shape(), {}, store)
    emit(module, store, tmp_path)
    session, lengths = open_model(tmp_path), (7, 4)
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
    cache = {outer_name(n): t.numpy() for n, t in cached_inputs(module, 1, 0, 2).items() if "past" in n}
    first = session.run(None, {"input_ids": ids[:, :7].numpy(), "attention_mask": mask, **cache})
    cache = dict(zip(cache, first[1:], strict=True))
    longer = np.concatenate([mask, np.ones((2, 1), np.int64)], 1)
    then = session.run(None, {"input_ids": ids[:, 7:].numpy(), "attention_mask": longer, **cache})
    for row, length in enumerate(lengths):
        tokens = torch.cat([ids[row, :length], ids[row, 7:]])
        expected = logits_of(module, store, tokens.tolist())
        found = np.concatenate([first[0][row, :length], then[0][row]])
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4 * float(expected.std()))


# ---- on disk ------------------------------------------------------------------------------------


def test_same_module_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        store, folder = WeightStore(), tmp_path / name
        folder.mkdir()
        files = emit(legal(Shape(), MIXED, store), store, folder, compiler=False)
        contents.append([f.read_bytes() for f in files])
    assert contents[0] == contents[1]


def test_weights_take_their_true_bits(tmp_path: Path) -> None:
    store = WeightStore()
    shape = Shape(vocab=1024, hidden=256, ffn=512, dim=64, rotary=64)
    module = legal(shape, {"embed": "w8g64", "down": "w3g64", "": "w4g64"}, store)
    emit(module, store, tmp_path, compiler=False)
    stored = [w for w in module.weights.values() if "stored" in w.attrs]
    bits = sum(_format(w.attrs["stored"]).storage_bits(*_sizes(w.type.shape)) for w in stored)
    rest = sum(w.type.numel() * 4 for w in module.weights.values() if w not in stored)
    size = (tmp_path / "model.onnx.data").stat().st_size
    assert bits / 8 + rest <= size < bits / 8 * 1.02 + rest


def _format(name: object) -> Format:
    return parse_format(str(name))


def _sizes(shape: tuple[object, ...]) -> tuple[int, int]:
    rows, columns = shape
    assert isinstance(rows, int) and isinstance(columns, int)
    return rows, columns


def test_the_graph_is_what_others_can_read(tmp_path: Path) -> None:
    store = WeightStore()
    emit(legal(Shape(), MIXED, store), store, tmp_path, compiler=False)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert {o.domain: o.version for o in model.opset_import} == {"": 23, "com.microsoft": 1, "gammac": 1}
    assert model.ir_version == 10
    names = [i.name for i in model.graph.input]
    assert names[:4] == ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]
    assert [o.name for o in model.graph.output][:3] == ["logits", "present.0.key", "present.0.value"]
    logits = model.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in logits] == ["batch", "seq", 64]
    # nodes say which module they come from; a tied table is stored once
    assert any(n.name == "model.layers.1.mlp.down_proj/MatMulNBits" for n in model.graph.node)
    assert sum(i.name.startswith("model.embed") for i in model.graph.initializer) == 3
    offsets = [e.value for i in model.graph.initializer for e in i.external_data if e.key == "offset"]
    assert all(int(offset) % 64 == 0 for offset in offsets)


# ---- what it refuses ----------------------------------------------------------------------------


def test_a_format_without_a_kernel_is_named(tmp_path: Path) -> None:
    store = WeightStore()
    module = legal(Shape(), {"down": "w3g16", "": "w4g32"}, store)
    with pytest.raises(CompileError, match=r"layers\.0\.mlp\.down_proj: .*w3g16[^$]*groups of 32"):
        emit(module, store, tmp_path)


def test_kernels() -> None:
    cases = {
        "w4g64": NBITS, "w8g16": NBITS, "w2g128-sym": NBITS, "w2g32": ANY_BITS, "w2g256": ANY_BITS,
        "w3g64": ANY_BITS, "w4g96": ANY_BITS, "w4channel": ANY_BITS, "w3g16": None, "w2g16": None,
    }  # fmt: skip
    assert {name: kernel_for(parse_format(name), 768) for name in cases} == cases


@pytest.mark.parametrize("name", target_names())
def test_targets_list_only_what_is_emitted(name: str) -> None:
    target = load_target(name)
    if target.emitter != "onnx":
        pytest.skip("another emitter")
    for format_ in target.formats(BLOCK, 768, compiler=True):
        row = target.kernel_for(format_, BLOCK, 768)
        assert row is not None
        assert row.op == kernel_for(format_, 768) or (row.op == ANY_BITS and format_.group % 32 == CHANNEL)


# ---- onnxruntime-genai --------------------------------------------------------------------------


def test_genai_config(tmp_path: Path) -> None:
    store = WeightStore()
    emit(legal(Shape(), W4, store).with_attrs(eos=(2, 5), bos=1), store, tmp_path)
    config = json.loads((tmp_path / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is True
    model = config["model"]
    assert (model["eos_token_id"], model["bos_token_id"], model["context_length"]) == ([2, 5], 1, 128)
    kept = {k: v for k, v in model["decoder"].items() if isinstance(v, int)}
    assert kept == {
        "head_size": 16, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2,
    }  # fmt: skip
    assert "custom_ops_library" not in model["decoder"]["session_options"]


@pytest.mark.parametrize("shape", [Shape(), Shape(dim=12, rotary=12)], ids=["shared", "growing"])
def test_genai_writes_what_the_interpreter_writes(shape: Shape, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    store, tokens = WeightStore(), [3, 14, 15, 9, 2]
    module = legal(shape, {}, store)
    expected = greedy(module, store, tokens, 12)
    never = next(token for token in range(64) if token not in expected)
    emit(module.with_attrs(eos=(never,)), store, tmp_path)
    parameters = genai.GeneratorParams(model := genai.Model(str(tmp_path)))
    parameters.set_search_options(max_length=12, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([tokens], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0)) == expected


def greedy(module: Module, store: WeightStore, tokens: list[int], length: int) -> list[int]:
    """What the interpreter writes, each token from the whole text before it."""
    while len(tokens) < length:
        tokens = [*tokens, int(logits_of(module, store, tokens)[-1].argmax())]
    return tokens


def logits_of(module: Module, store: WeightStore, tokens: list[int]) -> torch.Tensor:
    """The interpreter's logits [seq, vocab] of a whole text."""
    ids, positions = torch.tensor([tokens]), torch.arange(len(tokens))[None]
    inputs = {**cached_inputs(module, 1, 0), "input_ids": ids, "position_ids": positions}
    return run(emitted_function(module), inputs, lambda n: load_float(module.weights[n], store))["logits"][0]
