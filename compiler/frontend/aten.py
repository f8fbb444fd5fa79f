"""The lowering table: one row for each aten op that the front end understands."""

from functools import partial
from typing import Any, Final

from torch.fx import Node

from gammac.frontend.lowering import DTYPE_NAMES, Lowering, Row, argument, register
from gammac.ir import Operand, WeightRef

ROWS: Final[dict[str, Row]] = {}
lowers = partial(register, ROWS)


# ---- what vanishes ------------------------------------------------------------------------------


@lowers(
    "aten.alias.default", "aten.detach.default", "aten.contiguous.default", "aten.clone.default",
    "aten.lift_fresh_copy.default", "aten.detach_.default",
)  # fmt: skip
def same(low: Lowering, node: Node) -> Operand:
    """Copies and views of the same numbers."""
    return low.operand(node.args[0])


@lowers("aten.dropout.default")
def dropout(low: Lowering, node: Node) -> Operand:
    """Nothing, in a model that is not being trained."""
    if argument(node, 2, "train"):
        raise low.unsupported("dropout while training")
    return low.operand(node.args[0])


@lowers(
    "aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten.to.other", "aten.type_as.default",
    "aten._to_copy.default",
)  # fmt: skip
def convert(low: Lowering, node: Node) -> Operand:
    """A cast, or nothing where only a device or the same type is asked for."""
    x = low.operand(node.args[0])
    dtype = DTYPE_NAMES[node.meta["val"].dtype]
    return x if x.type.dtype == dtype else low.emit("cast", x, dtype=dtype)


# ---- weights, norms, attention ------------------------------------------------------------------


@lowers("aten.linear.default")
def linear(low: Lowering, node: Node) -> Operand:
    """linear, as it is."""
    return low.emit("linear", *(low.operand(arg) for arg in node.args if arg is not None))


@lowers("aten.addmm.default")
def addmm(low: Lowering, node: Node) -> Operand:
    """bias + x @ w, as GPT-2's Conv1D has it: a linear with the weight transposed."""
    if argument(node, 3, "beta", 1) != 1 or argument(node, 4, "alpha", 1) != 1:
        raise low.unsupported("addmm with alpha or beta")
    bias, x, weight = node.args[:3]
    assert isinstance(weight, Node)
    return low.emit("linear", low.operand(x), low.transposed(weight), low.operand(bias))


@lowers("aten.matmul.default", "aten.mm.default", "aten.bmm.default")
def matmul(low: Lowering, node: Node) -> Operand:
    """A linear where the right side is a weight, else matmul."""
    x, y = node.args[:2]
    assert isinstance(y, Node)
    right = low.operand(y)
    if isinstance(right, WeightRef) and right.type.rank == 2:
        return low.emit("linear", low.operand(x), low.transposed(y))
    return low.emit("matmul", low.exact(x), low.exact(y))


@lowers("aten.embedding.default")
def embedding(low: Lowering, node: Node) -> Operand:
    """embedding; the padding index matters only in training."""
    return low.emit("embedding", low.operand(node.args[1]), low.operand(node.args[0]))


@lowers("aten.layer_norm.default")
def layer_norm(low: Lowering, node: Node) -> Operand:
    """layer_norm; a weight or bias that the model lacks is one of constants."""
    x = low.operand(node.args[0])
    shape = x.type.shape[-1:]
    if len(argument(node, 1, "normalized_shape")) != 1:
        raise low.unsupported("layer_norm over several dimensions")
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    operands = [
        low.emit("full", shape=shape, dtype=x.type.dtype, value=value)
        if given is None
        else low.operand(given)
        for given, value in ((weight, 1.0), (bias, 0.0))
    ]
    return low.emit("layer_norm", x, *operands, eps=float(argument(node, 4, "eps", 1e-5)))


@lowers("aten.rms_norm.default")
def rms_norm(low: Lowering, node: Node) -> Operand:
    """rms_norm; a weight that the model lacks is one of ones."""
    x = low.operand(node.args[0])
    weight, eps = argument(node, 2, "weight"), argument(node, 3, "eps")
    if len(argument(node, 1, "normalized_shape")) != 1 or eps is None:
        raise low.unsupported("rms_norm over several dimensions or without eps")
    given = (
        low.emit("full", shape=x.type.shape[-1:], dtype=x.type.dtype, value=1.0)
        if weight is None
        else low.operand(weight)
    )
    return low.emit("rms_norm", x, given, eps=float(eps))


@lowers("gammac.attention.default")
def attention(low: Lowering, node: Node) -> Operand:
    """The front end's own attention, from hooks.py."""
    scale, causal, window, softcap = (argument(node, i, "") for i in range(3, 7))
    extra: dict[str, Any] = {"window": window} if window else {}
    extra |= {"softcap": softcap} if softcap else {}
    return low.emit("attention", *map(low.exact, node.args[:3]), scale=scale, causal=causal, **extra)


