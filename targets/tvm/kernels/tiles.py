"""Sums of a tile, panels by tokens, over one segment of the inputs: with inputs in f32 or in int8.

In f32 a code is moved into the mantissa of 2^23, so that taking off 2^23 + zero converts it exactly. With
int8 inputs a leaf multiplies; its sums start at -zero * sum(inputs), so that they are exact to the end.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from gammac.targets.tvm.kernels.codebook import LARGEST, as_bytes, as_floats
from gammac.targets.tvm.kernels.isa import Isa
from gammac.targets.tvm.kernels.layout import PANEL, STEP, Layout
from gammac.targets.tvm.kernels.leaves import LEAVES
from gammac.targets.tvm.kernels.operands import flat
from gammac.targets.tvm.kernels.panel import Panel
from gammac.targets.tvm.tir.vectors import T, load, splat, splat_int, store

Expr = Any

_MAGIC: Final = 0x4B000000  # 2^23 in f32
_MAGIC_VALUE: Final = 8388608.0
# sums that one token's product is spread over: adding has a latency
_CHAINS: Final = 4


class Registers:
    """Vectors of 16 that live in memory of 64 bytes each, which LLVM turns into registers."""

    def __init__(self, count: int, dtype: str = "float32") -> None:
        self._buffers = [T.alloc_buffer((PANEL,), dtype) for _ in range(count)]

    def set(self, i: int, value: Expr) -> None:
        """Write one."""
        store(self._buffers[i], value, 0)

    def get(self, i: int, start: Expr = 0, lanes: int = PANEL) -> Expr:
        """Read one, or a part of it."""
        return load(self._buffers[i], start, lanes=lanes)

    def add(self, i: int, value: Expr) -> None:
        """Add to one."""
        self.set(i, self.get(i) + value)

    def clear(self) -> None:
        """All are zero."""
        for i in range(len(self._buffers)):
            self.set(i, splat(0.0, PANEL))


class Tile:
    """Tokens whose rows of x are `tokens`, for `panels` panels at a time."""

    operand = "x"

    def __init__(
        self, layout: Layout, isa: Isa, buffers: Mapping[str, Any], panels: int, tokens: list[Expr]
    ) -> None:
        self.layout, self.isa, self.buffers = layout, isa, buffers
        self.panels, self.tokens = panels, tokens
        x = buffers[self.operand]
        self._x, self._width = flat(x), x.shape[1]
        self._bases: list[Expr] = []

    def seek(self, column: Expr) -> None:
        """Inputs are from this column on."""
        self._bases = [T.Bind(token * self._width + column) for token in self.tokens]

    def zero(self, panel: Panel, group: Expr) -> Any:
        """A group's zeros, as `begin` and `steps` want them."""
        raise NotImplementedError

    def scale(self, panel: Panel, group: Expr) -> Expr:
        """A group's scales f32x16, of the numbers that `steps` multiplies by."""
        return panel.scale(group)

    def begin(self, zeros: list[Any], segment: Expr) -> None:
        """A new segment."""
        raise NotImplementedError

    def steps(self, panels: list[Panel], zeros: list[Any], start: int, end: int) -> None:
        """Add inputs start..end, counted from where the panels and the tile stand."""
        raise NotImplementedError

    def sums(self, segment: Expr) -> list[list[Expr]]:
        """f32x16 for each panel and token."""
        raise NotImplementedError

    def plain(self, segment: Expr) -> list[Expr]:
        """The sum of each token's inputs, f32x16 with equal lanes. Only for formats around offsets."""
        raise NotImplementedError


