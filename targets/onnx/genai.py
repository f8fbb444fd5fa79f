"""`genai_config.json`: what onnxruntime-genai must know to run the artifact's folder."""

import json
from pathlib import Path
from typing import Any, Final

from gammac.ir import Function, Module, Value
from gammac.processor import CPU

CONFIG_NAME: Final = "genai_config.json"


def write_genai_config(
    module: Module, folder: Path, *, library: str | None = None, provider: str = CPU
) -> Path:
    """Write the configuration of a legalized decoder; `library` is the operator library beside the model."""
    path = folder / CONFIG_NAME
    text = json.dumps(genai_config(module, library, provider), indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def genai_config(module: Module, library: str | None = None, provider: str = CPU) -> dict[str, Any]:
    """The configuration as a dictionary, taken from the module's types and attributes."""
    attrs, eos = module.attrs, module.attrs.get("eos", ())
    context = attrs.get("max_positions", 0)
    ends = list(eos) if isinstance(eos, tuple) else [eos]
    first_end = ends[0] if ends else 0
    model = {
        "type": "decoder",
        "bos_token_id": attrs.get("bos", first_end),
        "eos_token_id": ends if len(ends) != 1 else first_end,
        "pad_token_id": attrs.get("pad", first_end),
        "context_length": context,
        "vocab_size": attrs.get("vocab_size", 0),
        "decoder": _decoder(module.functions["decode"], library, provider),
    }
    search = {
        "do_sample": False,
        "max_length": context,
        "num_beams": 1,
        "past_present_share_buffer": shares_buffers(module.functions["decode"]),
    }
    return {"model": model, "search": search}


def shares_buffers(function: Function) -> bool:
    """Whether a cache may be one buffer of full length: only GroupQueryAttention can use a part of it."""
    return not any(op.name in ("attention", "kv_append") for op in function.ops)


def _decoder(function: Function, library: str | None, provider: str) -> dict[str, Any]:
    caches = [p for p in function.params if p.name.startswith("past_key.")]
    _, kv_heads, _, dim = caches[0].type.shape
    tables = [op.operands[1].type.shape[1] for op in function.ops if op.name == "embedding"]
    providers: list[dict[str, Any]] = [] if provider == CPU else [{provider: {}}]
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": providers}
    if library is not None:
        options["custom_ops_library"] = library
    return {
        "session_options": options,
        "filename": "model.onnx",
        "head_size": dim,
        "hidden_size": tables[0],
        "num_attention_heads": _heads(function, caches[0]),
        "num_hidden_layers": len(caches),
        "num_key_value_heads": kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def _heads(function: Function, cache: Value) -> Any:
    for op in function.ops:
        if op.name == "gqa":
            return op.attrs["heads"]
        if op.name == "attention":
            return op.operands[0].type.shape[1]
    return cache.type.shape[1]
