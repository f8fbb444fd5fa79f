"""A low-rank way around what a mask takes: y = x (M ∘ W)ᵀ + (x aᵀ) bᵀ.

SparseForge's SLoRB (arXiv 2605.06402, as its release has it): a [columns / block, columns] starts as sums
of `block` inputs each, and learns. b [rows, columns / block] starts at zero, for at first no mask takes
anything. A file beside the checkpoint holds both, and whoever captures the model adds them: they are counted
and run as what they are, floats beside 2:4 weights. transformers doesn't know of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from gammac.adapter_file import BYPASS
from gammac.diagnostics import CompileError
from gammac.passes.training.adapters import Adapters, Factors, write_adapters

METHOD: Final = "bypass"
PARTS: Final = ("a", "b")


def started(weights: Mapping[str, Tensor], block: int) -> dict[str, Tensor]:
    """Factors by the names NAME/a and NAME/b for weights [rows, columns]. Raises CompileError for a block
    that divides no row."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        rows, columns = weight.shape
        if columns % block:
            raise CompileError(
                f"{columns} inputs are no multiple of a bypass of {block}", loc=name, hint="try --bypass 64"
            )
        sums = torch.eye(columns // block).repeat_interleave(block, dim=1)
        found |= {f"{name}/a": sums, f"{name}/b": torch.zeros(rows, columns // block)}
    return found


def joined(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters with each bypass added to its weight: what the model computes with."""
    plain = {n: p for n, p in parameters.items() if n.rpartition("/")[2] not in PARTS}
    for name in plain:
        if f"{name}/a" in parameters:
            plain[name] = plain[name] + parameters[f"{name}/b"] @ parameters[f"{name}/a"]
    return plain


def factors_of(parameters: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Weight name → a and b."""
    names = [n.removesuffix("/a") for n in parameters if n.endswith("/a")]
    return {n: (parameters[f"{n}/a"], parameters[f"{n}/b"]) for n in names}


def write_bypass(folder: Path, parameters: Mapping[str, Tensor]) -> None:
    """The file of a checkpoint's bypasses, where it has some."""
    factors = factors_of(parameters)
    if factors:
        write_adapters(folder / BYPASS, Adapters(METHOD, "", factors))
