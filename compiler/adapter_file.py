"""What a file of adapters holds, read without torch: see `gammac.passes.training.adapters`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from gammac.diagnostics import CompileError

# low-rank ways around the masks of a checkpoint, beside it: transformers doesn't read them
BYPASS: Final = "bypass.safetensors"


@dataclass(frozen=True, eq=False)
class FactorFile:
    """`arrays` f32 by their names in the file, NAME/a [rank, in] and NAME/b [out, rank] for each weight NAME;
    `base` is the digest of the codes that they were trained on."""

    method: str
    base: str
    arrays: Mapping[str, npt.NDArray[np.float32]]


def read_factors(path: Path) -> FactorFile:
    """Raises CompileError for a file that is damaged or none of adapters."""
    try:
        with safe_open(path, framework="numpy") as file:
            said = json.loads((file.metadata() or {})["gammac"])
            arrays: dict[str, Any] = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no mapping)
        found = FactorFile(str(said["method"]), str(said["base"]), arrays)
        _demand_pairs(arrays)
        return found
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CompileError(
            f"{path} can't be read as adapters: {error}",
            hint="gammac finetune --method qlora writes adapters.safetensors",
        ) from error


def _demand_pairs(arrays: Mapping[str, Any]) -> None:
    for key, array in arrays.items():
        name, _, part = key.rpartition("/")
        if part not in ("a", "b") or array.ndim != 2 or array.dtype != np.float32:
            raise ValueError(f"{key} is no factor, f32 with two dimensions")
        if not {f"{name}/a", f"{name}/b"} <= arrays.keys():
            raise ValueError(f"{name} has one factor")


def demand_no_bypass(folder: Path) -> None:
    """Raises CompileError for a checkpoint that is not what transformers would make of it."""
    if (folder / BYPASS).is_file():
        raise CompileError(
            f"{folder} has a bypass around its masks ({BYPASS}), which transformers would leave out",
            hint="compile it, or compare its artifact with the dense model that it was trained from",
        )
