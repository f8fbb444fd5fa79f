"""Instruction sets as data: what LLVM is told, which dot product there is, how many sums fit."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from gammac.diagnostics import CompileError
from gammac.processor import host_flags
from gammac.targets.target import HOST, Target


@dataclass(frozen=True)
class Isa:
    """An instruction set.

    `leaf` names the dot product of four int8 inputs in `leaves.py`. `tile` and `float_tile` are what a
    prefill kernel keeps in registers: panels of 16 rows by tokens. `machine` and `cpu_flags` are what a
    processor must be and have, as `platform.machine()` and /proc/cpuinfo spell it.
    """

    name: str
    machine: str
    cpu_flags: tuple[str, ...]
    llvm: Mapping[str, Any]
    vector_bits: int
    leaf: str
    tile: tuple[int, int]
    float_tile: tuple[int, int]
    scale_dtype: str = "float16"
    """f32 where the processor does not convert f16 itself."""

    @property
    def code(self) -> dict[str, str]:
        """For what LLVM makes code: the triple, the core, and what is asked for or left out beyond it."""
        features = " ".join(self.llvm.get("mattr", ()))
        return {"triple": self.llvm["mtriple"], "cpu": self.llvm["mcpu"], "features": features}

    @property
    def features(self) -> frozenset[str]:
        """What the kernels count on, as LLVM spells it."""
        return frozenset(f[1:] for f in ISAS[self.name].llvm.get("mattr", ()) if f.startswith("+"))

    def llvm_target(self) -> dict[str, Any]:
        """The dictionary that `tvm.target.Target` takes."""
        return {"kind": "llvm", **{k: list(v) if isinstance(v, tuple) else v for k, v in self.llvm.items()}}

    def on(self, target: Target) -> "Isa":
        """The same for the core that a target names, if it names one: nothing of a generic core is left."""
        if not target.cpu:
            return self
        return replace(self, llvm={**self.llvm, "mcpu": target.cpu, "mattr": target.features})


_X86: Final = {"mtriple": "x86_64-linux-gnu"}
_ARM64: Final = {"mtriple": "aarch64-linux-gnu"}
_V4: Final = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni")
_V3: Final = ("avx2", "fma", "f16c", "bmi2")

ISAS: Final[Mapping[str, Isa]] = {
    isa.name: isa
    for isa in (
        Isa(
            "avx512vnni", "x86_64", _V4,
            # without the second flag LLVM splits every vector in halves
            {**_X86, "mcpu": "x86-64-v4", "mattr": ("+avx512vnni", "-prefer-256-bit")},
            vector_bits=512, leaf="vnni512", tile=(2, 8), float_tile=(1, 8),
        ),
        Isa(
            "avxvnni", "x86_64", (*_V3, "avx_vnni"), {**_X86, "mcpu": "x86-64-v3", "mattr": ("+avxvnni",)},
            vector_bits=256, leaf="vnni256", tile=(1, 5), float_tile=(1, 5),
        ),
        Isa(
            "avx2", "x86_64", _V3, {**_X86, "mcpu": "x86-64-v3"},
            vector_bits=256, leaf="maddubs", tile=(2, 4), float_tile=(1, 5),
        ),
        Isa(
            "generic", "x86_64", (), {**_X86, "mcpu": "x86-64"},
            vector_bits=128, leaf="pmaddwd", tile=(1, 2), float_tile=(1, 2), scale_dtype="float32",
        ),
        Isa(
            "neon-i8mm", "aarch64", ("asimd", "asimddp", "i8mm"),
            {**_ARM64, "mcpu": "generic", "mattr": ("+neon", "+dotprod", "+i8mm")},
            vector_bits=128, leaf="usdot", tile=(1, 4), float_tile=(1, 4),
        ),
        Isa(
            "neon-dotprod", "aarch64", ("asimd", "asimddp"),
            {**_ARM64, "mcpu": "generic", "mattr": ("+neon", "+dotprod")},
            vector_bits=128, leaf="sdot", tile=(1, 4), float_tile=(1, 4),
        ),
        Isa(
            "neon", "aarch64", ("asimd",), {**_ARM64, "mcpu": "generic", "mattr": ("+neon",)},
            vector_bits=128, leaf="words", tile=(1, 2), float_tile=(1, 4),
        ),
        Isa(
            "rvv", "riscv64", (),
            {
                "mtriple": "riscv64-linux-gnu", "mcpu": "generic-rv64", "mabi": "lp64d",
                "mattr": ("+m", "+a", "+f", "+d", "+c", "+v", "+zvl128b"),
            },
            vector_bits=128, leaf="words", tile=(1, 1), float_tile=(1, 4), scale_dtype="float32",
        ),
        Isa(
            "armv7", "armv7l", ("neon", "vfpv4"),
            {
                "mtriple": "armv7-unknown-linux-gnueabihf", "mcpu": "cortex-a7", "mattr": ("+neon", "+vfp4"),
                "mfloat-abi": "hard",
            },
            vector_bits=128, leaf="words", tile=(1, 1), float_tile=(1, 2), scale_dtype="float32",
        ),
    )
}  # fmt: skip
"""The best of each machine first."""

_OF_ARCH: Final = {"x86-64-v4": "avx512vnni", "x86-64-v3": "avx2", "x86-64": "generic"}


def host_isa() -> Isa:
    """The best instruction set of this machine. Raises CompileError where there is none for it."""
    flags, machine = host_flags(), platform.machine()
    fits = [isa for isa in ISAS.values() if isa.machine == machine and flags.issuperset(isa.cpu_flags)]
    if not fits:
        raise CompileError(f"there are no kernels for {machine}", hint="name a target for another machine")
    return fits[0]


def isa_of(target: Target | str = HOST) -> Isa:
    """The instruction set of a target, by the target, an instruction set's name, or `cpu`: this machine.

    Raises CompileError where there is none.
    """
    if isinstance(target, str):
        if target == HOST:
            return host_isa()
        name = target
    else:
        name = _OF_ARCH.get(target.arch, target.arch)
    if name not in ISAS:
        raise CompileError(f"there are no TVM kernels for {name!r}", hint=f"there are {', '.join(ISAS)}")
    return ISAS[name] if isinstance(target, str) else ISAS[name].on(target)
