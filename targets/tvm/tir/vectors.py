"""Writing TIR: a function under construction, and vectors of 16 floats.

A vector of 16 is one register with AVX-512, two with AVX2, four with NEON: LLVM splits it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from tvm import tirx as tirx  # type: ignore[import-untyped]
from tvm.script.ir_builder import IRBuilder  # type: ignore[import-untyped]
from tvm.script.ir_builder import tirx as builder_of_tirx

T: Final[Any] = builder_of_tirx
LANES: Final = 16

Expr = Any


class Kernel:
    """A function under construction. `primfunc` is there when the `with` block of `kernel` has ended."""

    primfunc: Any

    def arg(self, name: str, shape: tuple[Any, ...], dtype: str = "float32") -> Any:
        """A tensor that is passed in, in the order of the calls."""
        return T.arg(name, T.buffer(shape, dtype))


@contextmanager
def kernel() -> Iterator[Kernel]:
    """Collects what is written in the block."""
    made = Kernel()
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True, private=True):
            T.func_attr({"tirx.noalias": True})
            yield made
        made.primfunc = builder.get()


def rows_of(rows: int | None) -> Any:
    """A number of rows as a size: a variable for None."""
    return T.int64() if rows is None else rows


def loop(rows: int | None, size: Any) -> Any:
    """The loop over rows; many rows are shared out between threads."""
    return T.serial(0, size) if rows is not None else T.parallel(0, size)


# bytes that are worth a second thread: waking one takes as long as reading these
_SHARED_OUT: Final = 1 << 15


def shared_out(count: int, read: int) -> Any:
    """A loop over parts of one token's work, shared out between threads if the bytes read are worth it."""
    return T.serial(0, count) if read < _SHARED_OUT else T.parallel(0, count)


# ---- vectors ------------------------------------------------------------------------------------


def index(start: Expr, lanes: int) -> Expr:
    """`lanes` places from `start`."""
    return T.ramp(start, 1, lanes) if lanes > 1 else start


def splat(value: Expr, lanes: int) -> Expr:
    """A number in every lane."""
    number = T.float32(value) if isinstance(value, float) else value
    return T.broadcast(number, lanes) if lanes > 1 else number


def splat_int(value: int, lanes: int) -> Expr:
    """An i32 in every lane."""
    return splat(T.int32(value), lanes)


def load(buffer: Any, *place: Expr, lanes: int = LANES) -> Expr:
    """`lanes` elements from a place on."""
    return buffer[(*place[:-1], index(place[-1], lanes))]


def store(buffer: Any, value: Expr, *place: Expr, lanes: int = LANES) -> None:
    """Write `lanes` elements from a place on."""
    T.buffer_store(buffer, value, [*place[:-1], index(place[-1], lanes)])


def chunks(width: int, body: Callable[[Expr, int], None], lanes: int = LANES) -> None:
    """`body(start, lanes)` over `width` elements: whole vectors, then ever smaller ones for the rest."""
    whole = width // lanes
    if whole == 1:
        body(0, lanes)
    elif whole:
        with T.serial(0, whole) as i:
            body(i * lanes, lanes)
    start = whole * lanes
    while start < width:
        lanes //= 2
        if width - start >= lanes:
            body(start, lanes)
            start += lanes


def folded(value: Expr, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """A vector's lanes combined into one, by halves."""
    while lanes > 2:
        lanes //= 2
        value = T.Bind(value)
        value = combine(T.vectorlow(f"float32x{lanes}", value), T.vectorhigh(f"float32x{lanes}", value))
    return combine(tirx.Shuffle([value], [0]), tirx.Shuffle([value], [1]))


def add(a: Expr, b: Expr) -> Expr:
    """a + b"""
    return a + b


class Accumulator:
    """A sum (or maximum) over a row, kept in a vector's lanes until it is asked for."""

    def __init__(self, start: float, combine: Callable[[Expr, Expr], Expr], lanes: int = LANES) -> None:
        self._combine, self._start = combine, start
        self._buffer = T.alloc_buffer((lanes,), "float32")
        self._lanes = lanes
        self.clear()

    def clear(self) -> None:
        """Back to the start."""
        store(self._buffer, splat(float(self._start), self._lanes), 0, lanes=self._lanes)

    def take(self, value: Expr, lanes: int) -> None:
        """Combine a vector with what is there."""
        store(self._buffer, self._combine(load(self._buffer, 0, lanes=lanes), value), 0, lanes=lanes)

    def result(self) -> Expr:
        """All lanes combined."""
        return T.Bind(folded(load(self._buffer, 0, lanes=self._lanes), self._lanes, self._combine))


# ---- functions ----------------------------------------------------------------------------------

# e^r on [-ln 2 / 2, ln 2 / 2]: Cephes' expf, highest power first
EXP: Final = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
# adding it leaves the nearest integer in the low bits
ROUND: Final = 12582912.0
ROUND_BITS: Final = 0x4B400000
# Abramowitz and Stegun 7.1.26, error below 1.5e-7
ERF: Final = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
ERF_P: Final = 0.3275911


def polynomial(coefficients: tuple[float, ...], x: Expr, lanes: int) -> Expr:
    """Horner's rule, highest power first."""
    total = splat(coefficients[0], lanes)
    for c in coefficients[1:]:
        total = total * x + splat(c, lanes)
    return total


def exp(x: Expr, lanes: int) -> Expr:
    """e^x to 2e-7, relative, of lanes of f32; what underflows is about 1e-38.

    Vectors of `T.exp` would become one call of expf a lane.
    """
    ints = f"int32x{lanes}" if lanes > 1 else "int32"
    floats = f"float32x{lanes}" if lanes > 1 else "float32"
    x = T.Bind(T.max(T.min(x, splat(88.0, lanes)), splat(-87.0, lanes)))
    # NOTE minus ROUND would be simplified away; the same number comes out of the bits
    shifted = x * splat(1.44269504088896341, lanes) + splat(ROUND, lanes)
    power = T.Bind(T.reinterpret(ints, shifted) - splat_int(ROUND_BITS, lanes))
    whole = T.Bind(T.cast(power, floats))
    r = T.Bind(x - whole * splat(LN2_HIGH, lanes) - whole * splat(LN2_LOW, lanes))
    y = polynomial(EXP, r, lanes) * r * r + r + splat(1.0, lanes)
    scale = T.reinterpret(floats, T.shift_left(power + splat_int(127, lanes), splat_int(23, lanes)))
    return T.Bind(y * scale)


def sigmoid(x: Expr, lanes: int) -> Expr:
    """1 / (1 + e^-x)"""
    return splat(1.0, lanes) / (splat(1.0, lanes) + exp(splat(0.0, lanes) - x, lanes))


def tanh(x: Expr, lanes: int) -> Expr:
    """1 - 2 / (1 + e^2x)"""
    return splat(1.0, lanes) - splat(2.0, lanes) / (splat(1.0, lanes) + exp(x + x, lanes))


def erf(x: Expr, lanes: int) -> Expr:
    """The error function to 2e-7, absolute."""
    zero, one = splat(0.0, lanes), splat(1.0, lanes)
    x = T.Bind(x)
    size = T.Bind(T.max(x, zero - x))
    t = T.Bind(one / (one + splat(ERF_P, lanes) * size))
    y = T.Bind(one - polynomial(ERF, t, lanes) * t * exp(zero - size * size, lanes))
    return tirx.Select(x < zero, zero - y, y)
