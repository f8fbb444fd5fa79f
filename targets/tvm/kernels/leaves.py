"""Dot products of four int8 inputs with the codes of 16 rows: all that differs between instruction sets.

A step's codes are i32x16, a row's four codes in a lane, unsigned; its inputs are one i32 of four signed
bytes in [-127, 127]. A leaf keeps sums i32x16 in registers: `start`, then `step` for each 4 inputs, `pause`
where the unrolled code ends, and at last `sums`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from gammac.targets.tvm.tir.vectors import LANES, T, splat_int, tirx

Expr = Any
_SIGN_BITS: Final = -0x7F7F7F80  # 0x80808080


class Leaf:
    """What all have in common; `dot`, or `step`, is a leaf's own."""

    def __init__(self, bits: int, make: Callable[[int, str], Any], count: int) -> None:
        self.bits = bits
        self._sums = make(count, "int32")

    @property
    def offset(self) -> int:
        """What is taken off each code before it is multiplied."""
        return 0

    def start(self, i: int, value: Expr) -> None:
        """Sum i is `value`."""
        self._sums.set(i, value)

    def step(self, i: int, codes: Expr, inputs: Expr) -> None:
        """Four more inputs for sum i."""
        self._sums.set(i, self.dot(self._sums.get(i), codes, inputs))

    def pause(self) -> None:
        """All that was added is in the sums."""

    def sums(self, i: int) -> Expr:
        """i32x16."""
        return self._sums.get(i)

    def dot(self, total: Expr, codes: Expr, inputs: Expr) -> Expr:
        """total + the dot products."""
        raise NotImplementedError


class Vnni512(Leaf):
    """One vpdpbusd (AVX-512 VNNI): u8 codes by s8 inputs into 32 bits."""

    def dot(self, total: Expr, codes: Expr, inputs: Expr) -> Expr:
        """One instruction; the broadcast is part of it."""
        spread = T.reinterpret("int8x64", T.broadcast(inputs, LANES))
        name = "llvm.x86.avx512.vpdpbusd.512"
        return tirx.call_llvm_pure_intrin("int32x16", name, total, T.reinterpret("int8x64", codes), spread)


class Vnni256(Leaf):
    """Two vpdpbusd (AVX-VNNI)."""

    def dot(self, total: Expr, codes: Expr, inputs: Expr) -> Expr:
        """Halves."""
        spread = T.Bind(T.reinterpret("int8x32", T.broadcast(inputs, 8)))

        def half(total: Expr, codes: Expr) -> Expr:
            name = "llvm.x86.avx512.vpdpbusd.256"
            return tirx.call_llvm_pure_intrin("int32x8", name, total, T.reinterpret("int8x32", codes), spread)

        return split_vector(half, 8, total, codes)


