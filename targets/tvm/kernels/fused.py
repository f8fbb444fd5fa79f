"""Several weights in one kernel that read the same inputs: gate and up with what joins them, or q, k and v.

Their formats may differ. With int8 inputs their activation groups may not: the inputs are rounded once.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from gammac.diagnostics import CompileError
from gammac.targets.tvm.kernels.isa import Isa
from gammac.targets.tvm.kernels.layout import Layout, Packable, ceil_div
from gammac.targets.tvm.kernels.linear import Job, Sums, over, over_tiles
from gammac.targets.tvm.kernels.low_rank import Branch, branch_operands, low_operands
from gammac.targets.tvm.kernels.operands import Kernel, Operand, activation_operands, declare, weight_operands
from gammac.targets.tvm.kernels.packed import layout_of
from gammac.targets.tvm.tir import vectors
from gammac.targets.tvm.tir.elementwise import FUNCTIONS
from gammac.targets.tvm.tir.vectors import T, load, store

Expr = Any
Gated = Callable[[Expr, Expr, int], Expr]
Branches = tuple[Branch | None, ...]
KINDS: Final = ("codes", "scales", "zeros", "offsets", "b", "bias")
# bytes of one weight that one token's product reads before it turns to the other
_IN_A_ROW: Final = 1 << 19
# and how many such portions there are at least, for threads to share
_PORTIONS: Final = 4


def _inputs(
    layouts: list[Layout], job: Job, branches: Branches, biased: tuple[bool, ...]
) -> tuple[Operand, ...]:
    """The inputs, then the weights: codes0, scales0, zeros0, b0, bias0, codes1 and so on."""
    if job.integer and len({layout.segment for layout in layouts}) > 1:
        sizes = " and ".join(str(layout.segment) for layout in layouts)
        raise CompileError(
            f"weights that share int8 inputs have activation groups of {sizes}",
            hint="give them one group size, or a kernel each",
        )
    inputs = [*activation_operands(layouts[0], job.integer, job.tokens), *low_operands(job.tokens, *branches)]
    for i, (layout, branch, bias) in enumerate(zip(layouts, branches, biased, strict=True)):
        inputs += weight_operands(layout, job.isa, str(i))
        inputs += branch_operands(layout, branch, str(i))
        inputs += [Operand(f"bias{i}", (layout.rows,), "float32")] if bias else []
    return tuple(inputs)


def _part(buffers: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The buffers of weight i by their plain names, and the inputs."""
    own = {kind: buffers[f"{kind}{i}"] for kind in KINDS if f"{kind}{i}" in buffers}
    return {**own, **{name: buffer for name, buffer in buffers.items() if name.startswith("x")}}


def gated_linear(
    formats: tuple[Packable, Packable],
    rows: int,
    columns: int,
    isa: Isa,
    *,
    integer: bool,
    tokens: int | str,
    activation: str = "silu",
    branches: Branches = (None, None),
) -> Kernel:
    """activation(x @ gate.T) * (x @ up.T) → y f32 [tokens, rows]; `tokens` is 1 or "m".

    Raises CompileError for formats that cannot share a kernel.
    """
    layouts = [layout_of(f, rows, columns) for f in formats]
    job = Job.of(isa, integer, tokens, layouts)
    inputs = _inputs(layouts, job, branches, (False, False))
    outputs = (Operand("y", (tokens, rows), "float32"),)
    with vectors.kernel() as made:
        size = job.size()
        buffers = declare((*inputs, *outputs), size)

        def gated(value: Expr, up: Expr, lanes: int) -> Expr:
            return FUNCTIONS[activation](value, lanes=lanes) * up

        if tokens == 1:
            _in_turns(job, layouts, branches, buffers, gated)
        else:
            _together(job, layouts, branches, buffers, size, gated)
    name = job.name("gated", activation, *(f.name for f in formats), f"{rows}x{columns}")
    return Kernel(name, inputs, outputs, made.primfunc)


