"""Every family that can be captured is emitted, and gives the interpreter's numbers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers

from gammac.formats import load_float
from gammac.frontend.export import capture_model
from gammac.ir import Function, Module
from gammac.ir.interpret import run
from gammac.passes.fold_constants import FoldConstants
from gammac.passes.insert_kv_cache import InsertKvCache
from gammac.passes.keep_precision import KeepPrecision
from gammac.passes.legalize_onnx import LegalizeOnnx
from gammac.passes.raise_patterns import RaisePatterns
from gammac.pipeline import Context, Pipeline
from gammac.targets.onnx.emit import emit, emitted_function, outer_name
from gammac.targets.target import load_target
from gammac.weights import WeightStore

T = transformers
PLAIN = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**PLAIN, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 16}
GPT2 = {
    "vocab_size": 128,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {**PLAIN, "ffn_dim": 96, "word_embed_proj_dim": 64}

FAMILIES: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**HEADS)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**GROUPED)),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**HEADS)),
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**HEADS, sliding_window=4)),
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**HEADS, sliding_window=4)),
    "gemma3": lambda: T.Gemma3ForCausalLM(
        T.Gemma3TextConfig(**HEADS, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    ),
    "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**GROUPED)),
    "gpt_neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**PLAIN)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT2)),
    "opt": lambda: T.OPTForCausalLM(T.OPTConfig(**OPT)),
    "bert": lambda: T.BertForMaskedLM(T.BertConfig(**PLAIN)),
}


def inputs_of(function: Function, seq: int, past: int) -> dict[str, torch.Tensor]:
    known = {
        "input_ids": torch.randint(0, 128, (1, seq)),
        "position_ids": torch.arange(past, past + seq)[None],
        "token_type_ids": torch.randint(0, 2, (1, seq)),
        "attention_mask": torch.ones(1, seq, dtype=torch.int64),
    }
    inputs = {}
    for param in function.params:
        if param.name in known:
            inputs[param.name] = known[param.name]
        else:
            _, heads, _, dim = param.type.shape
            assert isinstance(heads, int) and isinstance(dim, int)
            inputs[param.name] = torch.randn(1, heads, past, dim)
    return inputs


def captured(family: str, store: WeightStore) -> tuple[Module, Module]:
    """A random model of a family, before and after legalization."""
    torch.manual_seed(0)
    module = capture_model(FAMILIES[family]().eval(), store, family)
    context = Context(load_target("cpu-x86"), store)
    passes = (FoldConstants(), RaisePatterns(), InsertKvCache(), KeepPrecision())
    module = Pipeline(passes).run(module, context)
    return module, Pipeline((LegalizeOnnx(),)).run(module, context)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path) -> None:
    store = WeightStore()
    module, legal = captured(family, store)
    emit(legal, store, tmp_path)
    session = ort.InferenceSession(tmp_path / "model.onnx")
    function = emitted_function(legal)
    decoder = function.name == "decode"
    assert any(op.name == "gqa" for op in function.ops) == decoder
    for past, seq in ((0, 9), (9, 1), (10, 3)) if decoder else ((0, 9), (0, 4)):
        inputs = inputs_of(function, seq, past)
        taken = {i.name for i in session.get_inputs()}
        feed = {outer_name(n): t.numpy() for n, t in inputs.items() if outer_name(n) in taken}
        if decoder:
            feed["attention_mask"] = np.ones((1, past + seq), np.int64)
        before = run(module.functions[function.name], inputs, lambda n: load_float(module.weights[n], store))
        for name, expected in before.items():
            (found,) = session.run([outer_name(name)], feed)
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-4 * float(expected.std()) + 1e-6)
