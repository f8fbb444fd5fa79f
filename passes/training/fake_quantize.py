"""Fake quantization: numbers as they will be stored, with gradients as if nothing had been rounded.

DSA-QAT, section III, "Quantization Function", "Layer-Wise Quantization Step Size", "Fake Quantization and
Gradient Approximation". The paper prints clip(round(x/Δ)·Δ, q_min, q_max), where q_min and q_max are
codes and the first argument is not: its units clash. Here they are multiplied by Δ.
"""

from typing import Any

import torch
from torch import Tensor

from gammac.formats import (
    DOUBLE_NORMAL_FLOAT,
    INTEGER,
    NORMAL_FLOAT,
    Format,
    IntegerFormat,
    NormalFloat,
    Quantized,
    spread,
)
from gammac.ir.interpret import SMALLEST_MAGNITUDE
from gammac.passes.quantizers import Nf
from gammac.passes.quantizers.grid import Grid, choose_grid, round_to_grid

TRAINABLE = (
    INTEGER,
    NORMAL_FLOAT,
    DOUBLE_NORMAL_FLOAT,
)  # kinds of formats that are cheap enough to round to at every step


def step_size(values: Tensor, bits: int, dim: int | None = None) -> Tensor:
    """Δ = max|A| / (2^(b−1) − 1): of the whole tensor, or along `dim`, which stays with size one."""
    largest = values.abs().amax() if dim is None else values.abs().amax(dim, keepdim=True)
    top: int = 2 ** (bits - 1) - 1
    return largest.clamp(min=SMALLEST_MAGNITUDE) / top


def quantize_values(values: Tensor, step: Tensor | float, low: int, high: int) -> Tensor:
    """Q(x) = clip(round(x/Δ)·Δ, q_min·Δ, q_max·Δ); `low` and `high` are q_min and q_max in codes."""
    rounded: Tensor = (values / step).round().clamp(low, high) * step
    return rounded


class _StraightThrough(torch.autograd.Function):
    """Forwards what was quantized, backwards 1 where `inside` and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, quantized: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return quantized.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return (outer[0] if inside is None else outer[0] * inside), None, None


def straight_through(values: Tensor, quantized: Tensor, inside: Tensor | None = None) -> Tensor:
    """`quantized`, bit for bit, as a function of `values` whose derivative is 1.

    The paper prints ∂Q/∂x ≈ 1 everywhere. With `inside` (bool, of the values' shape) it is 0 where a value
    was cut off, which is the derivative of what clip leaves.
    """
    found: Any = _StraightThrough.apply(values, quantized, inside)  # type: ignore[no-untyped-call]
    assert isinstance(found, Tensor)
    return found


def round_activations(values: Tensor, bits: int, step: float | None = None) -> Tensor:
    """What the op `fake_quantize` makes of values [..., features], with gradients straight through.

    A step for each token, or the one that is given; then values that are cut off have no gradient.
    """
    top = 2 ** (bits - 1) - 1
    delta = step_size(values.detach(), bits, -1) if step is None else step
    rounded = quantize_values(values.detach(), delta, -top, top)
    inside = None if step is None else values.detach().abs() <= top * step
    return straight_through(values, rounded, inside)


class HeldGrid:
    """A weight's format, and the scales that it keeps from one look of the controller to the next.

    `clip` as in RTN: none takes the largest magnitude, as the paper does; mse searches for the range that
    loses least.
    """

    def __init__(self, format_: Format, clip: str) -> None:
        assert format_.kind in TRAINABLE
        self.format, self.clip = format_, clip
        self.grid: Grid | None = None

    def refresh(self, weight: Tensor) -> None:
        """Choose scales for the weight [rows, columns] as it is now."""
        if isinstance(self.format, IntegerFormat):
            self.grid = choose_grid(weight.detach(), self.format, self.clip)

    def quantized(self, weight: Tensor) -> Quantized:
        """The nearest codes, as they will be stored. NormalFloat's scales follow the weight at each step."""
        if isinstance(self.format, NormalFloat):
            return Nf().quantize(weight.detach(), None, [self.format])[0]
        assert self.grid is not None and isinstance(self.format, IntegerFormat), "refresh first"
        return round_to_grid(weight.detach(), self.grid, self.format)

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight as it will be stored, with gradients straight through where it is not cut off."""
        return straight_through(weight, self.quantized(weight).dequantize(), self._inside(weight.detach()))

    def _inside(self, weight: Tensor) -> Tensor | None:
        if self.grid is None or not isinstance(self.format, IntegerFormat):
            return None
        size, columns = self.format.inputs_per_scale(weight.shape[1]), weight.shape[1]
        codes = weight / spread(self.grid.scales, size, columns) + spread(self.grid.zeros, size, columns)
        return (codes >= -0.5) & (codes <= self.format.levels + 0.5)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {} if self.grid is None else {"scales": self.grid.scales, "zeros": self.grid.zeros}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        self.grid = Grid(tensors["scales"], tensors["zeros"]) if tensors else None
