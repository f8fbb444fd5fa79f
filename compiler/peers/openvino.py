"""OpenVINO's own route: torch.export, a stateful cache, NNCF's weight compression."""

import contextlib
import importlib
import io
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from gammac.diagnostics import CompileError
from gammac.frontend.source import Source, quiet
from gammac.peers.source_model import load_model
from gammac.runtime.peers import EXTRA, OPENVINO, import_openvino

TYPES: Final = {"int4": "INT4_ASYM", "int8": "INT8_ASYM", "fp16": None}
GROUP_SIZE: Final = 64
EXAMPLE: Final = (5, 3)
"""Tokens in the cache and new ones of the example that is exported."""


class WithCache(nn.Module):
    """A decoder whose cache goes in and out as tensors [1, kv_heads, past, head_dim], key before value."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Logits [1, seq, vocab], then each layer's key and value with the new tokens."""
        cache: Any = DynamicCache(config=self.model.config)
        for layer, key, value in zip(cache.layers, past[::2], past[1::2], strict=True):
            # an update of an empty cache begins with a tensor of one dimension, which OpenVINO won't join
            layer.keys, layer.values, layer.is_initialized = key, value, True
            layer.dtype, layer.device = key.dtype, key.device
        outputs: Any = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        present = [t for layer in outputs.past_key_values.layers for t in (layer.keys, layer.values)]
        return (outputs.logits, *present)


def build_openvino(source: Source, type_: str, folder: Path) -> None:
    """Write `source` in 4 bits (groups of 64, the head in 8), 8 bits or fp16. Raises CompileError."""
    if type_ not in TYPES:
        raise CompileError(f"openvino has no type {type_!r} here", hint=f"one of {', '.join(TYPES)}")
    openvino = import_openvino()
    model = load_model(source)
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        converted = _stateful(openvino, model)
        mode = TYPES[type_]
        if mode is not None:
            converted = _compress(converted, mode)
        openvino.save_model(converted, str(folder / OPENVINO))


def _stateful(openvino: Any, model: PreTrainedModel) -> Any:
    transformations = importlib.import_module("openvino._offline_transformations")
    past, new = EXAMPLE
    example = _example(model, past, new)
    auto = torch.export.Dim.AUTO
    dynamic = ({1: auto}, {1: auto}, {1: auto}, [{2: auto} for _ in example[3]])
    exported = torch.export.export(WithCache(model), example, dynamic_shapes=dynamic, strict=False)
    converted = openvino.convert_model(exported)
    tokens = ["input_ids", "attention_mask", "position_ids"]
    for i, value in enumerate(converted.inputs[3:]):
        value.get_tensor().set_names({f"past.{i}"})
    for i, value in enumerate(converted.outputs):
        value.get_tensor().set_names({f"present.{i - 1}" if i else "logits"})
    _reorder_caches(openvino, converted)
    shapes = {name: openvino.PartialShape([-1, -1]) for name in tokens}
    for i, state in enumerate(example[3]):
        shapes[f"past.{i}"] = openvino.PartialShape([-1, state.shape[1], -1, state.shape[3]])
    converted.reshape(shapes)
    pairs = {f"past.{i}": f"present.{i}" for i in range(len(example[3]))}
    transformations.apply_make_stateful_transformation(converted, pairs)
    _start_empty(openvino, converted)
    return converted


def _reorder_caches(openvino: Any, model: Any) -> None:
    """Let `beam_idx` choose each cache's rows: OpenVINO fuses attention with its cache only behind that."""
    ops = importlib.import_module("openvino.opset13")
    rows = ops.parameter(openvino.PartialShape([-1]), openvino.Type.i32, name="beam_idx")
    rows.output(0).get_tensor().set_names({"beam_idx"})
    for value in model.inputs[3:]:
        readers = value.get_target_inputs()
        chosen = ops.gather(value, rows, ops.constant(0, openvino.Type.i64))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.add_parameters([rows])


def _start_empty(openvino: Any, model: Any) -> None:
    """A fresh cache has the tokens' batch and no rows."""
    ops = importlib.import_module("openvino.opset13")
    first = ops.constant([0], openvino.Type.i64)
    batch = ops.gather(ops.shape_of(model.input("input_ids")), first, ops.constant(0, openvino.Type.i64))
    for state in (op for op in model.get_ops() if op.get_type_name() == "ReadValue"):
        _, heads, _, size = state.get_output_partial_shape(0)
        sizes = [[heads.get_length()], [0], [size.get_length()]]
        shape = ops.concat([batch, *(ops.constant(n, openvino.Type.i64) for n in sizes)], 0)
        nothing = ops.broadcast(ops.constant(0.0, state.get_output_element_type(0)), shape)
        state.set_arguments([nothing])
    model.validate_nodes_and_infer_types()


def _example(model: PreTrainedModel, past: int, new: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    config: Any = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    states = [torch.zeros(1, heads, past, size) for _ in range(2 * config.num_hidden_layers)]
    tokens = torch.ones(1, new, dtype=torch.long)
    mask = torch.ones(1, past + new, dtype=torch.long)
    return tokens, mask, torch.arange(past, past + new)[None], states


def _compress(model: Any, mode: str) -> Any:
    try:
        import nncf  # type: ignore[import-not-found]
    except ImportError as error:
        raise CompileError("nncf is not installed", hint=EXTRA) from error
    options = {"group_size": GROUP_SIZE, "ratio": 1.0} if mode.startswith("INT4") else {}
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode], **options)
