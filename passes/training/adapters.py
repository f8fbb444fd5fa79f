"""Low-rank adapters beside frozen weights, and the file that holds them.

    adapters.safetensors   for each weight [out, in] NAME/a f32 [rank, in] and NAME/b f32 [out, rank]

What they add is ΔW = b a: LoRA's α/rank (Hu et al. 2021, arXiv 2106.09685) is in b already. The file
says which base it was trained on, so that it fits that one alone, and any such file fits it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save
from torch import Tensor

from gammac.adapter_file import read_factors
from gammac.cache import key_of
from gammac.files import write_atomically
from gammac.formats import Quantized
from gammac.ir import Module
from gammac.weights import digest_of

ADAPTERS: Final = "adapters.safetensors"

# a and b
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Adapters:
    """`factors` by weight name; `base` is the digest of the codes that they were trained on."""

    method: str
    base: str
    factors: Mapping[str, Factors]


def digest_of_base(codes: Mapping[str, Quantized]) -> str:
    """One digest of the formats and codes of all quantized weights."""
    return _joined({n: (q.format.name, digest_of(q.parts)) for n, q in codes.items()})


def digest_of_stored(module: Module) -> str:
    """The same of a module whose weights are stored as codes."""
    stored = {n: w for n, w in module.weights.items() if "stored" in w.attrs}
    return _joined({n: (str(w.attrs["stored"]), w.digest) for n, w in stored.items()})


def _joined(found: Mapping[str, tuple[str, str]]) -> str:
    return key_of(*(f"{n} {name} {digest}" for n, (name, digest) in sorted(found.items())))


def write_adapters(path: Path, adapters: Adapters) -> None:
    """Raises CompileError when the file can't be written."""
    flat = {
        f"{n}/{part}": t.detach().contiguous()
        for n, factors in sorted(adapters.factors.items())
        for part, t in zip("ab", factors, strict=True)
    }
    # one entry, for the order of several is not fixed
    said = json.dumps({"method": adapters.method, "base": adapters.base})
    write_atomically(path, save(flat, {"gammac": said}))


def read_adapters(path: Path) -> Adapters:
    """Raises CompileError for a file that is damaged or none of adapters."""
    found = read_factors(path)
    tensors = {key: torch.from_numpy(array) for key, array in found.arrays.items()}
    names = dict.fromkeys(key.rpartition("/")[0] for key in tensors)
    return Adapters(found.method, found.base, {n: (tensors[f"{n}/a"], tensors[f"{n}/b"]) for n in names})
