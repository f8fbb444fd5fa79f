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

SIGN: Final = "sign"
GUMBEL: Final = "gumbel"
MARGIN: Final = 0.45  # of a cell, whose half is ½: how far from its code a latent may start
HEAD_START: Final = 6.0  # of the quantizer's own code, in logits
TEMPERATURES: Final = (4.0, 0.05)  # of mixtures, at the first step and behind the last
SHARPENED: Final = 5.0  # what logits are multiplied by at the end
MOMENTUM: Final = 0.9
LONGEST: Final = 3.0  # step of a logit, in root mean squares


class Latents(Protocol):
    """What learning moves. `pace` over the number of steps is the first step, unless one is asked for: in
    units of a code, twice what a latent can travel if it always goes one way."""

    pace: ClassVar[float]

    def drawn(self, left: float, generator: torch.Generator) -> Tensor:
        """The weight f32 [rows, columns] that a step runs with; `left`: the share of steps to come."""
        ...

    def quantized(self) -> Quantized:
        """The nearest codes, and scales as they are stored."""
        ...

    def move(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """One step against the sign of ∂L/∂W [rows, columns]: straight through the rounding, where it is
        not cut off; and against that of the scales' logarithms."""
        ...


class _Make(Protocol):
    def __call__(self, weight: Tensor, start: Quantized) -> Latents: ...


def latents_of(weight: Tensor, start: Quantized, by: str = SIGN) -> Latents:
    """Latents that begin at the codes of `start`; weight f32 [rows, columns] is in full precision."""
    return LEARNABLE[by][start.format.kind](weight, start)


class GridLatents:
    """The real numbers behind integer codes [rows, columns] and their scales [rows, groups]."""

    pace: ClassVar[float] = 1.0

    def __init__(self, weight: Tensor, start: Quantized) -> None:
        assert isinstance(start.format, IntegerFormat)
        self.start, self.format = start, start.format
        self.size = self.format.inputs_per_scale(weight.shape[1])
        columns = weight.shape[1]
        self.zeros = zero_points(start)
        steps = spread(start.scales.float(), self.size, columns)
        codes = start.codes.float()
        exact = weight / steps.clamp(min=1e-30) + spread(self.zeros, self.size, columns)
        self.latent = torch.minimum(torch.maximum(exact, codes - MARGIN), codes + MARGIN)
        self.log_scale = torch.zeros_like(start.scales, dtype=torch.float32)

    def drawn(self, left: float, generator: torch.Generator) -> Tensor:
        """That of the nearest codes: rounding is passed straight through."""
        return self.quantized().dequantize()

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

    def drawn(self, left: float, generator: torch.Generator) -> Tensor:
        """That of the nearest codes: rounding is passed straight through."""
        return self.quantized().dequantize()

    def quantized(self) -> Quantized:
        """The nearest codes; scales that obey the order of the levels."""
        codes = self.latent.round().clamp(0, 3).to(torch.uint8)
        return self.format.quantized(codes, scaled(self.start, self.log_scale).scales)

    def move(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """See Latents."""
        at_scale = at_logs(self.quantized(), gradient)
        self.latent = (self.latent - rate * gradient.sign()).clamp(-0.5, 3.5)
        self.log_scale -= scale_rate * at_scale.sign()


class GumbelLatents:
    """Logits [shifts, rows, columns] over what is added to the quantizer's codes, and scales [rows, groups].

    A step runs with a mixture: softmax((κ·logits + Gumbel noise) / τ). The noise lets codes be tried that
    lie behind a worse one; τ falls and κ grows until the likeliest shift is all of the mixture. Logits move
    by the momentum of their gradients over its root mean square in the weight: where little depends on a
    code, it stays. After the learnt assignments of MaskLLM (arXiv 2409.17481, section 3.2), with shifts of
    a code in place of masks.
    """

    pace: ClassVar[float] = 12.0

    def __init__(self, weight: Tensor, start: Quantized) -> None:
        assert isinstance(start.format, IntegerFormat)
        self.start, self.format = start, start.format
        self.size = self.format.inputs_per_scale(weight.shape[1])
        self.codes, self.zeros = start.codes.float(), zero_points(start)
        reach = 1 if self.format.bits <= 2 else 2
        self.shifts = torch.arange(-reach, reach + 1.0)[:, None, None]
        shifted = self.codes + self.shifts
        outside = (shifted < 0) | (shifted > self.format.levels)
        self.logits = HEAD_START * (self.shifts == 0).float().expand_as(shifted)
        self.logits = self.logits.masked_fill(outside, -torch.inf)
        self.log_scale = torch.zeros_like(start.scales, dtype=torch.float32)
        self.momenta = [torch.zeros_like(self.logits), torch.zeros_like(self.log_scale)]
        self.chances, self.sharpness = self.logits.softmax(0), 1.0

    def drawn(self, left: float, generator: torch.Generator) -> Tensor:
        """A mixture of codes, and scales as they are stored."""
        temperature = TEMPERATURES[1] * (TEMPERATURES[0] / TEMPERATURES[1]) ** left
        growth = SHARPENED ** (1 - left)
        noise = torch.empty_like(self.logits).exponential_(generator=generator).log_().neg_()
        self.chances = ((growth * self.logits + noise) / temperature).softmax(0)
        self.sharpness = growth / temperature
        return self._at(self.codes + (self.chances * self.shifts).sum(0))

    def _at(self, codes: Tensor) -> Tensor:
        columns = codes.shape[1]
        steps = spread(scaled(self.start, self.log_scale).scales.float(), self.size, columns)
        return steps * (codes - spread(self.zeros, self.size, columns))

    def quantized(self) -> Quantized:
        """The likeliest codes, and scales as they are stored."""
        codes = self.codes + self.shifts[self.logits.argmax(0), 0, 0]
        scales = scaled(self.start, self.log_scale).scales
        return self.format.quantized(codes.to(torch.uint8), scales, self.start.zeros)

    def move(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """One step from ∂L/∂W [rows, columns] at the weight that was drawn last."""
        columns = gradient.shape[1]
        mean = (self.chances * self.shifts).sum(0)
        at_code = gradient * spread(self.start.scales.float(), self.size, columns)
        at_logits = self.sharpness * at_code * self.chances * (self.shifts - mean)
        at_scale = by_group(gradient * self._at(self.codes + mean), self.size).sum(-1)
        self.logits = self.logits - rate * self._direction(0, at_logits)
        self.log_scale = self.log_scale - scale_rate * self._direction(1, at_scale)

    def _direction(self, place: int, gradient: Tensor) -> Tensor:
        """The momentum that a gradient leaves, over its root mean square, cut off at LONGEST."""
        momentum = self.momenta[place].mul_(MOMENTUM).add_(gradient, alpha=1 - MOMENTUM)
        return (momentum / momentum.square().mean().sqrt().clamp(min=1e-30)).clamp(-LONGEST, LONGEST)


def zero_points(start: Quantized) -> Tensor:
    """f32 [rows, groups]: those of the format where it stores none."""
    assert isinstance(start.format, IntegerFormat)
    if start.zeros is None:
        return torch.full_like(start.scales, float(start.format.midpoint), dtype=torch.float32)
    return start.zeros.float()


def _position(values: Tensor, levels: Tensor) -> Tensor:
    """Where values [rows, groups, size] lie on levels [rows, groups, 4], in units of codes from 0 to 3:
    on straight lines between two levels, and on the outer ones' beyond them."""
    gaps = (levels[..., 1:] - levels[..., :-1]).clamp(min=1e-30)[..., None]
    steps = (values[:, :, None] - levels[..., :-1, None]) / gaps
    inside = steps.clamp(0, 1).sum(2)
    return inside + steps[:, :, 0].clamp(max=0) + (steps[:, :, -1] - 1).clamp(min=0)


LEARNABLE: Final[Mapping[str, Mapping[str, _Make]]] = {
    SIGN: {INTEGER: GridLatents, DUAL_BINARY: DualLatents},
    GUMBEL: {INTEGER: GumbelLatents},
}
"""By how codes are learnt, the kinds of formats."""
