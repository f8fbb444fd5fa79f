"""The rows of the lowering table that move elements about and compute nothing."""

from functools import partial
from typing import Any, Final

import torch
from torch.fx import Node

from gammac.frontend.lowering import DTYPE_NAMES, Lowering, Row, argument, is_flattening, register
from gammac.ir import Dim, Operand

ROWS: Final[dict[str, Row]] = {}
lowers = partial(register, ROWS)


@lowers(
    "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.flatten.using_ints",
    "aten.unflatten.int", "aten.unsqueeze.default", "aten.squeeze.dim", "aten.squeeze.dims",
)  # fmt: skip
def reshape(low: Lowering, node: Node) -> Operand:
    """One reshape for all of them; [batch, seq, n] is not flattened to [batch*seq, n]."""
    x, shape = low.operand(node.args[0]), low.shape(node)
    if x.type.shape == shape or is_flattening(x.type.shape, shape):
        return x
    return low.emit("reshape", x, shape=shape)


@lowers("aten.expand.default")
def expand(low: Lowering, node: Node) -> Operand:
    """expand, unless the shape stays."""
    x, shape = low.exact(node.args[0]), low.shape(node)
    return x if x.type.shape == shape else low.emit("expand", x, shape=shape)


@lowers("aten.transpose.int")
def transpose(low: Lowering, node: Node) -> Operand:
    """Two dimensions swapped."""
    x = low.exact(node.args[0])
    perm = list(range(x.type.rank))
    i, j = (int(argument(node, at, "dim")) % x.type.rank for at in (1, 2))
    perm[i], perm[j] = j, i
    return low.emit("transpose", x, perm=tuple(perm))


@lowers("aten.t.default")
def matrix_transpose(low: Lowering, node: Node) -> Operand:
    """A matrix turned; a parameter is stored that way."""
    assert isinstance(node.args[0], Node)
    return low.transposed(node.args[0])


@lowers("aten.permute.default")
def permute(low: Lowering, node: Node) -> Operand:
    """Dimensions in another order."""
    x = low.exact(node.args[0])
    order: Any = node.args[1]
    return low.emit("transpose", x, perm=tuple(int(d) % x.type.rank for d in order))


def cut(low: Lowering, x: Operand, dim: int, start: Any, end: Any) -> Operand:
    """x[start:end] along `dim` with Python's reading of the bounds; x itself where that is all of it."""
    size = x.type.shape[dim]
    if not isinstance(start, int) or not isinstance(end, int | None):
        raise low.unsupported("a slice whose bounds depend on the input's length")
    if start == 0 and (end is None or end >= 2**62):
        return x
    if isinstance(size, int):
        start, end, _ = slice(start, end).indices(size)
    if end is None or start < 0 or end < 0 or end >= 2**62:
        raise low.unsupported(f"a slice from {start} of a dimension of unknown size")
    return x if (start, end) == (0, size) else low.emit("slice", x, dim=dim, start=start, end=end)


def is_last(size: Dim, start: Any, end: Any) -> bool:
    """Whether [start:end] is the last element of a dimension of unknown size."""
    open_end = end is None or (isinstance(end, int) and end >= 2**62)
    return not isinstance(size, int) and isinstance(start, int) and start == -1 and open_end


@lowers("aten.slice.Tensor")
def slice_(low: Lowering, node: Node) -> Operand:
    """A slice with fixed bounds and step 1."""
    x = low.exact(node.args[0])
    if argument(node, 4, "step", 1) != 1:
        raise low.unsupported("a slice with a step")
    if x.type.shape == low.shape(node):
        return x
    dim = int(argument(node, 1, "dim", 0)) % x.type.rank
    if is_last(x.type.shape[dim], argument(node, 2, "start", 0), argument(node, 3, "end")):
        return low.emit("last", x, dim=dim)
    return cut(low, x, dim, argument(node, 2, "start", 0) or 0, argument(node, 3, "end"))


@lowers("aten.select.int")
def select(low: Lowering, node: Node) -> Operand:
    """One index of a dimension, and the dimension gone."""
    x = low.exact(node.args[0])
    dim, index = int(argument(node, 1, "dim")) % x.type.rank, node.args[2]
    size = x.type.shape[dim]
    if is_last(size, index, None):
        return low.emit("reshape", low.emit("last", x, dim=dim), shape=low.shape(node))
    if isinstance(index, int) and index < 0 and isinstance(size, int):
        index += size
    if not isinstance(index, int) or index < 0:
        raise low.unsupported("an index from the end of a dimension of unknown size")
    return low.emit(
        "reshape", low.emit("slice", x, dim=dim, start=index, end=index + 1), shape=low.shape(node)
    )


@lowers("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")
def split(low: Lowering, node: Node) -> tuple[Operand, ...]:
    """Slices, one for each piece."""
    x = low.exact(node.args[0])
    dim = int(argument(node, 2, "dim", 0)) % x.type.rank
    pieces: list[Operand] = []
    start = 0
    for value in node.meta["val"]:
        size = low.dims(value.shape)[dim]
        if not isinstance(size, int):
            raise low.unsupported("a split of a dimension of unknown size")
        pieces.append(cut(low, x, dim, start, start + size))
        start += size
    return tuple(pieces)


@lowers("getitem")
def getitem(low: Lowering, node: Node) -> Operand:
    """One result of an op with several."""
    found, index = low.env[argument(node, 0, "")], argument(node, 1, "")
    assert isinstance(found, tuple)
    return found[int(index)]


@lowers("aten.cat.default")
def cat(low: Lowering, node: Node) -> Operand:
    """concat; parts without elements are left out."""
    parts: Any = node.args[0]
    xs = [low.exact(part) for part in parts]
    dim = int(argument(node, 1, "dim", 0)) % xs[0].type.rank
    xs = [x for x in xs if x.type.shape[dim] != 0] or xs[:1]
    return xs[0] if len(xs) == 1 else low.emit("concat", *xs, dim=dim)


@lowers("aten.mean.dim")
def mean(low: Lowering, node: Node) -> Operand:
    """The mean over one dimension."""
    x = low.exact(node.args[0])
    dims: Any = node.args[1]
    if len(dims) != 1 or not isinstance(dims[0], int):
        raise low.unsupported("a mean over several dimensions")
    result = low.emit("mean", x, dim=dims[0] % x.type.rank)
    return (
        result if argument(node, 2, "keepdim", False) else low.emit("reshape", result, shape=low.shape(node))
    )


@lowers("aten.full.default", "aten.ones.default", "aten.zeros.default", "aten.ones_like.default")
def full(low: Lowering, node: Node) -> Operand:
    """A tensor of one value."""
    kind = str(node.target).split(".")[1]
    value: Any = node.args[1] if kind == "full" else float(kind.startswith("ones"))
    dims: tuple[Dim, ...] = low.shape(node)
    dtype: torch.dtype = node.meta["val"].dtype
    return low.emit("full", shape=dims, dtype=DTYPE_NAMES[dtype], value=float(value))
