"""Small random models of the families that the front end knows, each captured once for all tests."""

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from gammac.diagnostics import CompileError
from gammac.frontend.export import capture, capture_model, load_source
from gammac.ir import Module
from gammac.ir.interpret import run
from gammac.passes.fold_constants import FoldConstants
from gammac.passes.insert_kv_cache import InsertKvCache
from gammac.passes.keep_precision import KeepPrecision
from gammac.passes.raise_patterns import RaisePatterns
from gammac.pipeline import Context, Pipeline
from gammac.targets.target import load_target
from gammac.weights import WeightStore

VOCAB = 50
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
NARROW = {**PLAIN, **TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
WIDE_HEADS = {**NARROW, "head_dim": 16}
OPT = {**PLAIN, **TOKENS, "hidden_size": 32, "ffn_dim": 48}

# family: class, and the config's options where they differ from the class's own
FAMILIES: dict[str, tuple[str, str, dict[str, object]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", NARROW),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", NARROW),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**WIDE_HEADS, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**WIDE_HEADS, "sliding_window": 4}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**WIDE_HEADS, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", NARROW),
    "phi3-partial": ("Phi3ForCausalLM", "Phi3Config", {**NARROW, "partial_rotary_factor": 0.5}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": VOCAB},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", {**OPT, "word_embed_proj_dim": 32}),
    "opt-after": (
        "OPTForCausalLM",
        "OPTConfig",
        {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "bert": ("BertModel", "BertConfig", {**PLAIN, "hidden_size": 32, "intermediate_size": 48}),
}
DECODERS = tuple(family for family in FAMILIES if family != "bert")


@dataclass(frozen=True)
class Captured:
    """A model, what was captured of it, and what the first passes made of that."""

    model: PreTrainedModel
    source: Module
    module: Module
    store: WeightStore

    def weight(self, name: str) -> Tensor:
        """A weight by name, as the interpreter asks for it."""
        return self.store.tensor(self.module.weights[name].digest)

    def run(self, function: str, **inputs: Tensor) -> dict[str, Tensor]:
        """The results of a function of the module."""
        wanted = {p.name for p in self.module.functions[function].params}
        found = {name: tensor for name, tensor in inputs.items() if name in wanted}
        return run(self.module.functions[function], found, self.weight)


def make(family: str) -> PreTrainedModel:
    """A random model; its weights are large enough for layers to matter and logits to differ."""
    model_class, config_class, options = FAMILIES[family]
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * spread)
    model.eval()
    return model


def first_passes(module: Module, store: WeightStore) -> Module:
    """The passes that every compile begins with, verified after each."""
    passes = (FoldConstants(), RaisePatterns(), InsertKvCache(), KeepPrecision())
    return Pipeline(passes).run(module, Context(load_target("cpu-x86"), store))


@functools.cache
def captured(family: str) -> Captured:
    """A family's model and modules, made once."""
    model, store = make(family), WeightStore()
    source = capture_model(model, store, family)
    return Captured(model, source, first_passes(source, store), store)


def tokens(batch: int, seq: int) -> tuple[Tensor, Tensor]:
    """Random ids without special tokens, and their positions; both i64 [batch, seq]."""
    generator = torch.Generator().manual_seed(batch * 100 + seq)
    ids = torch.randint(3, VOCAB, (batch, seq), generator=generator)
    return ids, torch.arange(seq).expand(batch, seq)


def message(place: Path | str) -> str:
    """What a user reads who asks for this model."""
    with pytest.raises(CompileError) as caught:
        capture(load_source(str(place)), WeightStore())
    return str(caught.value)
