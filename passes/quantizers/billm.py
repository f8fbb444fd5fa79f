"""BiLLM (Huang et al. 2024, arXiv 2402.04291): binary weights, and a second bit where it helps most.

Group of columns after group: the columns that matter most get a binary residual (section 3.2), the other
weights are split by magnitude into two groups with a scale each (section 3.3), and the error is made up
for in the groups to come (section 3.4, algorithm 1). Two choices differ from the released code: both
searches look at the error of the weight, as the paper says; and each row has a split of its own, the best
of all, since which group a weight is in is stored anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gammac.formats import BINARY_RESIDUAL, BinaryResidualFormat, Format, Quantized
from gammac.formats.binary_residual import NUMBERS
from gammac.passes.quantizers.gptq import Feedback
from gammac.passes.quantizers.pb_llm import binarize


@dataclass(frozen=True)
class BiLlm:
    """`split` and `residual` off leave out what they name, to see what it is worth."""

    name: ClassVar[str] = "billm"
    needs_gram: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = (BINARY_RESIDUAL,)
    stacks: ClassVar[bool] = False
    damping: float = 0.01
    split: bool = True
    residual: bool = True

    def quantize(self, weight: Tensor, gram: Tensor | None, formats: Sequence[Format]) -> list[Quantized]:
        """See Quantizer. Raises CompileError when the Gram matrix has no usable inverse."""
        assert gram is not None, "billm needs the Gram matrix of the inputs"
        feedback = Feedback.of(gram, False, self.damping)
        weight, factor = feedback.alive(weight), feedback.factor
        found = []
        for format_ in formats:
            assert isinstance(format_, BinaryResidualFormat), f"{format_.name} has no second bit"
            found.append(self._in_groups(weight, factor, format_))
        return found

    def _in_groups(self, weight: Tensor, factor: Tensor, format_: BinaryResidualFormat) -> Quantized:
        columns = weight.shape[1]
        size = format_.inputs_per_scale(columns)
        left, blocks = weight.clone(), []
        for start in range(0, columns, size):
            end = min(start + size, columns)
            block = left[:, start:end]
            saliency = (block.square() / factor.diagonal()[start:end].square()).sum(0)
            most = format_.most_salient(end - start) if self.residual else 0
            blocks.append(self._best(block, saliency, most))
            delta = block - format_.with_group(0).dequantize(blocks[-1])
            # the errors of a sweep that does not change the block itself: E U = Δ
            errors = torch.linalg.solve_triangular(
                factor[start:end, start:end], delta, upper=True, left=False
            )
            left[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
        parts = {name: torch.cat([b[name] for b in blocks], 1) for name in blocks[0]}
        return Quantized(format_, parts)

    def _best(self, block: Tensor, saliency: Tensor, most: int) -> dict[str, Tensor]:
        """Parts of a block with as many salient columns, up to `most`, as lose least."""
        order = saliency.argsort(descending=True, stable=True)
        tries = (_binary(block, order[:count], self.split) for count in range(most + 1))
        return min(tries, key=lambda found: found[0])[1]


def _binary(block: Tensor, columns: Tensor, split: bool) -> tuple[float, dict[str, Tensor]]:
    """The squared error and the parts of a block [rows, columns] with these columns salient."""
    salient = torch.zeros(1, block.shape[1], dtype=torch.bool).index_fill_(1, columns, True)
    mean, sparse, scales = split_binary(block, ~salient.expand_as(block), split)
    s_mean, s_scales, s_signs, s_second = residual_binary(block, salient.expand_as(block))
    signs = torch.where(salient, s_signs, block >= mean)
    second = torch.where(salient, s_second, sparse)
    plain = mean + (2.0 * (block >= mean) - 1) * torch.where(sparse, scales[:, 1:], scales[:, :1])
    twice = s_mean + (2.0 * s_signs - 1) * s_scales[:, :1] + (2.0 * s_second - 1) * s_scales[:, 1:]
    error = (block - torch.where(salient, twice, plain)).square().sum()
    numbers = torch.cat([mean, scales, s_mean, s_scales], 1)[:, None]
    assert numbers.shape[2] == NUMBERS
    return float(error), {
        "signs": signs.to(torch.uint8),
        "second": second.to(torch.uint8),
        "salient": salient.to(torch.uint8),
        "numbers": numbers.half(),
    }


def residual_binary(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean [rows, 1], two scales [rows, 2] and two signs [rows, columns] of the masked weights.

    The second scale and sign are those of what the first leave over (BiLLM, equation 5). Its mean is
    nothing by then, as the mean is common to both.
    """
    mean, first = binarize(weight, mask)
    signs = weight >= mean
    left = weight - mean - (2.0 * signs - 1) * first
    count = mask.sum(1, keepdim=True).clamp(min=1)
    second = ((left.abs() * mask).sum(1, keepdim=True) / count).half().float()
    return mean, torch.cat([first, second], 1), signs, left >= 0


def split_binary(weight: Tensor, mask: Tensor, split: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [rows, 1], who is in the sparse group [rows, columns], and the scales of the concentrated and
    the sparse group [rows, 2], of the masked weights (BiLLM, equations 8 and 9).

    A group of n weights around the mean, each ± their mean magnitude, loses Σw² - (Σ|w|)² / n. So the best
    of all thresholds is found from sums over the magnitudes in order.
    """
    mean, whole = binarize(weight, mask)
    if not split:
        return mean, torch.zeros_like(mask), torch.cat([whole, whole], 1)
    size = ((weight - mean).abs()).masked_fill(~mask, -1.0)
    ordered = size.sort(1).values.clamp(min=0)  # what is not masked comes first, as zeros
    outside = (~mask).sum(1, keepdim=True)
    place = torch.arange(1, size.shape[1] + 1)
    count_below, below = (place - outside).clamp(min=0), ordered.cumsum(1)
    count_above = size.shape[1] - torch.maximum(place, outside)
    above = below[:, -1:] - below
    kept = below.square() / count_below.clamp(min=1) + above.square() / count_above.clamp(min=1)
    best = kept.argmax(1, keepdim=True)
    sparse = size > ordered.gather(1, best)
    concentrated = mask & ~sparse
    return mean, sparse, torch.cat([_mean(size, concentrated), _mean(size, sparse)], 1)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """The masked mean of each row, in f16; zero where nothing is masked."""
    count = mask.sum(1, keepdim=True).clamp(min=1)
    return ((values * mask).sum(1, keepdim=True) / count).half().float()
