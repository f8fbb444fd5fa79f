"""Scales that move: a weight with its scales multiplied, and what a loss says about the factors."""

from typing import Final

import torch
from torch import Tensor

from gammac.formats import DUAL_BINARY, INTEGER, TRELLIS, DualBinaryFormat, Quantized
from gammac.formats.dual_binary import PLANES, in_order
from gammac.passes.quantizers.grid import SMALLEST_SCALE
from gammac.passes.quantizers.levels import by_group

SCALED: Final = (DUAL_BINARY, INTEGER, TRELLIS)
"""Kinds of formats whose weights are their scales times what the codes stand for."""


def scaled(start: Quantized, logs: Tensor) -> Quantized:
    """The weight with its scales times exp(logs), logs shaped as they are, rounded as they are stored."""
    scales = start.scales.float() * logs.exp()
    if isinstance(start.format, DualBinaryFormat):
        scales = in_order(scales, SMALLEST_SCALE)
    return Quantized(start.format, {**start.parts, "scales": scales.half()})


def at_logs(now: Quantized, gradient: Tensor) -> Tensor:
    """∂L/∂logs, shaped as the scales, from ∂L/∂W [rows, columns]; codes and planes count as constants."""
    size = now.format.inputs_per_scale(gradient.shape[1])
    if isinstance(now.format, DualBinaryFormat):
        planes = torch.stack([by_group(now.parts[name].float(), size) for name in PLANES], -1)
        return (by_group(gradient, size)[..., None] * planes).sum(2) * now.scales.float()
    return by_group(gradient * now.dequantize(), size).sum(-1)
