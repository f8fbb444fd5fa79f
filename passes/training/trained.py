"""What training leaves beside a model's own files, and how a compile takes it on.

    training.json       the method, the budget, a format for each weight, how activations are rounded
    codes.safetensors   the parts of each weight, as WEIGHT/PART

`model.safetensors` in the same folder holds what these codes stand for, so that transformers loads the
trained model, too; whether the two belong together is checked weight by weight.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from gammac.cache import key_of
from gammac.diagnostics import CompileError
from gammac.files import write_atomically
from gammac.formats import Quantized, parse_format
from gammac.formats.base import Parts
from gammac.ir import Module
from gammac.weights import digest_of

TRAINED: Final = "training.json"
CODES: Final = "codes.safetensors"


@dataclass(frozen=True)
class Trained:
    """`formats` by weight name; `activations` by weight name, {bits} or {bits, scale}; `budget` as a compile
    would be asked for it; `options` and `figures` are for readers."""

    method: str
    budget: str
    formats: Mapping[str, str]
    activations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)


def is_trained(folder: Path) -> bool:
    """Whether a model's folder was written by a training."""
    return (folder / TRAINED).is_file()


def write_trained(folder: Path, trained: Trained, weights: Mapping[str, Quantized]) -> None:
    """Write both files. Raises CompileError when they can't be written."""
    parts = {f"{n}/{part}": t.contiguous() for n, q in weights.items() for part, t in q.parts.items()}
    write_atomically(folder / CODES, save(parts))
    write_atomically(folder / TRAINED, (json.dumps(asdict(trained), indent=1) + "\n").encode())


def read_trained(folder: Path) -> Trained:
    """The first file. Raises CompileError for one that is damaged."""
    path = folder / TRAINED
    try:
        found = Trained(**json.loads(path.read_text(encoding="utf-8")))
        for name in found.formats.values():
            parse_format(name)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CompileError(f"{path} can't be read: {error}", hint="run gammac finetune again") from error
    return found


def digest_of_trained(folder: Path) -> str:
    """Of both files. Raises CompileError when one can't be read."""
    try:
        return key_of(
            *(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (TRAINED, CODES))
        )
    except OSError as error:
        raise CompileError(f"{error.filename} can't be read", hint="run gammac finetune again") from error


def read_codes(folder: Path, trained: Trained, module: Module) -> dict[str, Quantized]:
    """Each weight of the module that has a role, in its format.

    Raises CompileError naming the weight that has no codes, or whose codes stand for other numbers than the
    module has.
    """
    try:
        arrays = load_file(folder / CODES)
    except (SafetensorError, OSError) as error:
        raise CompileError(
            f"{folder / CODES} can't be read: {error}", hint="run gammac finetune again"
        ) from error
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in arrays.items():
        name, _, part = key.rpartition("/")
        parts.setdefault(name, {})[part] = tensor
    return {n: _checked(n, w.digest, trained, parts) for n, w in module.weights.items() if "role" in w.attrs}


def _checked(name: str, digest: str, trained: Trained, parts: Mapping[str, Parts]) -> Quantized:
    if name not in parts or name not in trained.formats:
        raise CompileError(
            "has no trained codes", loc=name, hint=f"{TRAINED} and {CODES} are another model's"
        )
    found = Quantized(parse_format(trained.formats[name]), parts[name])
    if digest_of({"data": found.dequantize()}) != digest:
        raise CompileError(
            "its codes stand for other numbers than the checkpoint holds",
            loc=name,
            hint=f"the weights were changed after training: delete {TRAINED} to compile them as any others",
        )
    return found
