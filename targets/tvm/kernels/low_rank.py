"""Low-rank branches beside packed weights: y = x @ weight.T + (x @ a.T) @ b.T.

The first factor is computed once for all branches that read x: in a kernel of its own or, for one token in
int8, in the kernel that rounds x. Its rows lie as they are, for a rank of 8 would fill half of a panel. The
second is added to the sums of the packed weight, from panels:

    a  f32 [ranks of all branches, inputs]     b  f32 [panels, rank, 16]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gammac.targets.tvm.kernels.layout import PANEL, Layout
from gammac.targets.tvm.kernels.operands import Operand
from gammac.targets.tvm.kernels.tiles import Registers
from gammac.targets.tvm.tir.vectors import (
    Accumulator,
    T,
    add,
    chunks,
    kernel,
    load,
    rows_of,
    shared_out,
    splat,
)

Expr = Any

LOW: Final = "x_low"
# rows of x and of a whose products are summed together
_ONE, _MANY = (1, 4), (3, 2)
# ranks that are summed before they go to the total: adding has a latency
_AT_ONCE: Final = 4


@dataclass(frozen=True)
class Branch:
    """What a packed weight's branch reads: `rank` columns of x @ a.T [tokens, width], from `first` on."""

    rank: int
    first: int
    width: int


# ---- the first factor -----------------------------------------------------------------------------


def low_rank(rows: int | None, rank: int, inputs: int, eps: float | None) -> Any:
    """(x [rows, inputs], norm [inputs] if there is an eps, a [rank, inputs]) → y [rows, rank] = x @ a.T

    With `eps`, of x * norm / sqrt(mean(x^2) + eps): the root is taken of the sums, x is read once.
    """
    with kernel() as k:
        n = rows_of(rows)
        x, norm = k.arg("x", (n, inputs)), k.arg("norm", (inputs,)) if eps is not None else None
        a, y = k.arg("a", (rank, inputs)), k.arg("y", (n, rank))
        product = FirstFactor(x, norm, a, y)
        if rows == 1:
            product.write_one(0, product.factors([0], eps))
        else:
            tokens, at_once = _MANY
            with T.parallel(0, (n + tokens - 1) // tokens) as tile:
                # rows behind the end repeat the last one
                row = [T.Bind(T.min(tile * tokens + i, n - 1)) for i in range(tokens)]
                factors = product.factors(row, eps)
                with T.serial(0, -(-rank // at_once)) as block:
                    product.write(row, factors, block, at_once)
    return k.primfunc


@dataclass(frozen=True, eq=False)
class FirstFactor:
    """The buffers of x @ a.T: see `low_rank`."""

    x: Any
    norm: Any | None
    a: Any
    y: Any

    def write_one(self, row: Expr, factors: list[Expr]) -> None:
        """The whole of a row, shared out between threads if it is long."""
        rank, inputs = (int(size) for size in self.a.shape)
        tokens, at_once = _ONE
        with shared_out(-(-rank // at_once), 4 * rank * inputs) as block:
            self.write([row] * tokens, factors, block, at_once)

    def factors(self, rows: list[Expr], eps: float | None) -> list[Expr]:
        """One over the root mean square of each row; nothing without an eps."""
        if eps is None:
            return []
        inputs, found = int(self.a.shape[1]), []
        for row in rows:
            squares = Accumulator(0.0, add)

            def square(start: Expr, lanes: int, row: Expr = row, squares: Accumulator = squares) -> None:
                value = T.Bind(load(self.x, row, start, lanes=lanes))
                squares.take(value * value, lanes)

            chunks(inputs, square)
            mean = squares.result() * T.float32(1 / inputs)
            found.append(T.Bind(T.float32(1) / T.sqrt(mean + T.float32(eps))))
        return found

    def write(self, rows: list[Expr], factors: list[Expr], block: Expr, at_once: int) -> None:
        """y of some rows and of a block of ranks; what is behind the last rank repeats it."""
        rank, inputs = (int(size) for size in self.a.shape)
        ranks = [T.Bind(T.min(block * at_once + i, rank - 1)) for i in range(at_once)]
        sums = [[Accumulator(0.0, add) for _ in ranks] for _ in rows]

        def step(start: Expr, lanes: int) -> None:
            weights = [T.Bind(load(self.a, r, start, lanes=lanes)) for r in ranks]
            for row, own in zip(rows, sums, strict=True):
                value = load(self.x, row, start, lanes=lanes)
                value = T.Bind(value if self.norm is None else value * load(self.norm, start, lanes=lanes))
                for weight, total in zip(weights, own, strict=True):
                    total.take(value * weight, lanes)

        chunks(inputs, step)
        for t, (row, own) in enumerate(zip(rows, sums, strict=True)):
            for r, total in zip(ranks, own, strict=True):
                value = total.result() * factors[t] if factors else total.result()
                T.buffer_store(self.y, value, [row, r])


# ---- the second -----------------------------------------------------------------------------------


def branch_operands(layout: Layout, branch: Branch | None, suffix: str = "") -> tuple[Operand, ...]:
    """b, where a weight has a branch."""
    if branch is None:
        return ()
    return (Operand(f"b{suffix}", (layout.panels, branch.rank, PANEL), "float32"),)


def low_operands(tokens: int | str, *branches: Branch | None) -> tuple[Operand, ...]:
    """x @ a.T, of which all the branches of a kernel read their own columns."""
    widths = {branch.width for branch in branches if branch is not None}
    assert len(widths) <= 1, "branches of one kernel read one product"
    return tuple(Operand(LOW, (tokens, width), "float32") for width in widths)


def add_branch(
    branch: Branch, buffers: Mapping[str, Any], panels: list[Expr], tokens: list[Expr], total: Registers
) -> None:
    """total[panel, token] += b @ low, for the panels and tokens of a tile."""
    whole, rest = divmod(branch.rank, _AT_ONCE)

    def ranks(begin: Expr, count: int) -> None:
        lows = [
            [splat(buffers[LOW][token, branch.first + begin + i], PANEL) for i in range(count)]
            for token in tokens
        ]
        for p, panel in enumerate(panels):
            columns = [T.Bind(load(buffers["b"], panel, begin + i, 0)) for i in range(count)]
            for t, low in enumerate(lows):
                value = columns[0] * low[0]
                for column, one in zip(columns[1:], low[1:], strict=True):
                    value = value + column * one
                total.add(p * len(tokens) + t, value)

    if whole:
        with T.serial(0, whole) as i:
            ranks(i * _AT_ONCE, _AT_ONCE)
    if rest:
        ranks(whole * _AT_ONCE, rest)
