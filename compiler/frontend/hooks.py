"""While a model is exported, parts that would fall apart into a dozen aten ops stay whole.

Attention goes through one custom op, with causality and sliding window as attributes and no mask
tensor; RMS norms and tanh-form GELUs call the torch function that is one aten op.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from gammac.diagnostics import CompileError
from gammac.ir.interpret import KERNELS

IMPLEMENTATION: Final = "gammac"
"""The name under which our attention is registered with transformers."""

POSITIONS: Final = ("position_ids", "cache_position")
"""Tensors that attention may be handed and has no use for."""

TANH_GELUS: Final = ("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation")


@torch.library.custom_op("gammac::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int, softcap: float
) -> Tensor:
    """The IR's `attention` on q [batch, heads, seq, dim] and k, v [batch, kv_heads, total, dim]."""
    attrs = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
    result = KERNELS["attention"](attrs, {}, q, k, v)
    assert isinstance(result, Tensor)
    return result


@attention.register_fake
def _attention_shape(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int, softcap: float
) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def attention_forward(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls instead of its own attention. Raises CompileError for what we can't say."""
    # an extra tensor (attention sinks, a position bias) would change the numbers if it were left out
    extra = [name for name, value in options.items() if isinstance(value, Tensor) and name not in POSITIONS]
    if mask is not None:
        extra.append("attention_mask")
    if extra:
        raise CompileError(
            f"{type(module).__name__} hands {', '.join(extra)} to its attention",
            hint="gammac knows causal, sliding-window and full attention with an optional softcap",
        )
    scale = options.get("scaling")
    causal = options.get("is_causal")
    result = attention(
        q,
        k,
        v,
        float(q.shape[-1] ** -0.5 if scale is None else scale),
        bool(getattr(module, "is_causal", True) if causal is None else causal),
        int(options.get("sliding_window") or 0),
        float(options.get("softcap") or 0.0),
    )
    return result.transpose(1, 2), None


def no_mask(*_: Any, **__: Any) -> None:
    """Masks are attributes of our attention, so that none need be built."""


@contextmanager
def hooked(model: PreTrainedModel) -> Iterator[None]:
    """Within this context `model` computes the same with the ops that the front end wants to see."""
    # registering is idempotent, and a name of our own changes nothing for anybody else
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, no_mask)
    before = model.config._attn_implementation
    with ExitStack() as undo:
        undo.callback(model.set_attn_implementation, before or "eager")
        model.set_attn_implementation(IMPLEMENTATION)
        for module in model.modules():
            replacement = _replacement(module)
            if replacement is not None:
                module.forward = replacement
                undo.callback(delattr, module, "forward")
        yield


def _replacement(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    kind = type(module).__name__
    if kind in TANH_GELUS:
        return lambda x: F.gelu(x, approximate="tanh")
    if kind.endswith("RMSNorm"):
        return _rms_norm(module)
    return None


def _rms_norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """F.rms_norm with the weight, or with 1 + weight as Gemma has it: whichever agrees on a trial."""
    owner: Any = module
    eps = getattr(owner, "variance_epsilon", getattr(owner, "eps", None))
    weight = getattr(owner, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None

    def plain(x: Tensor) -> Tensor:
        return F.rms_norm(x, owner.weight.shape, owner.weight, eps)

    def offset(x: Tensor) -> Tensor:
        return F.rms_norm(x, owner.weight.shape, 1.0 + owner.weight, eps)

    trial = copy.copy(module)
    values = torch.linspace(0.5, 2.0, weight.numel())
    trial._parameters = {**module._parameters, "weight": nn.Parameter(values, requires_grad=False)}
    x = torch.linspace(-3.0, 2.0, weight.numel())[None]
    expected = trial(x)
    for replacement, factor in ((plain, values), (offset, 1.0 + values)):
        if torch.allclose(F.rms_norm(x, values.shape, factor, eps), expected, rtol=1e-5):
            return replacement
    return None