class FloatTile(Tile):
    """x f32 [tokens, columns]."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._chains = _CHAINS if len(self.tokens) == 1 else 1
        self._state = Registers(self.panels * len(self.tokens) * self._chains)
        self._plain = Registers(len(self.tokens) if self.layout.around else 0)

    def zero(self, panel: Panel, group: Expr) -> Any:
        """2^23 + zero."""
        zero = panel.zero(group)
        if isinstance(zero, int):
            return splat(_MAGIC_VALUE + zero, PANEL)
        return T.Bind(T.cast(zero, "float32x16") + splat(_MAGIC_VALUE, PANEL))

    def begin(self, zeros: list[Any], segment: Expr) -> None:
        """All sums are zero."""
        self._state.clear()
        self._plain.clear()

    def steps(self, panels: list[Panel], zeros: list[Any], start: int, end: int) -> None:
        """code - zero times input."""
        for k in range(start, end, STEP):
            words = [panel.codes(k) for panel in panels]
            for j in range(min(STEP, end - k)):
                for t, base in enumerate(self._bases if self.layout.around else []):
                    self._plain.add(t, splat(self._x[base + (k + j)], PANEL))
                for p, word in enumerate(words):
                    code = (word >> splat_int(8 * j, PANEL)) & splat_int(255, PANEL)
                    value = self._value(code, zeros[p])
                    for t, base in enumerate(self._bases):
                        register = (p * len(self._bases) + t) * self._chains + j % self._chains
                        self._state.add(register, value * splat(self._x[base + (k + j)], PANEL))

    def _value(self, code: Expr, zero: Expr) -> Expr:
        if self.layout.levels:
            return as_floats(code, self.layout.levels)
        return T.Bind(T.reinterpret("float32x16", code | splat_int(_MAGIC, PANEL)) - zero)

    def sums(self, segment: Expr) -> list[list[Expr]]:
        """The chains of each together."""
        return [
            [self._total(p * len(self.tokens) + t) for t in range(len(self.tokens))]
            for p in range(self.panels)
        ]

    def plain(self, segment: Expr) -> list[Expr]:
        """Kept beside the products."""
        return [self._plain.get(t) for t in range(len(self.tokens))]

    def _total(self, which: int) -> Expr:
        parts = [self._state.get(which * self._chains + i) for i in range(self._chains)]
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return T.Bind(parts[0])


class IntegerTile(Tile):
    """x_codes int8 [tokens, padded columns] with scales and sums: see `quantize_activations`."""

    operand = "x_codes"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        count = self.panels * len(self.tokens)
        self._leaf = LEAVES[self.isa.leaf](self.layout.value_bits, Registers, count)

    def zero(self, panel: Panel, group: Expr) -> Any:
        """-zero, i32x16, or the number that all have."""
        zero = panel.zero(group)
        if isinstance(zero, int):
            return self._leaf.offset - zero
        return T.Bind(splat_int(self._leaf.offset, PANEL) - zero)

    def scale(self, panel: Panel, group: Expr) -> Expr:
        """Levels are bytes: their scale is a 127th."""
        scale = panel.scale(group)
        return T.Bind(scale * splat(1 / LARGEST, PANEL)) if self.layout.levels else scale

    def begin(self, zeros: list[Any], segment: Expr) -> None:
        """-zero times the sum of the inputs."""
        tokens = len(self.tokens)
        for t, token in enumerate(self.tokens):
            total = T.Bind(self.buffers["x_sums"][token, segment])
            for p, zero in enumerate(zeros):
                same = isinstance(zero, int)
                first = T.broadcast(total * zero, PANEL) if same else zero * T.broadcast(total, PANEL)
                self._leaf.start(p * tokens + t, first)

    def steps(self, panels: list[Panel], zeros: list[Any], start: int, end: int) -> None:
        """Four inputs at a time."""
        for k in range(start, end, STEP):
            words = [self._codes(panel, k) for panel in panels]
            for t, base in enumerate(self._bases):
                inputs = T.Bind(T.reinterpret("int32", self._x[T.ramp(base + k, 1, STEP)]))
                for p, word in enumerate(words):
                    self._leaf.step(p * len(self._bases) + t, word, inputs)
        self._leaf.pause()

    def _codes(self, panel: Panel, k: int) -> Expr:
        codes = panel.codes(k)
        return as_bytes(codes, self.layout.levels, self.isa.leaf) if self.layout.levels else codes

    def sums(self, segment: Expr) -> list[list[Expr]]:
        """Times the scale of the inputs."""
        tokens = len(self.tokens)
        scales = [T.Bind(splat(self.buffers["x_scales"][t, segment], PANEL)) for t in self.tokens]

        def one(p: int, t: int) -> Expr:
            return T.Bind(T.cast(self._leaf.sums(p * tokens + t), "float32x16") * scales[t])

        return [[one(p, t) for t in range(tokens)] for p in range(self.panels)]

    def plain(self, segment: Expr) -> list[Expr]:
        """`quantize_activations` has counted."""
        x_sums, x_scales = self.buffers["x_sums"], self.buffers["x_scales"]
        values = (T.cast(x_sums[t, segment], "float32") * x_scales[t, segment] for t in self.tokens)
        return [T.Bind(splat(value, PANEL)) for value in values]


TILES: Final[Mapping[bool, Callable[..., Tile]]] = {False: FloatTile, True: IntegerTile}
