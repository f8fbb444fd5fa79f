"""model.json: what a runtime must know of a TVM artifact's model. Plain data, read without TVM."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, Final

import numpy as np

# the layout of this file and the calling convention of the model's functions
ABI: Final = 1
FUNCTIONS: Final = ("decode", "prefill", "logits")
"""Each takes ids i64 [rows, 1], past i64 [1], the caches and the parameters: `decode` one row, the others any
number; `logits` answers with a row for each id, the others with the last one's."""


@dataclass(frozen=True)
class Entry:
    """An array of the parameter file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Description:
    """`caches` are the shapes of the f32 tensors that hold keys and values, two a layer."""

    tvm: str
    """The version of TVM that built the model."""

    tvm_ffi: str
    isa: str
    """The name of the instruction set that the kernels use."""

    cpu_flags: tuple[str, ...]
    """What a processor must have, as /proc/cpuinfo spells it."""

    arch: str
    """The machine, as `platform.machine()` spells it."""

    activations: str
    """int8 or float: what products with packed weights take."""

    vocab_size: int
    context: int
    """The longest sequence of tokens."""

    capacity: int
    """Rows that the caches hold: the context, rounded up to whole blocks."""

    caches: tuple[tuple[int, ...], ...]
    read_per_token: int
    """Bytes of parameters that a decoding step reads."""

    params: tuple[Entry, ...]
    gpus: tuple[str, ...] = ()
    """CUDA architectures that the kernels are compiled for: sm_80 is machine code, compute_90 is PTX. None
    where the kernels are the processor's."""
    code: Mapping[str, str] = field(default_factory=dict)
    """The triple, the core and its features that the code was made for; older artifacts don't say."""

    def to_json(self) -> str:
        """Equal descriptions have equal texts."""
        return json.dumps({"abi": ABI, **asdict(self)}, indent=1, sort_keys=True) + "\n"


def parse_description(text: str) -> Description:
    """The inverse of `to_json`. Raises ValueError for a text that is none, or of another ABI."""
    data: Any = json.loads(text)
    if not isinstance(data, Mapping) or data.get("abi") != ABI:
        found = data.get("abi") if isinstance(data, Mapping) else None
        raise ValueError(f"its ABI is {found}, not {ABI}")
    try:
        fields = {name: value for name, value in data.items() if name != "abi"}
        entries = tuple(Entry(**{**e, "shape": tuple(e["shape"])}) for e in fields.pop("params"))
        caches = tuple(tuple(int(size) for size in shape) for shape in fields.pop("caches"))
        flags, gpus = tuple(fields.pop("cpu_flags")), tuple(fields.pop("gpus", ()))
        return Description(params=entries, caches=caches, cpu_flags=flags, gpus=gpus, **fields)
    except (KeyError, TypeError) as error:
        raise ValueError(f"an entry is wrong: {error}") from error
