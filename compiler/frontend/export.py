"""From a transformers model to a module with one function, `forward`.

Capture needs no weights: the model is built without them and run through torch.export on the meta
device, then the weights are streamed from the checkpoint one at a time.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel, initialization

from gammac.diagnostics import CompileError
from gammac.frontend.checkpoint import Tensors, TensorsInMemory, declare, open_checkpoint
from gammac.frontend.facts import eos_of, facts, kind_of, labels_of
from gammac.frontend.hooks import hooked
from gammac.frontend.lower import Lowered, lower
from gammac.frontend.source import Source, load_source, model_class, nonsense_is_an_error, quiet
from gammac.ir import Attr, Function, Module
from gammac.weights import WeightStore

__all__ = ["Source", "capture", "capture_model", "load_source"]

LENGTH_DEPENDENT: Final = {"dynamic", "longrope"}
"""Kinds of rotary positions whose frequencies change while a text grows."""

EXAMPLE: Final = (2, 5)
"""Batch and length of the example input. torch.export would take a size of 0 or 1 for fixed."""


def capture(source: Source, store: WeightStore) -> Module:
    """The module of `source`: `@forward` with all logits, and its weights registered in `store`.

    One weight is in memory at a time, unless the checkpoint has to be converted by transformers.
    Raises CompileError for what can't be captured or is damaged.
    """
    with quiet():
        model = build_skeleton(source)
        buffers = dict(model.named_buffers())
        tensors = open_checkpoint(source, model)
        nn.Module.to(model, device="meta")
        lowered = _lower_model(model, buffers)
        return _assemble(lowered, model, tensors, store, facts(model, source.name, source.eos))


def capture_model(model: PreTrainedModel, store: WeightStore, name: str = "model") -> Module:
    """The module of a float32 model in memory; `model` is left as it was. Raises CompileError."""
    wrong = {str(p.dtype) for p in model.parameters()} - {"torch.float32"}
    if wrong:
        raise CompileError(f"the parameters are {', '.join(sorted(wrong))}", hint="call model.float()")
    was_training = model.training
    with quiet():
        model.train(False)
        lowered = _lower_model(model, dict(model.named_buffers()))
    model.train(was_training)
    tensors = TensorsInMemory(dict(model.named_parameters(remove_duplicate=False)))
    return _assemble(lowered, model, tensors, store, facts(model, name, eos_of(model)))


# ---- the model without its weights --------------------------------------------------------------


def build_skeleton(source: Source) -> PreTrainedModel:
    """The model with parameters on the meta device and real buffers (rotary frequencies, scales)."""
    with (
        nonsense_is_an_error(source.folder / "config.json"),
        initialization.no_init_weights(),
        _parameters_on_meta(),
    ):
        model: PreTrainedModel = model_class(source)(source.config)
    model.tie_weights()
    model.train(False)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    # buffers are computed in the constructor and stored nowhere else, so only parameters are dropped
    register: Callable[..., None] = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


# ---- export -------------------------------------------------------------------------------------


class Forward(nn.Module):
    """A model with plain tensors in and one named tensor out, which is what gets exported."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.options: dict[str, Any] = {"use_cache": False} if kind_of(model) == "decoder" else {}
        self.first_position = first_position(model)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits [batch, seq, vocab], or the last hidden state of a model without a head; of a classifier
        logits [batch, classes]."""
        options = dict(self.options)
        if token_type_ids is not None:
            options["token_type_ids"] = token_type_ids
        if self.first_position:
            position_ids = position_ids + self.first_position
        if pools_last_token(self.model):
            base: Any = self.model.base_model
            hidden = base(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
            return {"logits": self.model.get_submodule("score")(hidden[:, -1])}
        outputs = self.model(input_ids=input_ids, position_ids=position_ids, **options)
        name = "logits" if "logits" in outputs else "last_hidden_state"
        return {name: outputs[name]}


def pools_last_token(model: PreTrainedModel) -> bool:
    """Whether a decoder became a classifier: its own forward looks for the last token that is no padding,
    which depends on the tokens. A text that is not padded ends with it."""
    return bool(labels_of(model)) and isinstance(getattr(model, "score", None), nn.Linear)


def first_position(model: PreTrainedModel) -> int:
    """RoBERTa and its kin count positions from padding_idx + 1; callers of the IR count from 0."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            padding: Any = module.padding_idx
            return int(padding) + 1
    return 0


