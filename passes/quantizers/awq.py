"""AWQ's clip search (Lin et al. 2023, arXiv 2306.00978, section 3.2 and the authors' auto_clip): the range
of each group is shrunk as far as that lowers the error of what the group puts out; then round to nearest.

What a group loses is δ G δᵀ, δ its change and G its own block of the Gram matrix of the inputs, where
`rtn` and `gptq` look at the diagonal. The authors shrink the largest magnitude by up to a half in twentieths;
here the ends move independently, by the steps that every quantizer of gammac tries. The other half of AWQ,
the scales, is the pass `awq`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gammac.formats import INTEGER, Format, IntegerFormat, Quantized
from gammac.passes.quantizers.grid import Grid, choose_grid, grids_of, on_grids, round_to_grid, shrinks_of


@dataclass(frozen=True)
class Awq:
    """`clip`: none (min-max) or mse (the range with the least output error)."""

    name: ClassVar[str] = "awq"
    needs_gram: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = (INTEGER,)
    stacks: ClassVar[bool] = True
    clip: str = "mse"

    def quantize(self, weight: Tensor, gram: Tensor | None, formats: Sequence[Format]) -> list[Quantized]:
        """See Quantizer."""
        assert gram is not None, "awq needs the Gram matrix of the inputs"
        return [round_to_grid(weight, self._grid(weight, gram, f), f) for f in on_grids(formats)]

    def _grid(self, weight: Tensor, gram: Tensor, format_: IntegerFormat) -> Grid:
        return (
            choose_grid(weight, format_, "none")
            if self.clip == "none"
            else search_clip(weight, gram, format_)
        )


def search_clip(weight: Tensor, gram: Tensor, format_: IntegerFormat) -> Grid:
    """The grid of each group with the least output error; weight [rows, columns], gram [columns, columns]."""
    rows, columns = weight.shape
    size, count = format_.inputs_per_scale(columns), format_.groups(columns)
    missing = count * size - columns
    groups = torch.nn.functional.pad(weight, (0, missing)).reshape(rows, count, size).transpose(0, 1)
    groups = groups.contiguous()
    blocks = _diagonal_blocks(torch.nn.functional.pad(gram, (0, missing, 0, missing)), size)
    low, high = groups.amin(2).clamp(max=0.0), groups.amax(2).clamp(min=0.0)
    least = torch.full((count, rows), torch.inf)
    best = Grid(torch.zeros(count, rows), torch.zeros(count, rows))
    for down, up in zip(*shrinks_of(format_), strict=True):
        offer = grids_of(low * down, high * up, format_)
        error = _errors(groups, blocks, offer, format_)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(
            torch.where(better, offer.scales, best.scales), torch.where(better, offer.zeros, best.zeros)
        )
    return Grid(best.scales.T.contiguous(), best.zeros.T.contiguous())


def _diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """[columns, columns] to [groups, size, size]."""
    count = len(gram) // size
    return torch.stack([gram[i * size :][:size, i * size : (i + 1) * size] for i in range(count)])


def _errors(groups: Tensor, blocks: Tensor, offer: Grid, format_: IntegerFormat) -> Tensor:
    """δ G δᵀ [groups, rows] of groups [groups, rows, size] on a grid [groups, rows]."""
    scales, zeros = offer.scales[..., None], offer.zeros[..., None]
    delta = (groups / scales).round_().add_(zeros).clamp_(0, format_.levels).sub_(zeros).mul_(scales)
    delta.sub_(groups)
    return torch.bmm(delta, blocks).mul_(delta).sum(2)
