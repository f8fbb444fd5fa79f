"""Models that a training left: what may still be chosen about them, and what they compute."""

from dataclasses import fields
from pathlib import Path

from gammac.adapter_file import BYPASS
from gammac.diagnostics import CompileError
from gammac.frontend.export import Source
from gammac.ir import Module
from gammac.passes import Choices
from gammac.passes.add_adapters import with_adapters
from gammac.passes.choices import adapters_of
from gammac.passes.training.adapters import read_adapters
from gammac.passes.training.trained import is_trained
from gammac.weights import WeightStore


def demand_trained(choices: Choices, source: Source) -> bool:
    """Whether the model comes from a training. Raises CompileError where adapters are given to another."""
    trained = is_trained(source.folder) and source.gguf is None
    if choices.adapters and not trained:
        raise CompileError(
            f"{source.name} is no folder of a training: adapters fit the codes that they were trained on",
            hint="give the folder that gammac finetune --method qlora left, or leave out --adapters",
        )
    return trained


def trained_choices(choices: Choices, source: Source) -> Choices:
    """What is left to choose for a trained folder, which brings its formats and codes: nothing.

    Raises CompileError for choices that differ from the defaults.
    """
    chosen = (f for f in fields(Choices) if f.name != "adapters")
    made = [f.name for f in chosen if getattr(choices, f.name) != f.default]
    if made:
        raise CompileError(
            f"{source.name} was trained in its formats: {', '.join(made)} can't be chosen any more",
            hint="leave such options out, or train again: gammac finetune",
        )
    return Choices(trained=str(source.folder), adapters=choices.adapters)


def with_own_adapters(module: Module, choices: Choices, store: WeightStore) -> Module:
    """What an artifact is compared with: the module as it came, with adapters where there are some."""
    for adding in adapters_of(choices):
        module = with_adapters(module, read_adapters(Path(adding.file)).factors, store)
    return module


def with_bypass(module: Module, source: Source, store: WeightStore) -> Module:
    """The module with the low-rank ways around its masks, where `gammac sparsify --bypass` left some.

    Raises CompileError for a damaged file, or one of another model.
    """
    file = source.folder / BYPASS
    if source.gguf is not None or not file.is_file():
        return module
    return with_adapters(module, read_adapters(file).factors, store)
