"""The weight's side of a kernel: vectors of codes, scales and zeros of one panel."""

from collections.abc import Mapping
from typing import Any, Final

from gammac.targets.tvm.kernels.layout import ALIGN, PANEL, STEP, Layout
from gammac.targets.tvm.tir.vectors import T, load, splat_int

Expr = Any

# bytes of codes that are asked for ahead of their use
PREFETCH: Final = 4096


class Panel:
    """One panel of a packed weight whose buffers are `buffers`."""

    def __init__(self, layout: Layout, buffers: Mapping[str, Any], number: Expr, *, prefetch: bool) -> None:
        self.layout, self.number, self._buffers, self._prefetch = layout, number, buffers, prefetch
        self._base: Expr = None
        self._loaded: dict[int, list[list[Expr]]] = {}

    def seek(self, superstep: Expr) -> None:
        """Places in `codes` are from this superstep on."""
        self._base = T.Bind(superstep * self.layout.superstep_bytes)
        self._loaded = {}

    def codes(self, k: int) -> Expr:
        """Codes of the step `k` inputs behind the place sought, i32x16: a row's four, a byte each."""
        which, step = divmod(k, self.layout.superstep)
        if which not in self._loaded:
            self._loaded[which] = self._load(which)
        step //= STEP
        word, low = None, 0
        for bits, plane in zip(self.layout.planes, self._loaded[which], strict=True):
            per_byte = 8 // bits
            part = _field(plane[step // per_byte], bits, bits * (step % per_byte), low)
            word = part if word is None else word | part
            low += bits
        return T.Bind(word)

    def _load(self, which: int) -> list[list[Expr]]:
        """The vectors of each plane of a superstep."""
        layout, offset = self.layout, which * self.layout.superstep_bytes
        planes = []
        for bits in layout.planes:
            count = layout.superstep // STEP * bits // 8
            planes.append([self._vector(offset + i * ALIGN) for i in range(count)])
            offset += count * ALIGN
        return planes

    def _vector(self, offset: int) -> Expr:
        codes = self._buffers["codes"]
        vector = T.Bind(T.reinterpret("int32x16", codes[self.number, T.ramp(self._base + offset, 1, ALIGN)]))
        if self._prefetch:
            ahead = T.address_of(codes[self.number, self._base + (offset + PREFETCH)])
            T.evaluate(T.call_intrin("void", "tirx.prefetch", ahead, 0, 3, 1))
        return vector

    def scale(self, group: Expr) -> Expr:
        """f32x16."""
        return T.Bind(T.cast(load(self._buffers["scales"], self.number, group, 0), "float32x16"))

    def zero(self, group: Expr) -> Expr | int:
        """i32x16, or the number that all have."""
        if self.layout.same_zero is not None:
            return self.layout.same_zero
        return T.Bind(T.cast(load(self._buffers["zeros"], self.number, group, 0), "int32x16"))


def _field(vector: Expr, bits: int, shift: int, low: int) -> Expr:
    """`bits` bits from bit `shift` of each byte, moved to bit `low`."""
    if bits == 8:
        return vector
    mask = int.from_bytes(bytes([((1 << bits) - 1) << low] * 4), "little", signed=True)
    if shift > low:
        vector = vector >> splat_int(shift - low, PANEL)
    elif shift < low:
        vector = vector << splat_int(low - shift, PANEL)
    return vector & splat_int(mask, PANEL)