@lowers("aten.scaled_dot_product_attention.default")
def scaled_dot_product_attention(low: Lowering, node: Node) -> Operand:
    """Attention of a model that doesn't go through transformers' interface."""
    mask = argument(node, 3, "attn_mask")
    masks = () if mask is None else (low.exact(mask),)
    if masks and masks[0].type.dtype != "bool":
        raise low.unsupported("attention with a mask of numbers")
    operands = [low.exact(arg) for arg in node.args[:3]]
    width = operands[0].type.shape[-1]
    assert isinstance(width, int)
    scale = argument(node, 6, "scale")
    causal = bool(argument(node, 5, "is_causal", False))
    scale = float(width**-0.5 if scale is None else scale)
    return low.emit("attention", *operands, *masks, scale=scale, causal=causal)


@lowers("aten.softmax.int", "aten._softmax.default")
def softmax(low: Lowering, node: Node) -> Operand:
    """softmax over one dimension."""
    x = low.exact(node.args[0])
    return low.emit("softmax", x, dim=int(argument(node, 1, "dim")) % x.type.rank)


# ---- elementwise --------------------------------------------------------------------------------


def _unary(name: str, **attrs: float) -> Row:
    return lambda low, node: low.emit(name, low.operand(node.args[0]), **attrs)


for _name in ("silu", "relu", "tanh", "sigmoid", "exp", "cos", "sin", "neg", "rsqrt"):
    lowers(f"aten.{_name}.default")(_unary(_name))
lowers("aten.sqrt.default")(_unary("pow", exponent=0.5))
lowers("aten.square.default")(_unary("pow", exponent=2.0))
lowers("aten.reciprocal.default")(_unary("pow", exponent=-1.0))


@lowers("aten.gelu.default")
def gelu(low: Lowering, node: Node) -> Operand:
    """gelu, exact or in the tanh form."""
    form = argument(node, 1, "approximate", "none")
    return low.emit("gelu", low.operand(node.args[0]), **({} if form == "none" else {"approximate": form}))


@lowers("aten.pow.Tensor_Scalar")
def power(low: Lowering, node: Node) -> Operand:
    """x to a fixed power."""
    return low.emit("pow", low.operand(node.args[0]), exponent=float(argument(node, 1, "exponent")))


def number(low: Lowering, arg: Any) -> float | None:
    """The value of an argument that is a number or a constant tensor without dimensions."""
    if isinstance(arg, Node):
        found = low.env.get(arg)
        return None if found is None or isinstance(found, tuple) else low.constant(found)
    return float(arg)


def pair(low: Lowering, node: Node) -> tuple[Operand, Operand]:
    """Both operands of an elementwise op, in PyTorch's shapes unless they agree without."""
    x, y = low.operand(node.args[0]), low.operand(node.args[1])
    if x.type.shape == y.type.shape or y.type.rank == 1 or x.type.rank == 1:
        return x, y
    return low.exact(node.args[0]), low.exact(node.args[1])


def scale(low: Lowering, x: Operand, by: float) -> Operand:
    """x * by, and x itself for 1."""
    return x if by == 1.0 else low.emit("scale", x, by=by)


def shift(low: Lowering, x: Operand, by: float) -> Operand:
    """x + by, and x itself for 0."""
    return x if by == 0.0 else low.emit("shift", x, by=by)


@lowers("aten.mul.Tensor", "aten.mul.Scalar")
def mul(low: Lowering, node: Node) -> Operand:
    """mul, or scale by a number."""
    for x, y in (node.args[:2], node.args[1::-1]):
        by = number(low, y)
        if by is not None:
            return scale(low, low.operand(x), by)
    return low.emit("mul", *pair(low, node))


@lowers("aten.div.Tensor", "aten.div.Scalar")
def div(low: Lowering, node: Node) -> Operand:
    """div, or scale by one over a number."""
    by = number(low, node.args[1])
    return (
        low.emit("div", *pair(low, node)) if by is None else scale(low, low.operand(node.args[0]), 1.0 / by)
    )


@lowers("aten.add.Tensor", "aten.add.Scalar", "aten.add_.Tensor")
def add(low: Lowering, node: Node) -> Operand:
    """add, or shift by a number."""
    alpha = argument(node, 2, "alpha", 1)
    for x, y in (node.args[:2], node.args[1::-1]):
        by = number(low, y)
        if by is not None and (alpha == 1 or y is node.args[1]):
            return shift(low, low.operand(x), by * alpha)
    if alpha != 1:
        raise low.unsupported("add with alpha")
    return low.emit("add", *pair(low, node))


@lowers("aten.sub.Tensor", "aten.sub.Scalar")
def sub(low: Lowering, node: Node) -> Operand:
    """sub, or shift by minus a number."""
    if argument(node, 2, "alpha", 1) != 1:
        raise low.unsupported("sub with alpha")
    by = number(low, node.args[1])
    return low.emit("sub", *pair(low, node)) if by is None else shift(low, low.operand(node.args[0]), -by)


@lowers("aten.rsub.Scalar")
def rsub(low: Lowering, node: Node) -> Operand:
    """A number minus x."""
    by = number(low, node.args[1])
    assert by is not None
    return shift(low, low.emit("neg", low.operand(node.args[0])), by)