def _together(
    job: Job, layouts: list[Layout], branches: Branches, buffers: Mapping[str, Any], size: Expr, gated: Gated
) -> None:
    """A tile of gate and the same of up, joined in registers."""

    def body(index: Expr, at: list[Expr]) -> None:
        gate, up = (
            job.sums(layouts[i], _part(buffers, i), index, at, branch) for i, branch in enumerate(branches)
        )

        def write(i: int, token: Expr, row: Expr, start: Expr, lanes: int) -> None:
            value = gated(gate.total.get(i, start, lanes), up.total.get(i, start, lanes), lanes)
            store(buffers["y"], value, token, row, lanes=lanes)

        gate.write(write)

    over_tiles(job, layouts[:1], size, body)


def _in_turns(
    job: Job, layouts: list[Layout], branches: Branches, buffers: Mapping[str, Any], gated: Gated
) -> None:
    """One token: many panels of gate, then the same of up. What gate comes to waits in y.

    A processor reads ahead only where it has read on for a while: going to and fro between two weights after
    each panel of 32 KB takes a quarter off the speed of memory.
    """
    y, panels = buffers["y"], layouts[0].panels
    most = max(layout.panel_bytes for layout in layouts)
    at_once = max(1, min(_IN_A_ROW // most, panels // _PORTIONS))

    def add(i: int, index: Expr) -> None:
        sums = job.sums(layouts[i], _part(buffers, i), index, [0], branches[i])

        def write(which: int, token: Expr, row: Expr, start: Expr, lanes: int) -> None:
            value = sums.total.get(which, start, lanes)
            if i:
                value = gated(load(y, token, row, lanes=lanes), value, lanes)
            store(y, value, token, row, lanes=lanes)

        sums.write(write)

    with over(ceil_div(panels, at_once), layouts) as portion:
        first = T.Bind(portion * at_once)
        here = T.Bind(T.min(panels - first, at_once))
        for i in range(len(layouts)):
            with T.serial(0, here) as panel:
                add(i, first + panel)


def stacked_linear(
    formats: tuple[Packable, ...],
    rows: tuple[int, ...],
    columns: int,
    isa: Isa,
    *,
    integer: bool,
    tokens: int | str,
    branches: Branches = (),
    biased: tuple[bool, ...] = (),
) -> Kernel:
    """x by several weights, one below the other, in one launch → y f32 [tokens, sum of rows].

    For weights of different formats or with branches; those of one format are packed as one
    (`formats.concat_rows`). Raises CompileError for formats that cannot share a kernel.
    """
    branches, biased = branches or (None,) * len(rows), biased or (False,) * len(rows)
    layouts = [layout_of(f, n, columns) for f, n in zip(formats, rows, strict=True)]
    job = Job.of(isa, integer, tokens, layouts)
    inputs = _inputs(layouts, job, branches, biased)
    outputs = (Operand("y", (tokens, sum(rows)), "float32"),)
    many = [job.tiles(layout) for layout in layouts]
    with vectors.kernel() as made:
        size = job.size()
        buffers = declare((*inputs, *outputs), size)

        def one(i: int, index: Expr, at: list[Expr]) -> None:
            part = _part(buffers, i)
            sums = job.sums(layouts[i], part, index, at, branches[i])
            _write(buffers["y"], sums, sum(rows[:i]), part.get("bias"))

        def body(index: Expr, at: list[Expr]) -> None:
            _choose(index, many, lambda i, tile: one(i, tile, at))

        over_tiles(job, layouts, size, body)
    sizes = "_".join(f"{f.name}x{n}" for f, n in zip(formats, rows, strict=True))
    return Kernel(job.name("stacked", sizes, columns), inputs, outputs, made.primfunc)


def _write(y: Any, sums: Sums, before: int, bias: Any | None) -> None:
    def write(i: int, token: Expr, row: Expr, start: Expr, lanes: int) -> None:
        value = sums.total.get(i, start, lanes)
        value = value if bias is None else value + load(bias, row, lanes=lanes)
        store(y, value, token, before + row, lanes=lanes)

    sums.write(write)


def _choose(
    index: Expr, many: list[int], body: Callable[[int, Expr], None], i: int = 0, before: int = 0
) -> None:
    """`body(part, tile of it)` for a tile of all parts in a row."""
    if i == len(many) - 1:
        body(i, index - before)
        return
    with T.If(index < before + many[i]):
        with T.Then():
            body(i, index - before)
        with T.Else():
            _choose(index, many, body, i + 1, before + many[i])