class Maddubs(Leaf):
    """vpmaddubsw (AVX2): pairs of u8 by s8 into 16 bits, as many as fit before they are widened.

    Codes of 8 bits less 128 are multiplied by their sign in the inputs: 2 * 255 * 127 is too much.
    """

    def __init__(self, bits: int, make: Callable[[int, str], Any], count: int) -> None:
        super().__init__(bits, make, count)
        self._pending: list[list[Expr]] = [[] for _ in range(count)]
        self._fits = 32767 // (2 * 127 * _largest(bits))

    @property
    def offset(self) -> int:
        """128 for 8 bits."""
        return _offset(self.bits)

    def step(self, i: int, codes: Expr, inputs: Expr) -> None:
        """Two instructions, and an addition."""
        spread = T.Bind(T.reinterpret("int8x32", T.broadcast(inputs, 8)))
        pending = self._pending[i]
        products = [self._products(half, spread) for half in _halves(codes, 8)]
        if pending:
            products = [T.Bind(a + b) for a, b in zip(pending[-1], products, strict=True)]
        pending.append(products)
        if len(pending) == self._fits:
            self._widen(i)

    def _products(self, codes: Expr, spread: Expr) -> Expr:
        codes = T.Bind(T.reinterpret("int8x32", codes))
        if self.bits == 8:
            signed = T.Bind(codes ^ T.broadcast(T.int8(-128), 32))
            codes, spread = _sign(signed, signed), _sign(spread, signed)
        return T.Bind(tirx.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", codes, spread))

    def _widen(self, i: int) -> None:
        ones, parts = T.broadcast(T.int16(1), 16), self._pending[i][-1]
        wide = [tirx.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", part, ones) for part in parts]
        self._sums.add(i, T.vectorcombine("int32x16", *wide))
        self._pending[i] = []

    def pause(self) -> None:
        """Widens what is pending."""
        for i, pending in enumerate(self._pending):
            if pending:
                self._widen(i)


class Pmaddwd(Leaf):
    """pmaddwd (SSE2, every x86-64): the even and the odd codes as pairs of 16 bits."""

    def dot(self, total: Expr, codes: Expr, inputs: Expr) -> Expr:
        """Eight instructions."""
        for j in range(2):
            low, high = _byte(inputs, j), _byte(inputs, j + 2)
            pair = T.Bind((low & T.int32(0xFFFF)) | (high << T.int32(16)))
            spread = T.Bind(T.reinterpret("int16x8", T.broadcast(pair, 4)))
            words = T.Bind((codes >> splat_int(8 * j, LANES)) & splat_int(0x00FF00FF, LANES))

            def quarter(total: Expr, words: Expr, spread: Expr = spread) -> Expr:
                name = "llvm.x86.sse2.pmadd.wd"
                pairs = T.reinterpret("int16x8", words)
                return total + tirx.call_llvm_pure_intrin("int32x4", name, pairs, spread)

            total = T.Bind(split_vector(quarter, 4, total, words))
        return total


class Words(Leaf):
    """Products in 16 bits, as many added as fit before they are widened: where there are no dot products.

    LLVM makes smlal of it, and vwmacc.
    """

    def __init__(self, bits: int, make: Callable[[int, str], Any], count: int) -> None:
        super().__init__(bits, make, count)
        self._pending: list[Expr] = [None] * count
        self._steps = [0] * count
        self._fits = 32767 // (127 * _largest(bits))

    @property
    def offset(self) -> int:
        """128 for 8 bits."""
        return _offset(self.bits)

    def step(self, i: int, codes: Expr, inputs: Expr) -> None:
        """Signed 8 bits by signed 8 bits."""
        if self.bits == 8:
            codes = codes ^ splat_int(_SIGN_BITS, LANES)
        spread = T.cast(T.reinterpret("int8x64", T.broadcast(inputs, LANES)), "int16x64")
        product = T.cast(T.reinterpret("int8x64", codes), "int16x64") * spread
        pending = self._pending[i]
        self._pending[i] = T.Bind(product if pending is None else pending + product)
        self._steps[i] += 1
        if self._steps[i] == self._fits:
            self._widen(i)

    def _widen(self, i: int) -> None:
        """A row's four sums of 16 bits are halves of two lanes of 32."""
        pairs = T.Bind(T.reinterpret("int32x32", self._pending[i]))
        sums = T.Bind(((pairs << splat_int(16, 32)) >> splat_int(16, 32)) + (pairs >> splat_int(16, 32)))
        two = T.Bind(T.reinterpret("int64x16", sums))
        self._sums.add(
            i, T.cast(two, "int32x16") + T.cast(two >> T.broadcast(T.int64(32), LANES), "int32x16")
        )
        self._pending[i], self._steps[i] = None, 0

    def pause(self) -> None:
        """Widens what is pending."""
        for i, steps in enumerate(self._steps):
            if steps:
                self._widen(i)


class Sdot(Leaf):
    """Four sdot (NEON with dot products): s8 by s8, so that codes of 8 bits are taken less 128."""

    @property
    def offset(self) -> int:
        """128 for 8 bits."""
        return _offset(self.bits)

    def dot(self, total: Expr, codes: Expr, inputs: Expr) -> Expr:
        """Quarters."""
        spread = T.Bind(T.reinterpret("int8x16", T.broadcast(inputs, 4)))
        if self.bits == 8:
            codes = T.Bind(codes ^ splat_int(_SIGN_BITS, LANES))

        def quarter(total: Expr, codes: Expr) -> Expr:
            name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
            return tirx.call_llvm_pure_intrin("int32x4", name, total, T.reinterpret("int8x16", codes), spread)

        return split_vector(quarter, 4, total, codes)


class Usdot(Leaf):
    """Four usdot (NEON with the 8-bit matrix extension): u8 codes by s8 inputs."""

    def dot(self, total: Expr, codes: Expr, inputs: Expr) -> Expr:
        """Quarters."""
        spread = T.Bind(T.reinterpret("int8x16", T.broadcast(inputs, 4)))

        def quarter(total: Expr, codes: Expr) -> Expr:
            name = "llvm.aarch64.neon.usdot.v4i32.v16i8"
            return tirx.call_llvm_pure_intrin("int32x4", name, total, T.reinterpret("int8x16", codes), spread)

        return split_vector(quarter, 4, total, codes)


def _offset(bits: int) -> int:
    """What makes signed bytes of codes."""
    return 128 if bits == 8 else 0


def _largest(bits: int) -> int:
    """The largest magnitude of a code less `_offset`."""
    return 128 if bits == 8 else (1 << bits) - 1


def _byte(inputs: Expr, j: int) -> Expr:
    """One of four signed bytes, i32."""
    return T.Bind((inputs << T.int32(24 - 8 * j)) >> T.int32(24))


def _sign(values: Expr, by: Expr) -> Expr:
    return T.Bind(tirx.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", values, by))


def _halves(vector: Expr, lanes: int) -> list[Expr]:
    kind = f"int32x{lanes}"
    return [T.vectorlow(kind, vector), T.vectorhigh(kind, vector)]


def split_vector(body: Callable[..., Expr], lanes: int, *operands: Expr, width: int = LANES) -> Expr:
    """`body` on parts of `lanes` lanes of i32 vectors, put together again."""
    if width == lanes:
        return body(*operands)
    operands = tuple(T.Bind(o) for o in operands)
    low, high = zip(*(_halves(o, width // 2) for o in operands), strict=True)
    parts = [split_vector(body, lanes, *part, width=width // 2) for part in (low, high)]
    return T.vectorcombine(f"int32x{width}", *parts)


LEAVES: Final[Mapping[str, type[Leaf]]] = {
    "words": Words,
    "pmaddwd": Pmaddwd,
    "maddubs": Maddubs,
    "vnni256": Vnni256,
    "vnni512": Vnni512,
    "sdot": Sdot,
    "usdot": Usdot,
}
