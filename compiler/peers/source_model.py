"""A source's model in torch, with its weights, for peers that convert one."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from gammac.adapter_file import demand_no_bypass
from gammac.frontend.checkpoint import open_checkpoint
from gammac.frontend.export import build_skeleton
from gammac.frontend.source import Source, quiet
from gammac.weights import WeightStore


def parameters_of(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and values, float32, one at a time; a tied one once. Raises CompileError."""
    demand_no_bypass(source.folder)
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        model = build_skeleton(source)
        tensors = open_checkpoint(source, model)
        store = WeightStore(Path(scratch))
        for name, parameter in model.named_parameters():
            yield name, store.tensor(tensors.register(name, parameter.shape, False, store)).float()


def load_model(source: Source) -> PreTrainedModel:
    """The whole model in float32. Raises CompileError."""
    with quiet():
        model = build_skeleton(source)
    for name, values in parameters_of(source):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(values.clone(), requires_grad=False))
    model.tie_weights()
    return model
