"""A Llama as a .gguf file of float16 weights, without a vocabulary: tokens go in and come out as numbers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.frontend.source import Source
from gammac.peers.source_model import parameters_of

ARCHITECTURES: Final = ("llama", "mistral")
TOP: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_BLOCK: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(source: Source, path: Path) -> None:
    """Write `source` to `path`. Raises CompileError for anything but a plain Llama."""
    config = source.config
    _check(source.name, config)
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("none")
    for name, values in tensors_of(source):
        writer.add_tensor(name, values, raw_dtype=_type_of(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors_of(source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF names and values: matrices in float16, norms in float32."""
    config = source.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, values in parameters_of(source):
        stored = gguf_name(name)
        part = stored.split(".")[-2]
        rows = pairs_from_halves(values, heads[part]) if part in heads else values
        yield stored, rows.numpy().astype(np.float16 if rows.dim() > 1 else np.float32)


def pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    """The rows [heads * head_dim, inputs] of a rotated projection in GGUF's order.

    transformers turns rows together that are half a head apart, GGUF neighbouring ones.
    """
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _type_of(values: np.ndarray) -> GGMLQuantizationType:
    return GGMLQuantizationType.F16 if values.dtype == np.float16 else GGMLQuantizationType.F32


def gguf_name(name: str) -> str:
    """What GGUF calls a parameter of transformers' Llama."""
    if name in TOP:
        return TOP[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{IN_BLOCK[rest.removesuffix('.weight')]}.weight"


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> dict[str, Any]:
    rope: dict[str, Any] = config.rope_parameters
    return rope


def _check(name: str, config: Any) -> None:
    kind = config.model_type
    wrong = None
    if kind not in ARCHITECTURES:
        wrong = f"its architecture is {kind}"
    elif _rope(config).get("rope_type", "default") != "default":
        wrong = f"its rotary positions are {_rope(config)['rope_type']}"
    elif getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        wrong = "its linears have biases"
    if wrong:
        raise CompileError(
            f"{name} can't be written as a .gguf file here: {wrong}",
            hint="convert it with llama.cpp's own converter and give --vs FILE.gguf",
        )
