"""Writing a kernel as blocks of threads, for a GPU or for a CPU that does the same one after the other.

    with kernel() as k:
        x, y = k.arg("x", (n, 64)), k.arg("y", (n,))
        with blocks((n,), 64, device=True) as g:
            (row,) = g.block
            total = g.registers(1)
            with g.threads() as t:
                total.set(0, x[row, t])
            over_block(g, total, add)
            with g.threads() as t:
                ...

A phase, the `with g.threads()` block, is what each thread does between two barriers. On a GPU the phases
follow one another with barriers between them; on a CPU each phase is a loop over the threads. Both are the
same arithmetic on the same memory in the same layout, which is how a kernel is tested without a GPU. Loops
and conditions around phases must be the same for all threads of a block.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

from gammac.targets.tvm.tir.vectors import T

WARP: Final = 32
_AXES: Final = ("blockIdx.x", "blockIdx.y")
_EVERY_LANE: Final = 0xFFFFFFFF

Expr = Any
Combine = Callable[[Expr, Expr], Expr]


@dataclass(eq=False)
class Grid:
    """A launch under construction: `size` threads in each block, `block` its place on each axis."""

    size: int
    device: bool
    block: tuple[Expr, ...]
    thread: Expr = field(default=None)

    @contextmanager
    def threads(self, *, barrier: bool = True) -> Iterator[Expr]:
        """A phase: yields the thread. `barrier`: behind the phase before, whose shared memory it uses."""
        if self.device:
            if barrier:
                T.evaluate(T.tvm_storage_sync("shared"))
            yield self.thread
            return
        with T.serial(0, self.size) as self.thread:
            yield self.thread

    def shared(self, count: int, dtype: str = "float32") -> Any:
        """Memory that the threads of a block share."""
        return T.alloc_buffer((count,), dtype, scope="shared" if self.device else "global")

    def locals(self, count: int, dtype: str = "float32") -> Any:
        """A thread's own memory within one phase."""
        return T.alloc_buffer((count,), dtype, scope="local" if self.device else "global")

    def registers(self, count: int, dtype: str = "float32") -> "Registers":
        """A thread's own values, kept from phase to phase."""
        buffer = self.locals(count if self.device else count * self.size, dtype)
        return Registers(self, buffer, count)

    def each(self, count: int, body: Callable[[Expr], None]) -> None:
        """`body(i)` for i below `count`, shared out between the threads of the phase under construction."""
        rounds = -(-count // self.size)
        with T.serial(0, rounds) as i:
            index = T.Bind(i * self.size + self.thread)
            when(index < count if count % self.size else None, lambda: body(index))


@dataclass(frozen=True, eq=False)
class Registers:
    """`count` values of each thread."""

    grid: Grid
    buffer: Any
    count: int

    def place(self, i: Expr) -> Expr:
        """Where value i of the thread of the phase is."""
        return i if self.grid.device else self.grid.thread * self.count + i

    def get(self, i: Expr = 0) -> Expr:
        """Value i."""
        return self.buffer[self.place(i)]

    def set(self, i: Expr, value: Expr) -> None:
        """Write value i."""
        T.buffer_store(self.buffer, value, [self.place(i)])

    def fill(self, value: float) -> None:
        """Write all of them."""
        for i in range(self.count):
            self.set(i, T.float32(value))


@contextmanager
def blocks(extents: tuple[Expr, ...], size: int, *, device: bool) -> Iterator[Grid]:
    """Launch as many blocks of `size` threads as the product of one or two extents."""
    if device:
        with ExitStack() as stack:
            axes = _AXES[: len(extents)]
            place = [stack.enter_context(T.launch_thread(a, e)) for a, e in zip(axes, extents, strict=True)]
            thread = stack.enter_context(T.launch_thread("threadIdx.x", size))
            yield Grid(size, device, tuple(place), thread)
        return
    with T.parallel(0, prod(extents)) as unit:
        place = [unit] if len(extents) == 1 else [unit % extents[0], unit // extents[0]]
        yield Grid(size, device, tuple(T.Bind(p) for p in place))


def when(condition: Expr | None, body: Callable[[], None]) -> None:
    """`body()` where a condition holds; always for None."""
    if condition is None:
        body()
        return
    with T.If(condition), T.Then():
        body()


def over_lanes(registers: Registers, combine: Combine) -> None:
    """Each value becomes the combination of those of all threads of the warp. Stands between phases."""
    g, buffer, count = registers.grid, registers.buffer, registers.count
    if g.device:
        for i in range(count):
            for distance in (16, 8, 4, 2, 1):
                other = T.tvm_warp_shuffle_xor(T.uint32(_EVERY_LANE), buffer[i], distance, WARP, WARP)
                T.buffer_store(buffer, combine(buffer[i], other), [i])
        return
    total = T.alloc_buffer((1,), buffer.dtype)
    with T.serial(0, g.size // WARP) as warp, T.serial(0, count) as i:
        first = T.Bind(warp * WARP * count + i)
        T.buffer_store(total, buffer[first], [0])
        with T.serial(0, WARP - 1) as lane:
            T.buffer_store(total, combine(total[0], buffer[first + (lane + 1) * count]), [0])
        with T.serial(0, WARP) as lane:
            T.buffer_store(buffer, total[0], [first + lane * count])


def over_block(registers: Registers, combine: Combine) -> None:
    """Each value becomes the combination of those of all threads of the block. Stands between phases."""
    over_lanes(registers, combine)
    g, count = registers.grid, registers.count
    warps = g.size // WARP
    if warps == 1:
        return
    scratch = g.shared(warps * count)
    with g.threads() as t:

        def write() -> None:
            for i in range(count):
                T.buffer_store(scratch, registers.get(i), [t // WARP * count + i])

        when(t % WARP == 0, write)
    with g.threads():
        for i in range(count):
            value = scratch[i]
            for warp in range(1, warps):
                value = combine(value, scratch[warp * count + i])
            registers.set(i, value)
