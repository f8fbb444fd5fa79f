"""QuIP's LDLQ (Chee et al. 2023, arXiv 2307.13304, sections 3 and 4): adaptive rounding on a fixed range.

Column k is rounded with the errors of the columns before it fed back, Ŵₖ = Q(Wₖ + (W − Ŵ) Uₖ) for the Gram
matrix's factors (U + I) D (U + I)ᵀ: GPTQ's sweep in other words (theorem 6), and GPTQ's code here. What is
QuIP's own is the range, ρ times the root mean square of what shares a scale. It counts on incoherent weights,
of which none stands out: see the pass incoherence. `greedy` passes over the codes follow (LDLQ-RG).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import INTEGER, Format, IntegerFormat, Quantized
from gammac.passes.quantizers.gptq import Feedback
from gammac.passes.quantizers.grid import as_quantized, choose_grid, fixed_grid, on_grids
from gammac.passes.quantizers.kernels import descend

ROUNDINGS: Final = ("nearest", "stochastic")
# bits; QuIP says nothing of more, and 2.4 deviations would clip them: the range is searched
WIDEST: Final = 4


@dataclass(frozen=True)
class Quip:
    """`rho` in root mean squares; `rounding`: nearest or stochastic; `greedy`: most passes behind the sweep.

    `damping` is a share of the mean diagonal; columns go by decreasing diagonal with `act_order`.
    """

    name: ClassVar[str] = "quip"
    needs_gram: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = (INTEGER,)
    stacks: ClassVar[bool] = True
    rho: float = 2.4
    rounding: str = "nearest"
    greedy: int = 0
    act_order: bool = True
    damping: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises CompileError for options that make no sense."""
        if self.rounding not in ROUNDINGS:
            raise CompileError(
                f"quip: rounding={self.rounding}", hint=f"rounding is {' or '.join(ROUNDINGS)}"
            )
        if self.rho <= 0 or self.greedy < 0:
            raise CompileError(
                f"quip: rho={self.rho:g}, greedy={self.greedy}", hint="rho is above 0, greedy 0 or more"
            )

    def quantize(self, weight: Tensor, gram: Tensor | None, formats: Sequence[Format]) -> list[Quantized]:
        """See Quantizer. Raises CompileError when the Gram matrix has no usable inverse."""
        assert gram is not None, "quip needs the Gram matrix of the inputs"
        feedback = Feedback.of(gram, self.act_order, self.damping)
        weight = feedback.alive(weight)
        found = []
        for format_ in on_grids(formats):
            if format_.bits <= WIDEST:
                grid = fixed_grid(weight, format_, self.rho)
            else:
                grid = choose_grid(weight, format_, importance=feedback.importance)
            codes = feedback.codes(weight, grid, format_, self._dither(weight))
            quantized = as_quantized(codes, grid, format_)
            found.append(improved(quantized, weight, gram, feedback.order, self.greedy))
        return found

    def _dither(self, weight: Tensor) -> Tensor | None:
        """Uniform over a step: with it, rounding to nearest goes up as often as the rest is large."""
        if self.rounding == "nearest":
            return None
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(weight.shape, generator=generator) - 0.5


def improved(found: Quantized, weight: Tensor, gram: Tensor, order: Tensor, passes: int) -> Quantized:
    """Codes moved one at a time to where tr(Δ G Δᵀ) is least, until none moves (QuIP, section 4: greedy).

    weight [rows, columns], gram [columns, columns]; the error never rises. The grid stays.
    """
    format_ = found.format
    if not passes or not isinstance(format_, IntegerFormat):
        return found
    wide = gram.double()
    slopes = (found.dequantize() - weight).double() @ wide
    codes = found.codes.float()
    columns = weight.shape[1]
    groups = torch.arange(columns) // found.format.inputs_per_scale(columns)
    descend(
        codes.numpy(), slopes.numpy(), wide.numpy(), found.scales.float().numpy(), groups.numpy(),
        order.numpy(), format_.levels, passes,
    )  # fmt: skip
    return format_.quantized(codes.to(torch.uint8), found.scales, found.zeros)
