"""Inputs of products in int8, rounded once for all that read them alike, and what is computed on the way."""

from collections.abc import Callable
from typing import Any

from gammac.targets.tvm.kernels import quantize_activations, rms_norm_quantize
from gammac.targets.tvm.kernels.operands import TOKENS
from gammac.targets.tvm.lowering import Lowering
from gammac.targets.tvm.nodes import Node, Normed


def rounded(at: Lowering, x: Node, group: int) -> list[Any]:
    """Codes, scales and sums of x in groups of inputs."""
    return _shared(at, x, group, lambda: _call(at, x, group))


def rounded_with(at: Lowering, x: Node, group: int, a: Any, rank: int) -> Any | None:
    """x @ a.T for a [rank, inputs], from the kernel that rounds x; None where x has been rounded before."""
    low: list[Any] = []

    def make() -> list[Any]:
        *codes, last = _call(at, x, group, a, rank)
        low.append(last)
        return codes

    _shared(at, x, group, make)
    return low[0] if low else None


def _shared(at: Lowering, x: Node, group: int, make: Callable[[], list[Any]]) -> list[Any]:
    of: Any = x if isinstance(x, Normed) else at.f.tensor(x).var
    found: list[Any] = at.f.shared(("int8", of, group), make)
    return found


def _call(at: Lowering, x: Node, group: int, a: Any | None = None, rank: int = 0) -> list[Any]:
    """Codes, scales and sums, of the norm if x is one; with `a`, x @ a.T behind them."""
    tokens = x.rows or TOKENS
    if isinstance(x, Normed):
        made = rms_norm_quantize(x.width, group, tokens, x.eps, rank)
        kind, eps, args = "rms_norm_quantize", x.eps, [x.x.var, x.weight]
    else:
        made = quantize_activations(x.width, group, tokens, rank)
        kind, eps, args = "quantize", 0.0, [at.f.tensor(x).var]
    types = [at.f.type_of(x.rows, int(o.shape[1]), o.dtype) for o in made.outputs]
    key, more = (x.rows, x.width, group, eps, rank), [a] if rank else []
    out: list[Any] = at.f.call(f"{kind}_low" if rank else kind, key, lambda: made.func, [*args, *more], types)
    return out
