"""Dot products of four int8 inputs with the codes of 16 rows: all that differs between instruction sets.

A step's codes are i32x16, a row's four codes in a lane, unsigned; its inputs are one i32 of four signed
bytes. A leaf keeps sums i32x16 in registers: `start`, then `step` for each 4 inputs, then `sums`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from gammac.targets.tvm.tir.vectors import LANES, T, splat_int, tirx

Expr = Any


class Leaf:
    """Widens to 32 bits and multiplies: runs everywhere."""

    offset = 0
    """What is taken off each code before it is multiplied."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def registers(self, make: Callable[[int, str], Any], count: int) -> Any:
        """Room for `count` sums."""
        return make(count, "int32")

    def start(self, state: Any, i: int, value: Expr) -> None:
        """Sum i is `value`."""
        state.set(i, value)

    def step(self, state: Any, i: int, codes: Expr, inputs: Expr) -> None:
        """Four more inputs for sum i."""
        state.set(i, self.dot(state.get(i), codes, inputs))

    def pause(self, state: Any) -> None:
        """Behind the last step of an unrolled part."""

    def sums(self, state: Any, i: int) -> Expr:
        """i32x16."""
        return state.get(i)

    def dot(self, total: Expr, codes: Expr, inputs: Expr) -> Expr:
        """total + the dot products."""
        for j in range(4):
            code = (codes >> splat_int(8 * j, LANES)) & splat_int(255, LANES)
            value = (inputs << T.int32(24 - 8 * j)) >> T.int32(24)
            total = total + code * T.broadcast(value, LANES)
        return total


class Vnni512(Leaf):
    """One vpdpbusd (AVX-512 VNNI): u8 codes by s8 inputs into 32 bits."""

    def dot(self, total: Expr, codes: Expr, inputs: Expr) -> Expr:
        """One instruction; the broadcast is part of it."""
        spread = T.reinterpret("int8x64", T.broadcast(inputs, LANES))
        name = "llvm.x86.avx512.vpdpbusd.512"
        return tirx.call_llvm_pure_intrin("int32x16", name, total, T.reinterpret("int8x64", codes), spread)


LEAVES: Final[Mapping[str, type[Leaf]]] = {"generic": Leaf, "maddubs": Leaf, "vnni512": Vnni512}
