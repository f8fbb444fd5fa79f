"""Captured modules compute what transformers computes, wherever they come from."""

import json
from collections import Counter
from pathlib import Path

import gguf
import pytest
import torch
from families import FAMILIES, captured, first_passes, make, message, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from gammac.frontend.export import capture, capture_model, load_source
from gammac.ir import Module, parse, to_text, verify
from gammac.ir.interpret import run
from gammac.passes.keep_precision import softmax_and_residuals_are_high_precision
from gammac.weights import WeightStore

SHAPES = [(1, 7), (2, 13), (3, 1)]
PARITY = 1e-4
"""Both sides compute in f32, in other orders; the logits are of the order of 1."""

ROTARY = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "phi3-partial")
ELEMENTARY = {"cos", "sin", "neg", "add", "cast", "pow", "rsqrt", "mean", "shift", "sigmoid", "tanh", "full"}


def expected(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """What transformers says."""
    with torch.no_grad():
        outputs = model(**{name: t for name, t in inputs.items() if name != "position_ids"})
    result: Tensor = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    return result


def inputs_of(module: Module, batch: int, seq: int) -> dict[str, Tensor]:
    """Inputs for the parameters that `@forward` has."""
    ids, positions = tokens(batch, seq)
    every = {"input_ids": ids, "position_ids": positions, "token_type_ids": ids % 2}
    return {p.name: every[p.name] for p in module.functions["forward"].params}


def difference(module: Module, store: WeightStore, model: PreTrainedModel, batch: int, seq: int) -> float:
    """The largest difference between the interpreter and transformers."""
    inputs = inputs_of(module, batch, seq)
    (found,) = run(
        module.functions["forward"], inputs, lambda n: store.tensor(module.weights[n].digest)
    ).values()
    return float((found - expected(model, inputs)).abs().max())


# ---- every family -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers(family: str) -> None:
    found = captured(family)
    for module in (found.source, found.module):
        assert not verify(module)
        for batch, seq in SHAPES:
            assert difference(module, found.store, found.model, batch, seq) <= PARITY
    logits = expected(found.model, inputs_of(found.module, 2, 13))
    assert float(logits.std()) > 0.1, "logits this small would hide a mistake"


@pytest.mark.parametrize("family", FAMILIES)
def test_text_round_trip(family: str) -> None:
    for module in (captured(family).source, captured(family).module):
        assert to_text(parse(to_text(module))) == to_text(module)


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_are_raised(family: str) -> None:
    module = captured(family).module
    ops = Counter(op.name for op in module.functions["forward"].ops)
    assert not ELEMENTARY & ops.keys()
    assert ops["attention"] == 2
    assert ops["rope"] == (4 if family in ROTARY else 0)
    # local and global attention of Gemma 3 turn by different frequencies
    assert ops["rotary_table"] == (0 if family not in ROTARY else 2 if family == "gemma3" else 1)
    assert ops["residual_add"] >= 4
    assert all(op.loc for op in module.functions["forward"].ops)


def test_a_llama_layer_reads_like_its_paper() -> None:
    ops = captured("llama").module.functions["forward"].ops
    layer = [op for op in ops if op.loc.startswith("model.layers.0")]
    assert [op.name for op in layer] == [
        "rms_norm",
        *("linear", "reshape", "transpose") * 3,
        "rope", "rope", "attention", "transpose", "reshape", "linear",
        "residual_add", "rms_norm", "linear", "silu", "linear", "mul", "linear", "residual_add",
    ]  # fmt: skip
    assert [op.loc for op in layer if op.name == "linear"][:2] == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_precision_is_kept(family: str) -> None:
    assert not list(softmax_and_residuals_are_high_precision(captured(family).module))
    assert list(softmax_and_residuals_are_high_precision(captured(family).source))


# ---- what a module knows of its model -----------------------------------------------------------


def test_facts() -> None:
    attrs = captured("gemma3").module.attrs
    assert attrs == {
        "source": "gemma3", "family": "gemma3_text", "architecture": "Gemma3ForCausalLM", "kind": "decoder",
        "hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab_size": 50,
        "max_positions": 128, "eos": (2,), "bos": 1, "pad": 0,
    }  # fmt: skip
    assert captured("bert").module.attrs["kind"] == "encoder"


def test_roles_name_what_is_quantized() -> None:
    def names(family: str, role: str) -> list[str]:
        return [w.name for w in captured(family).module.weights.values() if w.attrs.get("role") == role]

    assert names("llama", "table") == ["model.embed_tokens.weight", "lm_head.weight"]
    assert len(names("llama", "block")) == 2 * 7
    # one tensor for both ends, under the embedding's name
    assert names("qwen3", "table") == ["model.embed_tokens.weight"]
    assert names("gpt2", "table") == ["transformer.wte.weight"]
    assert len(names("gpt2", "block")) == 2 * 4
    # the projections of OPT to and from its narrower embedding are in no block
    assert len(names("opt-after", "block")) == 2 * 6


def test_conv1d_is_stored_as_linear() -> None:
    found = captured("gpt2")
    weight = found.module.weights["transformer.h.0.attn.c_attn.weight"]
    assert str(weight.type) == "f32[96,32]"
    conv = dict(found.model.named_parameters())[weight.name]
    assert torch.equal(found.weight(weight.name), conv.t())


def test_windows_and_gemmas_weights() -> None:
    windows = [
        op.attrs.get("window", 0)
        for family in ("llama", "mistral", "gemma3")
        for op in captured(family).module.functions["forward"].ops
        if op.name == "attention"
    ]
    assert windows == [0, 0, 4, 4, 4, 0]
    weight = captured("gemma3").weight("model.norm.weight-shift")
    assert torch.equal(weight, 1 + captured("gemma3").model.model.norm.weight)


def test_capture_leaves_the_model_alone() -> None:
    model = make("gemma3")
    before = expected(model, inputs_of(captured("gemma3").source, 2, 13))
    implementation = model.config._attn_implementation
    capture_model(model.train(), WeightStore())
    assert model.training and model.config._attn_implementation == implementation
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(before, expected(model.eval(), inputs_of(captured("gemma3").source, 2, 13)))


# ---- folders ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Qwen 3 with a tied head, in two files."""
    place = tmp_path_factory.mktemp("models") / "qwen3"
    make("qwen3").save_pretrained(place, max_shard_size="20KB")
    assert len(list(place.glob("*.safetensors"))) > 1
    return place


def from_folder(place: Path, store: WeightStore) -> Module:
    return capture(load_source(str(place)), store)


def test_a_folder_is_streamed(folder: Path, tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    module = from_folder(folder, store)
    assert (
        not (tmp_path / "objects").exists() or len(list((tmp_path / "objects").rglob("*.safetensors"))) == 1
    )
    same = captured("qwen3").source.weights
    assert {n: w.digest for n, w in module.weights.items()} == {n: w.digest for n, w in same.items()}
    assert difference(first_passes(module, store), store, captured("qwen3").model, 2, 13) <= PARITY


def test_names_without_the_prefix_are_found(tmp_path: Path) -> None:
    captured("gpt2").model.transformer.save_pretrained(tmp_path / "gpt2")
    config = tmp_path / "gpt2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["GPT2LMHeadModel"]}))
    store = WeightStore()
    module = from_folder(tmp_path / "gpt2", store)
    assert difference(module, store, captured("gpt2").model, 2, 13) <= PARITY


def test_names_that_transformers_converts(tmp_path: Path) -> None:
    captured("bert").model.save_pretrained(tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {n: t for n, t in load_file(path).items()}
    for new, name in old.items():
        renamed = {key.replace(new, name): tensor for key, tensor in renamed.items()}
    save_file(renamed, path, metadata={"format": "pt"})
    store = WeightStore()
    module = from_folder(tmp_path / "bert", store)
    assert difference(module, store, captured("bert").model, 2, 13) <= PARITY


def test_bfloat16_files_give_float32_weights(tmp_path: Path) -> None:
    make("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    store = WeightStore(tmp_path / "cache")
    module = from_folder(tmp_path / "llama", store)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    assert difference(module, store, model, 2, 13) <= PARITY


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """A Llama as llama.cpp stores it: rows of q and k in pairs, the tokenizer inside."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "ab", *(f"t{i}" for i in range(44))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:
                tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "llama.gguf"
    write_gguf(captured("llama").model, path)
    source = load_source(str(path))
    assert source.eos == (2,) and source.tokenizer is not None
    module = capture(source, WeightStore())
    same = captured("llama").source.weights
    assert {n: w.digest for n, w in module.weights.items()} == {n: w.digest for n, w in same.items()}
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(path.read_bytes()[:5000])
    assert str(torn) in message(torn)
