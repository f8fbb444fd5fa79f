"""SparseForge's soft masks (arXiv 2605.06402): from scores to gates, hardened towards two of each four."""

from typing import Final

import torch
from torch import Tensor

from gammac.formats import keep_two

EPSILON: Final = 1e-8
LOWEST_TEMPERATURE: Final = 0.05
SCORES: Final = ("hessian_obd", "hessian_ratio", "fisher", "magnitude")


def score(kind: str, weight: Tensor, curvature: Tensor) -> Tensor:
    """What a weight is worth, standardized over the layer. Weight and curvature [rows, columns].

    hessian_obd and fisher: curvature · w², the cost of its removal. hessian_ratio: |w| / √curvature, which
    prefers flat directions: the opposite, kept as the released configuration has it.
    """
    if kind == "magnitude":
        found = weight.abs()
    elif kind == "hessian_ratio":
        found = weight.abs() / (curvature + EPSILON).sqrt()
    else:
        found = (curvature + EPSILON) * weight.square()
    return (found - found.mean()) / found.std().clamp(min=EPSILON)


def gate(scores: Tensor, temperature: float) -> Tensor:
    """Soft gates in 0…1, one half at the layer's median score."""
    return torch.sigmoid((scores - scores.median()) / max(temperature, LOWEST_TEMPERATURE))


def harden(gates: Tensor, mask: Tensor, strength: float) -> Tensor:
    """Score structural hardening: gates pulled by how far the mask is from their two largest of each four."""
    target = keep_two(gates).float()
    return (gates - strength * (mask - target)).clamp(0, 1)


def quenched(mask: Tensor, softness: float) -> Tensor:
    """softness · mask + (1 - softness) · its two largest of each four: exactly 2:4 at softness 0."""
    return softness * mask + (1 - softness) * keep_two(mask)


def binarity(mask: Tensor) -> float:
    """Mean of 4 m (1 - m): 1 for a mask of halves, 0 for one of zeros and ones."""
    return float((4 * mask * (1 - mask)).mean())
