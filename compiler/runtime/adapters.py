"""Other adapters for an artifact that was compiled with some, without compiling it again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from gammac.adapter_file import read_factors
from gammac.diagnostics import CompileError
from gammac.runtime.manifest import Manifest

AGAIN: Final = "gammac compile TUNED --adapters FILE, with the folder that gammac finetune left"

Factors = Mapping[str, npt.NDArray[np.float32]]


def factors_for(manifest: Manifest, path: Path) -> Factors:
    """What stands for the artifact's factors, f32 by the names of its weights; of joined ones, row below row.

    Raises CompileError for a file that is damaged, of another base, or of other weights, and where the
    artifact has no adapters.
    """
    if not manifest.adapter_base:
        raise CompileError(
            "the artifact has no adapters that others could stand for",
            hint=AGAIN,
        )
    found = read_factors(path)
    if found.base != manifest.adapter_base:
        raise CompileError(
            f"{path} was trained on another base than {manifest.model}'s",
            hint="adapters fit the base that they were trained on: same model, --formats, --quantizer "
            "and calibration",
        )
    wanted = {key for keys in manifest.adapters.values() for key in keys}
    if other := sorted(wanted ^ found.arrays.keys()):
        lacks = "lacks" if other[0] in wanted else "has, and the artifact has not,"
        raise CompileError(f"{path} {lacks} {other[0]}", hint=AGAIN)
    return {n: np.concatenate([found.arrays[k] for k in keys]) for n, keys in manifest.adapters.items()}


def demand_shape(name: str, factor: npt.NDArray[np.float32], shape: Sequence[int]) -> None:
    """Raise CompileError for a factor that is not shaped as the one that it is to stand for."""
    if factor.shape != tuple(shape):
        raise CompileError(
            f"the adapters have another rank than the artifact's: {list(factor.shape)} for {list(shape)}",
            loc=name,
            hint=AGAIN,
        )
