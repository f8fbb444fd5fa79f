"""model.c: the tables of a model, which runtime.c reads."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gammac.targets.tvm.static.plan import Placed, Plan, Step

# what a processor must have, as `Isa.cpu_flags` has it: leaf, part, word and bit of `gammac_feature`
FEATURES: Final[Mapping[str, tuple[int, int, int, int]]] = {
    "fma": (1, 0, 2, 12), "f16c": (1, 0, 2, 29), "avx2": (7, 0, 1, 5), "bmi2": (7, 0, 1, 8),
    "avx512f": (7, 0, 1, 16), "avx512dq": (7, 0, 1, 17), "avx512cd": (7, 0, 1, 28),
    "avx512bw": (7, 0, 1, 30), "avx512vl": (7, 0, 1, 31), "avx512_vnni": (7, 0, 2, 11),
    "avx_vnni": (7, 1, 0, 4),
    "asimd": (0, 0, 0, 1), "asimddp": (0, 0, 0, 20), "i8mm": (0, 0, 1, 13),
    "neon": (0, 0, 0, 12), "vfpv4": (0, 0, 0, 16),
}  # fmt: skip
# DLPack's codes of element types, by numpy's
DLPACK: Final = {"i": "kDLInt", "u": "kDLUInt", "f": "kDLFloat"}
HEAD: Final = """\
#include "tables.h"

#define KERNEL(name) int __tvm_ffi_##name(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
"""


class _Tensors:
    """Tensors of all functions, each once."""

    def __init__(self) -> None:
        self.places: dict[Placed, int] = {}

    def index(self, tensor: Placed) -> int:
        """Its place in the list."""
        return self.places.setdefault(tensor, len(self.places))


@dataclass(frozen=True)
class File:
    """The parameter file: bytes, and their fingerprint."""

    size: int
    fingerprint: int


def model_source(
    plans: Mapping[str, Plan], chunk: int, flags: Sequence[str], params: File, caches: int
) -> str:
    """The tables in C. `flags` are what a processor must have; `caches` counts bytes."""
    tensors, arguments, programs = _Tensors(), list[int](), list[str]()
    kernels = sorted({step.kernel for plan in plans.values() for step in plan.steps})
    text = [HEAD, *(f"KERNEL({name})\n" for name in kernels)]
    for name, plan in plans.items():
        text += _array(f"gammac_step {name}_steps", _steps(plan.steps, tensors, arguments))
        ends = ", ".join(str(tensors.index(t)) for t in (plan.ids, plan.past, plan.logits))
        programs.append(f".{name} = {{{name}_steps, {len(plan.steps)}, {ends}}}")
    text += _array("uint32_t arguments", map(str, arguments))
    text += _array("gammac_tensor tensors", map(_tensor, tensors.places))
    # C has no empty arrays
    text += _array("gammac_feature features", [_braced(FEATURES[flag]) for flag in flags] or ["{0, 0, 0, 0}"])
    dims, most = (max(map(len, lists)) for lists in _lists(plans))
    arena = max(plan.arena for plan in plans.values())
    text += [
        f'_Static_assert({dims} <= GAMMAC_DIMS && {most} <= GAMMAC_MOST_ARGUMENTS, "tables.h has less");\n',
        f"_Static_assert({params.size + caches + arena}u < SIZE_MAX / 2, "
        '"the model is too large for this machine");\n',
    ]
    fields = [
        ".tensors = tensors", f".tensor_count = {len(tensors.places)}", ".arguments = arguments", *programs,
        ".features = features", f".feature_count = {len(flags)}", f".chunk = {chunk}",
        f".params_size = {params.size}u", f".fingerprint = {params.fingerprint:#x}u",
        f".caches_size = {caches}u", f".arena_size = {arena}u",
    ]  # fmt: skip
    lines = [f"    {field},\n" for field in fields]
    return "".join([*text, "\nconst gammac_tables gammac_model_tables = {\n", *lines, "};\n"])


def _lists(plans: Mapping[str, Plan]) -> tuple[list[Sequence[object]], list[Sequence[object]]]:
    """The sizes of all tensors, and the arguments of all steps."""
    steps = [step for plan in plans.values() for step in plan.steps]
    return [tensor.shape for step in steps for tensor in step.tensors], [step.tensors for step in steps]


def _array(what: str, items: Iterable[str]) -> list[str]:
    return [f"\nstatic const {what}[] = {{\n", *(f"    {item},\n" for item in items), "};\n"]


def _steps(steps: Sequence[Step], tensors: _Tensors, arguments: list[int]) -> list[str]:
    lines = []
    for step in steps:
        lines.append(f"{{__tvm_ffi_{step.kernel}, {len(arguments)}, {len(step.tensors)}}}")
        arguments += map(tensors.index, step.tensors)
    return lines


def _braced(numbers: Iterable[int]) -> str:
    return f"{{{', '.join(map(str, numbers))}}}"


def _tensor(tensor: Placed) -> str:
    dtype = np.dtype(tensor.dtype)
    kind = f"GAMMAC_{tensor.place.upper()}, {DLPACK[dtype.kind]}, {8 * dtype.itemsize}"
    return f"{{{kind}, {len(tensor.shape)}, {_braced(tensor.shape)}, {tensor.offset}u}}"
