"""The weight's side of a kernel: vectors of codes, scales and zeros of one panel."""

from collections.abc import Mapping
from typing import Any, Final

from gammac.formats import TwoFourFormat
from gammac.formats.two_four import PATTERN_BITS, PATTERNS
from gammac.targets.tvm.kernels.layout import ALIGN, PANEL, STEP, Layout
from gammac.targets.tvm.tir.vectors import T, load, splat_int

Expr = Any

# bytes of codes that are asked for ahead of their use
PREFETCH: Final = 4096
# four bits a pattern: its two positions
_PLACES: Final = sum((first | second << 2) << 4 * n for n, (first, second) in enumerate(PATTERNS))


class Panel:
    """One panel of a packed weight whose buffers are `buffers`."""

    def __init__(self, layout: Layout, buffers: Mapping[str, Any], number: Expr, *, prefetch: bool) -> None:
        self.layout, self.number, self._buffers, self._prefetch = layout, number, buffers, prefetch
        self._base: Expr = None
        self._loaded: dict[int, list[list[Expr]]] = {}
        self._words: dict[tuple[int, int, int], Expr] = {}

    def seek(self, superstep: Expr) -> None:
        """Places in `codes` are from this superstep on."""
        self._base = T.Bind(superstep * self.layout.superstep_bytes)
        self._loaded, self._words = {}, {}

    def codes(self, k: int) -> Expr:
        """Codes of the step `k` inputs behind the place sought, i32x16: a row's four, a byte each."""
        which, step = divmod(k, self.layout.superstep)
        if which not in self._loaded:
            self._loaded[which] = self._load(which)
        step //= STEP
        if not self.layout.index_planes:
            return self._word(self.layout.planes, self._loaded[which], step)
        values, places = (self._shared(which, part, step) for part in (0, 1))
        return T.Bind(self._expanded(values, step % 2, places, step % STEP))

    def _shared(self, which: int, part: int, step: int) -> Expr:
        """The word of codes (part 0) or of positions (1) that a step reads and others with it."""
        layout, count = self.layout, len(self.layout.planes)
        planes, steps = ((layout.planes, layout.per_lane), (layout.index_planes, STEP))[part]
        key = (which, part, step // steps)
        if key not in self._words:
            loaded = self._loaded[which][count:] if part else self._loaded[which][:count]
            self._words[key] = self._word(planes, loaded, step // steps)
        return self._words[key]

    def _word(self, planes: tuple[int, ...], vectors: list[list[Expr]], step: int) -> Expr:
        """The bytes of a step, put together from their planes."""
        word, low = None, 0
        for bits, plane in zip(planes, vectors, strict=True):
            per_byte = 8 // bits
            part = _field(plane[step // per_byte], bits, bits * (step % per_byte), low)
            word = part if word is None else word | part
            low += bits
        return T.Bind(word)

    def _expanded(self, values: Expr, half: int, places: Expr, byte: int) -> Expr:
        """A row's two kept codes at their places, the midpoint, which stands for zero, elsewhere."""
        assert isinstance(self.layout.format, TwoFourFormat)
        zeros = splat_int(_each_byte(self.layout.format.grid.midpoint), PANEL)
        values = values ^ zeros  # so that nothing is what a pruned weight adds
        if self.layout.format.index_bits == PATTERN_BITS:
            number = _shifted(places, 8 * byte - 2, 28)
            places, byte = splat_int(_PLACES, PANEL) >> number, 0
        first = _shifted(values, 16 * half, 255) << _shifted(places, 8 * byte - 3, 24)
        second = _shifted(values, 16 * half + 8, 255) << _shifted(places, 8 * byte - 1, 24)
        return zeros ^ first ^ second

    def _load(self, which: int) -> list[list[Expr]]:
        """The vectors of each plane of a superstep, codes before positions."""
        layout, offset = self.layout, which * self.layout.superstep_bytes
        planes = []
        lanes = [(bits, layout.per_lane) for bits in layout.planes]
        for bits, steps in (*lanes, *((bits, STEP) for bits in layout.index_planes)):
            count = layout.superstep // (STEP * steps) * bits // 8
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

    def offset(self, group: Expr) -> Expr:
        """f32x16."""
        return T.Bind(T.cast(load(self._buffers["offsets"], self.number, group, 0), "float32x16"))

    def zero(self, group: Expr) -> Expr | int:
        """i32x16, or the number that all have."""
        if self.layout.same_zero is not None:
            return self.layout.same_zero
        return T.Bind(T.cast(load(self._buffers["zeros"], self.number, group, 0), "int32x16"))


def _field(vector: Expr, bits: int, shift: int, low: int) -> Expr:
    """`bits` bits from bit `shift` of each byte, moved to bit `low`."""
    if bits == 8:
        return vector
    mask = _each_byte(((1 << bits) - 1) << low)
    if shift > low:
        vector = vector >> splat_int(shift - low, PANEL)
    elif shift < low:
        vector = vector << splat_int(low - shift, PANEL)
    return vector & splat_int(mask, PANEL)


def _each_byte(value: int) -> int:
    """The i32 whose four bytes are `value`."""
    return int.from_bytes(bytes([value] * 4), "little", signed=True)


def _shifted(vector: Expr, right: int, mask: int) -> Expr:
    """Some bits of each lane, moved down by `right`, or up where it is negative."""
    if right:
        vector = vector >> splat_int(right, PANEL) if right > 0 else vector << splat_int(-right, PANEL)
    return vector & splat_int(mask, PANEL)
