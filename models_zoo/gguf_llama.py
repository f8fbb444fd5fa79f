"""Turn a Llama GGUF file into a transformers folder without losing a bit of its weights.

transformers reads the configuration and the tokenizer; the tensors are read here, because its own way
wants one more package.
"""

from pathlib import Path
from typing import Any, Final

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from gammac.models_zoo.compatibility import add_rope_theta, use_plain_tokenizer_class

TOP: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

IN_BLOCK: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Undo GGUF's order of the rows [heads * head_dim, inputs] of a rotated projection.

    GGUF turns neighbouring rows together, transformers those half a head apart.
    """
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_tensors(path: Path, config: Any) -> dict[str, Tensor]:
    """The dequantized tensors, float32, under their names in transformers."""
    tensors = {}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in GGUFReader(path).tensors:
        # The dequantized values are products of a float16 scale and a code: float16 would round them.
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name in TOP:
            tensors[TOP[tensor.name]] = weight
            continue
        _, layer, part, _ = tensor.name.split(".")
        if part in heads:
            weight = halves_from_pairs(weight, heads[part])
        tensors[f"model.layers.{layer}.{IN_BLOCK[part]}.weight"] = weight
    return tensors


def convert(path: Path, folder: Path) -> None:
    """Write the transformers folder (float32 safetensors, tokenizer) of the Llama GGUF file at `path`."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "float32"
    config.name_or_path = ""
    # GGUF keeps float32; as a double it would print as 9.999999747378752e-06.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    save_file(read_tensors(path, config), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    add_rope_theta(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    use_plain_tokenizer_class(folder)
