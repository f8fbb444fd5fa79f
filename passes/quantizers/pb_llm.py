"""PB-LLM (Shang et al. 2023, arXiv 2310.00034): the weights that matter most in 8 bits, the others binary.

Section 3.2: a weight's saliency is w² / [U]²ᵢᵢ, what rounding it away would cost (U: the factor of the
inverse Hessian that GPTQ uses), or its magnitude. Section 3.3: a binary weight is mean ± scale, the scale
the mean magnitude around the mean. The released code takes that mean over salient weights, too, as zeros;
here it is over the binary ones alone, which is the least-squares optimum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import PARTLY_BINARY, Format, PartlyBinaryFormat, Quantized
from gammac.passes.quantizers.gptq import Feedback
from gammac.passes.quantizers.grid import SMALLEST_SCALE

SALIENCIES: Final = ("hessian", "magnitude", "random")
LEVELS: Final = 255


@dataclass(frozen=True)
class PbLlm:
    """`saliency`: hessian, magnitude or random. Which weights are salient is chosen over all rows."""

    name: ClassVar[str] = "pb_llm"
    needs_gram: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = (PARTLY_BINARY,)
    stacks: ClassVar[bool] = False
    saliency: str = "hessian"
    damping: float = 0.01

    def __post_init__(self) -> None:
        """Raises CompileError for a saliency that isn't there."""
        if self.saliency not in SALIENCIES:
            raise CompileError(f"no saliency {self.saliency!r}", hint=f"there are {', '.join(SALIENCIES)}")

    def quantize(self, weight: Tensor, gram: Tensor | None, formats: Sequence[Format]) -> list[Quantized]:
        """See Quantizer. Raises CompileError when the Gram matrix has no usable inverse."""
        assert gram is not None, "pb_llm needs the Gram matrix of the inputs"
        feedback = Feedback.of(gram, False, self.damping)
        weight, factor = feedback.alive(weight), feedback.factor
        found = []
        for format_ in formats:
            assert isinstance(format_, PartlyBinaryFormat), f"{format_.name} has no binary part"
            found.append(_sweep(weight, factor, format_, self._rank))
        return found

    def _rank(self, weight: Tensor, diagonal: Tensor) -> Tensor:
        """How much each weight matters, [rows, columns]; diagonal [columns] is that of the factor."""
        if self.saliency == "random":
            return torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
        return weight.abs() if self.saliency == "magnitude" else weight.square() / diagonal.square()


def binarize(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale [rows, 1] of the masked weights of each row, in f16; PB-LLM, equation 5.

    scale = mean |w - mean| is the least-squares optimum for the signs of w - mean.
    """
    count = mask.sum(1, keepdim=True).clamp(min=1)
    mean = ((weight * mask).sum(1, keepdim=True) / count).half().float()
    scale = ((weight - mean).abs() * mask).sum(1, keepdim=True) / count
    return mean, scale.half().float()


def _sweep(
    weight: Tensor, factor: Tensor, format_: PartlyBinaryFormat, rank: Callable[[Tensor, Tensor], Tensor]
) -> Quantized:
    """Group by group: choose what is salient, then GPTQ's sweep (section 3.4) with two ways to round."""
    rows, columns = weight.shape
    size = format_.inputs_per_scale(columns)
    left, salient, codes = (
        weight.clone(),
        torch.zeros(weight.shape, dtype=torch.bool),
        torch.empty_like(weight),
    )
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    step = ((high - low) / LEVELS).clamp(min=SMALLEST_SCALE).half().float()
    zero = (-low / step).round().clamp(0, LEVELS)
    means, scales = [], []
    for start in range(0, columns, size):
        end = min(start + size, columns)
        within = rank(left[:, start:end], factor.diagonal()[start:end])
        top = within.flatten().topk(format_.salient_in(rows, end - start)).indices
        mask = torch.zeros(within.numel(), dtype=torch.bool).index_fill_(0, top, True).reshape(within.shape)
        salient[:, start:end] = mask
        mean, scale = binarize(left[:, start:end], ~mask)
        means.append(mean)
        scales.append(scale)
        errors = torch.empty(rows, end - start)
        for i in range(start, end):
            value, exact = left[:, i], mask[:, i - start]
            grid = ((value / step).round() + zero).clamp(0, LEVELS)
            sign = (value >= mean[:, 0]).float()
            codes[:, i] = torch.where(exact, grid, sign)
            became = torch.where(exact, (grid - zero) * step, mean[:, 0] + (2 * sign - 1) * scale[:, 0])
            errors[:, i - start] = (value - became) / factor[i, i]
            left[:, i + 1 : end] -= errors[:, i - start, None] * factor[i, i + 1 : end]
        left[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return Quantized(
        format_,
        {
            "salient": salient.to(torch.uint8),
            "signs": codes[~salient].to(torch.uint8),
            "codes": codes[salient].to(torch.uint8),
            "means": torch.cat(means, 1).half(),
            "scales": torch.cat(scales, 1).half(),
            "salient_scales": step[:, None].half(),
            "salient_zeros": zero[:, None].to(torch.uint8),
        },
    )
