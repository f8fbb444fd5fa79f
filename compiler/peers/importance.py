"""llama.cpp's importance matrix, which is a diagonal: the mean square of each input of each linear."""

import ctypes
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from gammac.frontend.source import Source
from gammac.models_zoo.texts import default_calibration_text
from gammac.peers.source_model import load_model
from gammac.texts import token_windows

WINDOWS: Final = 8
LENGTH: Final = 512


def input_squares(source: Source) -> Mapping[str, Tensor]:
    """Weight name → f32 [inputs], over the calibration text that gammac ships.

    A model without a tokenizer reads random tokens: its types are then right, its quality is not.
    """
    model: Any = load_model(source)
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].reshape(-1, inputs[0].shape[-1]).square().mean(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(watch(f"{name}.weight"))
    with torch.no_grad():
        for window in _windows(source):
            model(window[None], use_cache=False)
    return sums


def _windows(source: Source) -> Tensor:
    if source.tokenizer is not None:
        return token_windows(default_calibration_text(), source.tokenizer, LENGTH, WINDOWS, spread=True)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(source.config.vocab_size, (1, LENGTH), generator=generator)


def as_c_array(llama: Any, importance: Mapping[str, Tensor]) -> Any:
    """The array that `llama_model_quantize_params.imatrix` points to; it keeps what it points to alive."""
    entry = llama.llama_model_imatrix_data
    entries = []
    for name, values in importance.items():
        data = (ctypes.c_float * len(values))(*values.tolist())
        entries.append(entry(name.encode(), ctypes.cast(data, ctypes.POINTER(ctypes.c_float)), len(values)))
    # the end is an entry without a name
    return (entry * (len(entries) + 1))(*entries)
