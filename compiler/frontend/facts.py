"""What a backend, a runtime or an allocator must know of the source model, as module attributes."""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from gammac.ir import Attr


def facts(model: PreTrainedModel, source: str, eos: tuple[int, ...]) -> Mapping[str, Attr]:
    """The attributes of the module that is captured from `model`."""
    config = model.config
    heads = int(config.num_attention_heads)
    found: dict[str, Attr] = {
        "source": source,
        "family": str(config.model_type),
        "architecture": type(model).__name__,
        "kind": kind_of(model),
        "hidden_size": int(config.hidden_size),
        "layers": int(config.num_hidden_layers),
        "heads": heads,
        "kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        "vocab_size": int(config.vocab_size),
        "max_positions": int(config.max_position_embeddings),
        "eos": eos,
    }
    if labels := labels_of(model):
        found["labels"] = labels
    for name in ("bos", "pad"):
        token = getattr(config, f"{name}_token_id", None)
        if isinstance(token, int) and token >= 0:
            found[name] = token
    return found


def kind_of(model: PreTrainedModel) -> str:
    """`decoder` for what generates, else `encoder`."""
    return "decoder" if model.can_generate() else "encoder"


def labels_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of a classifier's classes in the order of its logits; none for other models."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return ()
    return class_names(model.config)


def class_names(config: PretrainedConfig) -> tuple[str, ...]:
    """What a config calls its classes, in the order of the logits."""
    names: Any = config.id2label or {}
    return tuple(str(names[index]) for index in sorted(names))


def token_ids(value: object) -> tuple[int, ...]:
    """A config writes None, one id or a list of ids."""
    if isinstance(value, int):
        return (value,)
    return tuple(int(v) for v in value) if isinstance(value, list | tuple) else ()


def eos_of(model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that end a text: the generation config's, else the config's."""
    generation = getattr(model, "generation_config", None)
    return token_ids(getattr(generation, "eos_token_id", None)) or eos_of_config(model.config)


def eos_of_config(config: PretrainedConfig) -> tuple[int, ...]:
    """The config's own tokens that end a text."""
    return token_ids(getattr(config, "eos_token_id", None))
