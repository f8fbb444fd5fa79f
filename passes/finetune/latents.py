"""Latents: the real numbers behind codes and scales while they are learnt.

Each code has a latent value, at first the weight itself in units of codes, moved into the cell of the code
that the quantizer chose.
"""

from collections.abc import Mapping
from typing import ClassVar, Final, Protocol

import torch
from torch import Tensor

from gammac.formats import DUAL_BINARY, INTEGER, DualBinaryFormat, IntegerFormat, Quantized, spread
from gammac.formats.dual_binary import levels_of
from gammac.passes.finetune.scales import at_logs, scaled
from gammac.passes.quantizers.levels import by_group

MARGIN: Final = 0.45  # of a cell, whose half is ½: how far from its code a latent may start


class Latents(Protocol):
    """What learning moves. `pace` over the number of steps is the first step, unless one is asked for: in
    units of a code, twice what a latent can travel if it always goes one way."""

    pace: ClassVar[float]

    def quantized(self) -> Quantized:
        """The nearest codes, and scales as they are stored."""
        ...

    def move(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """One step against the sign of ∂L/∂W [rows, columns]: straight through the rounding, where it is
        not cut off; and against that of the scales' logarithms."""
        ...


class _Make(Protocol):
    def __call__(self, weight: Tensor, start: Quantized) -> Latents: ...


def latents_of(weight: Tensor, start: Quantized) -> Latents:
    """Latents that begin at the codes of `start`; weight f32 [rows, columns] is in full precision."""
    return LEARNABLE[start.format.kind](weight, start)


class GridLatents:
    """The real numbers behind integer codes [rows, columns] and their scales [rows, groups]."""

    pace: ClassVar[float] = 1.0

    def __init__(self, weight: Tensor, start: Quantized) -> None:
        assert isinstance(start.format, IntegerFormat)
        self.start, self.format = start, start.format
        self.size = self.format.inputs_per_scale(weight.shape[1])
        columns = weight.shape[1]
        self.zeros = (
            torch.full_like(start.scales, float(self.format.midpoint)).float()
            if start.zeros is None
            else start.zeros.float()
        )
        steps = spread(start.scales.float(), self.size, columns)
        codes = start.codes.float()
        exact = weight / steps.clamp(min=1e-30) + spread(self.zeros, self.size, columns)
        self.latent = torch.minimum(torch.maximum(exact, codes - MARGIN), codes + MARGIN)
        self.log_scale = torch.zeros_like(start.scales, dtype=torch.float32)

    def quantized(self) -> Quantized:
        """The nearest codes, and scales as they are stored."""
        codes = self.latent.round().clamp(0, self.format.levels)
        scales = scaled(self.start, self.log_scale).scales
        return self.format.quantized(codes.to(torch.uint8), scales, self.start.zeros)

    def move(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """One step against the sign of ∂L/∂W [rows, columns]: straight through the rounding, where it is
        not cut off; and against that of the scales' logarithms."""
        columns = gradient.shape[1]
        scales = self.start.scales.float()
        # a negative scale turns the direction of its codes around
        along = gradient * spread(scales.sign(), self.size, columns)
        at_scale = at_logs(self.quantized(), gradient)
        self.latent = (self.latent - rate * along.sign()).clamp(-0.5, self.format.levels + 0.5)
        self.log_scale -= scale_rate * at_scale.sign()


class DualLatents:
    """The real numbers behind the codes of two binary planes [rows, columns], which count the four levels
    of a group upwards, and behind α₁ and α₂ [rows, groups, 2]."""

    # scales that were fitted to the codes leave less to gain: `tiny` comes to KL 0.0040, and to 0.0054 at 1,
    # on the text that results.md reports; not confirmed on another
    pace: ClassVar[float] = 0.3

    def __init__(self, weight: Tensor, start: Quantized) -> None:
        assert isinstance(start.format, DualBinaryFormat)
        self.start, self.format = start, start.format
        self.size = self.format.inputs_per_scale(weight.shape[1])
        codes = self.format.codes_of(start.parts).float()
        exact = _position(by_group(weight, self.size), levels_of(start.scales))
        exact = exact.reshape(len(weight), -1)[:, : weight.shape[1]]
        self.latent = torch.minimum(torch.maximum(exact, codes - MARGIN), codes + MARGIN)
        self.log_scale = torch.zeros_like(start.scales, dtype=torch.float32)

    def quantized(self) -> Quantized:
        """The nearest codes; scales that obey the order of the levels."""
        codes = self.latent.round().clamp(0, 3).to(torch.uint8)
        return self.format.quantized(codes, scaled(self.start, self.log_scale).scales)

    def move(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """See Latents."""
        at_scale = at_logs(self.quantized(), gradient)
        self.latent = (self.latent - rate * gradient.sign()).clamp(-0.5, 3.5)
        self.log_scale -= scale_rate * at_scale.sign()


def _position(values: Tensor, levels: Tensor) -> Tensor:
    """Where values [rows, groups, size] lie on levels [rows, groups, 4], in units of codes from 0 to 3:
    on straight lines between two levels, and on the outer ones' beyond them."""
    gaps = (levels[..., 1:] - levels[..., :-1]).clamp(min=1e-30)[..., None]
    steps = (values[:, :, None] - levels[..., :-1, None]) / gaps
    inside = steps.clamp(0, 1).sum(2)
    return inside + steps[:, :, 0].clamp(max=0) + (steps[:, :, -1] - 1).clamp(min=0)


LEARNABLE: Final[Mapping[str, _Make]] = {INTEGER: GridLatents, DUAL_BINARY: DualLatents}
