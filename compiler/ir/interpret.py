"""The interpreter: runs a module in torch. Every backend is held to its numbers.

Weights are asked for by name, op by op, so that no more than one need be in memory at a time.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from gammac.ir.core import Attrs, Function, Op, Operand, Value, WeightRef
from gammac.ir.types import Dim, evaluate

DTYPES: Final = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64,
    "i32": torch.int32, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip

Env = dict[Value, Tensor]
Weights = Callable[[str], Tensor]


def run(function: Function, inputs: Mapping[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    """Results by name. `inputs` by parameter name; `weights(name)` gives a float tensor.

    Raises ValueError for inputs that don't fit the parameters.
    """
    env, sizes = bind(function, inputs)
    run_ops(function.ops, env, sizes, weights, keep=function.returns)
    found = (weights(o.name) if isinstance(o, WeightRef) else env[o] for o in function.returns)
    return dict(zip(function.return_names, found, strict=True))


def bind(function: Function, inputs: Mapping[str, Tensor]) -> tuple[Env, dict[str, int]]:
    """Parameters to tensors, and the sizes that their symbolic dimensions take."""
    env: Env = {}
    sizes: dict[str, int] = {}
    for param in function.params:
        if param.name not in inputs:
            raise ValueError(f"@{function.name} wants %{param.name}: {param.type}")
        tensor = inputs[param.name]
        if tensor.ndim != param.type.rank:
            raise ValueError(f"%{param.name} is {param.type}, got the shape {list(tensor.shape)}")
        for dim, size in zip(param.type.shape, tensor.shape, strict=True):
            _bind_dim(param, dim, size, sizes)
        env[param] = tensor
    return env, sizes


def _bind_dim(param: Value, dim: Dim, size: int, sizes: dict[str, int]) -> None:
    if isinstance(dim, int):
        expected = dim
    else:
        name = str(dim)
        expected = sizes.setdefault(name, size) if name.isidentifier() else evaluate(dim, sizes)
    if expected != size:
        raise ValueError(f"%{param.name} is {param.type}: {dim} is {expected}, got {size}")


def run_ops(
    ops: Iterable[Op], env: Env, sizes: dict[str, int], weights: Weights, keep: Iterable[Operand] = ()
) -> None:
    """Run ops into `env`; values that no later op of `ops` reads and `keep` lacks are freed."""
    ops = tuple(ops)
    last_use: dict[Value, int] = {}
    for index, op in enumerate(ops):
        last_use.update({o: index for o in op.operands if isinstance(o, Value)})
    kept = set(keep)
    for index, op in enumerate(ops):
        operands = [weights(o.name) if isinstance(o, WeightRef) else env[o] for o in op.operands]
        env.update(zip(op.results, run_op(op, operands, sizes), strict=True))
        for operand in set(op.operands):
            if isinstance(operand, Value) and last_use[operand] == index and operand not in kept:
                del env[operand]


def run_op(op: Op, operands: list[Tensor], sizes: dict[str, int]) -> tuple[Tensor, ...]:
    """The results of one op on tensors."""
    result = KERNELS[op.name](op.attrs, sizes, *operands)
    return result if isinstance(result, tuple) else (result,)


Kernel = Callable[..., Tensor | tuple[Tensor, ...]]
KERNELS: Final[dict[str, Kernel]] = {}


def _kernel(function: Kernel) -> Kernel:
    KERNELS[function.__name__.lstrip("_").rstrip("_")] = function
    return function


def _plain(name: str, function: Callable[..., Any]) -> None:
    KERNELS[name] = lambda attrs, sizes, *xs: function(*xs)


_PLAIN: Final[Mapping[str, Callable[..., Any]]] = {
    "linear": F.linear, "silu": F.silu, "relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "exp": torch.exp, "cos": torch.cos, "sin": torch.sin, "neg": torch.neg, "rsqrt": torch.rsqrt,
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "residual_add": torch.add,
    "matmul": torch.matmul, "embedding": F.embedding,
}  # fmt: skip
for _name, _function in _PLAIN.items():
    _plain(_name, _function)


# below it nothing is left of an input; the step of a token of zeros must not be zero
SMALLEST_MAGNITUDE: Final = 1e-5


@_kernel
def _fake_quantize(attrs: Any, sizes: Any, x: Tensor) -> Tensor:
    top = 2 ** (attrs["bits"] - 1) - 1
    step = attrs.get("scale")
    if step is None:
        step = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_MAGNITUDE) / top
    rounded: Tensor = (x / step).round().clamp(-top, top) * step
    return rounded


@_kernel
def _rms_norm(attrs: Any, sizes: Any, x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, attrs["eps"])


@_kernel
def _layer_norm(attrs: Any, sizes: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, attrs["eps"])


@_kernel
def _rotary_table(attrs: Any, sizes: Any, position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    angle = position_ids[..., None].float() * inv_freq.float()
    table = torch.cat([angle, angle], dim=-1)
    scaling = attrs.get("scaling", 1.0)
    return torch.cos(table) * scaling, torch.sin(table) * scaling


@_kernel
def _rope(attrs: Any, sizes: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    half = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], dim=-1)
    out = turned * cos[:, None] + half * sin[:, None]
    return torch.cat([out, rest], dim=-1) if rest.shape[-1] else out


def visible(seq: int, total: int, causal: bool, window: int) -> Tensor | None:
    """Which keys each query sees, [seq, total], or None when all of them."""
    if not causal and not window:
        return None
    query = torch.arange(total - seq, total)[:, None]
    key = torch.arange(total)[None]
    seen = key <= query if causal else torch.ones(seq, total, dtype=torch.bool)
    if window:
        seen = seen & (key > query - window)
        if not causal:
            seen = seen & (key < query + window)
    return seen


@_kernel
def _attention(attrs: Any, sizes: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    seq, total = q.shape[2], k.shape[2]
    window, softcap = attrs.get("window", 0), attrs.get("softcap", 0.0)
    gqa = q.shape[1] != k.shape[1]
    if attrs["causal"] and seq == total and mask is None and not softcap and not 0 < window < total:
        # the same numbers without the half that nobody sees
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attrs["scale"], enable_gqa=gqa)
    seen = visible(seq, total, attrs["causal"], window)
    if mask is not None:
        seen = mask if seen is None else seen & mask
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, seen, scale=attrs["scale"], enable_gqa=gqa)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.tanh(q @ k.transpose(-1, -2) * attrs["scale"] / softcap) * softcap
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.softmax(scores.float(), -1).to(v.dtype) @ v


@_kernel
def _kv_append(attrs: Any, sizes: Any, past: Tensor, new: Tensor) -> Tensor:
    return torch.cat([past, new], dim=2)


@_kernel
def _gqa(
    attrs: Any, sizes: Any, past_key: Tensor, past_value: Tensor, *operands: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, dim = attrs["heads"], attrs["kv_heads"], past_key.shape[3]
    rows = list(operands)
    inv_freq = rows.pop() if attrs["rotary"] else None
    if len(rows) == 1:
        rows = list(torch.split(rows[0], [heads * dim, kv_heads * dim, kv_heads * dim], dim=-1))
    by_head: Any = [x.reshape(*x.shape[:2], -1, dim).transpose(1, 2) for x in rows]
    q, k, v = by_head
    if inv_freq is not None:
        positions = torch.arange(q.shape[2])[None] + past_key.shape[2]
        cos, sin = _rotary_table(attrs, sizes, positions, inv_freq)
        q, k = _rope(attrs, sizes, q, cos, sin), _rope(attrs, sizes, k, cos, sin)
    key, value = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    out: Any = _attention({**attrs, "causal": True}, sizes, q, key, value)
    return out.transpose(1, 2).flatten(2), key, value


@_kernel
def _softmax(attrs: Any, sizes: Any, x: Tensor) -> Tensor:
    return torch.softmax(x.float(), attrs["dim"]).to(x.dtype)


@_kernel
def _gelu(attrs: Any, sizes: Any, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=attrs.get("approximate", "none"))


@_kernel
def _pow(attrs: Any, sizes: Any, x: Tensor) -> Tensor:
    return torch.pow(x, attrs["exponent"])


@_kernel
def _scale(attrs: Any, sizes: Any, x: Tensor) -> Tensor:
    return torch.mul(x, attrs["by"])


@_kernel
def _shift(attrs: Any, sizes: Any, x: Tensor) -> Tensor:
    return x + (attrs["by"] if x.is_floating_point() else int(attrs["by"]))


@_kernel
def _cast(attrs: Any, sizes: Any, x: Tensor) -> Tensor:
    return x.to(DTYPES[attrs["dtype"]])


def _shape(attrs: Attrs, sizes: dict[str, int]) -> list[int]:
    shape: Any = attrs["shape"]
    return [evaluate(dim, sizes) for dim in shape]


@_kernel
def _reshape(attrs: Any, sizes: Any, x: Tensor) -> Tensor:
    return x.reshape(_shape(attrs, sizes))


@_kernel
def _expand(attrs: Any, sizes: Any, x: Tensor) -> Tensor:
    return x.expand(_shape(attrs, sizes))


@_kernel
def _transpose(attrs: Any, sizes: Any, x: Tensor) -> Tensor:
    return x.permute(attrs["perm"])


@_kernel
def _slice(attrs: Any, sizes: Any, x: Tensor) -> Tensor:
    return x.narrow(attrs["dim"], attrs["start"], attrs["end"] - attrs["start"])


@_kernel
def _last(attrs: Any, sizes: Any, x: Tensor) -> Tensor:
    return x.narrow(attrs["dim"], x.shape[attrs["dim"]] - 1, 1)


@_kernel
def _split(attrs: Any, sizes: Any, x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, [evaluate(size, sizes) for size in attrs["sizes"]], dim=attrs["dim"])


@_kernel
def _concat(attrs: Any, sizes: Any, *xs: Tensor) -> Tensor:
    return torch.cat(xs, dim=attrs["dim"])


@_kernel
def _mean(attrs: Any, sizes: Any, x: Tensor) -> Tensor:
    return x.mean(attrs["dim"], keepdim=True)


@_kernel
def _full(attrs: Any, sizes: Any) -> Tensor:
    return torch.full(_shape(attrs, sizes), attrs["value"], dtype=DTYPES[attrs["dtype"]])