def input_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The parameters of `@forward`, each i64[batch,seq]."""
    has_types = kind_of(model) == "encoder" and hasattr(model.config, "type_vocab_size")
    return ("input_ids", "position_ids", *(("token_type_ids",) if has_types else ()))


def _lower_model(model: PreTrainedModel, buffers: Mapping[str, Tensor]) -> Lowered:
    if model.config.is_encoder_decoder:
        raise CompileError(
            f"{type(model).__name__} is an encoder-decoder", hint="gammac takes decoders and encoders"
        )
    moving = next((name for name, kinds in rope_types(model) if kinds & LENGTH_DEPENDENT), None)
    if moving is not None:
        raise CompileError(
            "the rotary frequencies depend on the length of the text",
            loc=moving,
            hint='set another rope_type in config.json: "linear", "yarn" or "default"',
        )
    names = input_names(model)
    program = _export(Forward(model), names, model.device)
    return lower(program, names, canonical_names(model), buffers)


def rope_types(model: PreTrainedModel) -> Iterator[tuple[str, set[str]]]:
    """Modules with rotary frequencies, and how these were made; one kind for each kind of layer."""
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is not None:
            yield name, {kinds} if isinstance(kinds, str) else set(dict(kinds).values())


def _export(wrapper: Forward, names: tuple[str, ...], device: torch.device) -> ExportedProgram:
    example = tuple(torch.zeros(EXAMPLE, dtype=torch.int64, device=device) for _ in names)
    shapes = tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in names)
    try:
        with hooked(wrapper.model), torch.no_grad():
            return torch.export.export(wrapper, example, dynamic_shapes=shapes, strict=False)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CompileError(
            f"torch.export can't trace {type(wrapper.model).__name__}: {first_line}",
            hint="its forward must not depend on the values of tensors; the chained error says where",
        ) from error


# ---- the module ---------------------------------------------------------------------------------


def canonical_names(model: PreTrainedModel) -> dict[str, str]:
    """Every parameter name to the one that stands for its tensor: the embedding's where it is tied."""
    table = model.get_input_embeddings()
    table_weight = getattr(table, "weight", None)
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    listed = list(model.named_parameters(remove_duplicate=False))
    # the embedding goes first, so that a tied head takes its name
    for name, parameter in sorted(listed, key=lambda item: item[1] is not table_weight):
        names[name] = first.setdefault(id(parameter), name)
    return names


def table_names(model: PreTrainedModel) -> set[str]:
    """The token embedding and the language model's head, by the names of their weights."""
    head: Callable[[], nn.Module | None] = model.get_output_embeddings
    modules = (model.get_input_embeddings(), head())
    tables = {
        id(m.weight) for m in modules if m is not None and isinstance(getattr(m, "weight", None), Tensor)
    }
    return {name for name, parameter in model.named_parameters() if id(parameter) in tables}


def _assemble(
    lowered: Lowered, model: PreTrainedModel, tensors: Tensors, store: WeightStore, attrs: Mapping[str, Attr]
) -> Module:
    canonical = canonical_names(model)
    roles = dict.fromkeys(block_weights(lowered.function), "block")
    roles |= dict.fromkeys((canonical[name] for name in table_names(model)), "table")
    weights = [
        w.with_attrs(role=roles[w.name]) if w.name in roles else w for w in declare(lowered, tensors, store)
    ]
    name = re.sub(r"[^\w.-]+", "-", str(attrs["source"]).rstrip("/").rsplit("/", 1)[-1])
    return Module(name, {"forward": lowered.function}, {w.name: w for w in weights}, attrs)


def block_weights(function: Function) -> Iterator[str]:
    """Weights of linears inside a numbered block, such as `model.layers.3.mlp.up_proj`."""
    for op in function.ops:
        weight = op.weight(1)
        if op.name == "linear" and weight and any(part.isdigit() for part in op.loc.split(".")):
            yield weight.name
