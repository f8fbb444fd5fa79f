"""Weights out of a .gguf file, dequantized to float32.

transformers knows the names and layouts of each architecture. Its `from_pretrained` wants one more
package for a .gguf file, so that only its reader is used, on the model that has no weights yet.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_gguf_pytorch_utils

from gammac.diagnostics import CompileError


def read_gguf(path: Path, model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Every parameter of `model` by name, float32. Raises CompileError when the file lacks one."""
    load: Any = modeling_gguf_pytorch_utils.load_gguf_checkpoint
    found: dict[str, Tensor] = load(str(path), return_tensors=True, model_to_load=model)["tensors"]
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    parameters: dict[str, Tensor] = {}
    for names in groups.values():
        stored = next((name for name in names if name in found), None)
        if stored is None:
            raise CompileError(f"{path} lacks {names[0]}", hint="it is another kind of model than it says")
        parameters.update(dict.fromkeys(names, found[stored].to(torch.float32)))
    return parameters
