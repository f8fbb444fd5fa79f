"""model.c: the tables of a model, which runtime.c reads."""

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from gammac.targets.tvm.static.plan import Placed, Plan, Step

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


def model_source(plans: dict[str, Plan], chunk: int, params: tuple[int, int], caches: int) -> str:
    """The tables in C. `params`: the parameter file's size and fingerprint; `caches`: their bytes."""
    tensors, arguments, programs = _Tensors(), list[int](), list[str]()
    kernels = sorted({step.kernel for plan in plans.values() for step in plan.steps})
    text = [HEAD, *(f"KERNEL({name})\n" for name in kernels)]
    for name, plan in plans.items():
        text += _array(f"gammac_step {name}_steps", _steps(plan.steps, tensors, arguments))
        ends = ", ".join(str(tensors.index(t)) for t in (plan.ids, plan.past, plan.logits))
        programs.append(f"    .{name} = {{{name}_steps, {len(plan.steps)}, {ends}}},\n")
    text += _array("uint16_t arguments", map(str, arguments))
    text += _array("gammac_tensor tensors", map(_tensor, tensors.places))
    size, fingerprint = params
    text += [
        "\nconst gammac_tables gammac_model_tables = {\n",
        f"    .tensors = tensors,\n    .tensor_count = {len(tensors.places)},\n    .arguments = arguments,\n",
        *programs,
        f"    .chunk = {chunk},\n    .params_size = {size}u,\n    .fingerprint = {fingerprint:#x}u,\n",
        f"    .caches_size = {caches}u,\n",
        f"    .arena_size = {max(plan.arena for plan in plans.values())}u,\n}};\n",
    ]
    return "".join(text)


def _array(what: str, items: Iterable[str]) -> list[str]:
    return [f"\nstatic const {what}[] = {{\n", *(f"    {item},\n" for item in items), "};\n"]


def _steps(steps: Sequence[Step], tensors: _Tensors, arguments: list[int]) -> list[str]:
    lines = []
    for step in steps:
        lines.append(f"{{__tvm_ffi_{step.kernel}, {len(arguments)}, {len(step.tensors)}}}")
        arguments += map(tensors.index, step.tensors)
    return lines


def _tensor(tensor: Placed) -> str:
    dtype = np.dtype(tensor.dtype)
    sizes = ", ".join(map(str, tensor.shape))
    place, code = f"GAMMAC_{tensor.place.upper()}", DLPACK[dtype.kind]
    return f"{{{place}, {code}, {8 * dtype.itemsize}, {len(tensor.shape)}, {{{sizes}}}, {tensor.offset}u}}"
