"""Dot products of four int8 inputs with the codes of 16 rows: all that differs between instruction sets.

A leaf adds up a segment: `start` from 16 sums, `step` for each 4 inputs, `sums` at the end. A step's codes
are i32x16, a row's four codes in a lane, unsigned; its inputs are one i32 of four signed bytes.
"""

from collections.abc import Mapping
from typing import Any, Final

from gammac.targets.tvm.tir.vectors import LANES, T, splat_int, tirx

Expr = Any


class Leaf:
    """Widens to 32 bits and multiplies: runs everywhere."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    @property
    def offset(self) -> int:
        """What is taken off each code before it is multiplied."""
        return 0

    def start(self, sums: Expr) -> Any:
        """The state of a segment."""
        return sums

    def step(self, state: Any, codes: Expr, inputs: Expr) -> Any:
        """The state with four more inputs."""
        for j in range(4):
            code = (codes >> splat_int(8 * j, LANES)) & splat_int(255, LANES)
            value = (inputs << T.int32(24 - 8 * j)) >> T.int32(24)
            state = T.Bind(state + code * T.broadcast(value, LANES))
        return state

    def sums(self, state: Any) -> Expr:
        """i32x16."""
        return state


class Vnni512(Leaf):
    """One vpdpbusd (AVX-512 VNNI): u8 codes by s8 inputs into 32 bits."""

    def step(self, state: Any, codes: Expr, inputs: Expr) -> Any:
        """One instruction; the broadcast is part of it."""
        spread = T.reinterpret("int8x64", T.broadcast(inputs, LANES))
        name = "llvm.x86.avx512.vpdpbusd.512"
        return T.Bind(
            tirx.call_llvm_pure_intrin("int32x16", name, state, T.reinterpret("int8x64", codes), spread)
        )


LEAVES: Final[Mapping[str, type[Leaf]]] = {"generic": Leaf, "maddubs": Leaf, "vnni512": Vnni512}
