"""Pruning and rounding in one sweep: a pruned weight becomes zero where it stands, and the columns to come
make up for it as they do for rounding.

SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774), section 3.4. Grids are those of kept weights: a first
sweep prunes without rounding.
"""

from typing import Final

import torch
from torch import Tensor

from gammac.formats import KeptFormat, Quantized
from gammac.passes.quantizers.grid import Grid, choose_grid
from gammac.passes.quantizers.kernels import sweep_masked
from gammac.passes.sparsifiers import Sparsifier

BLOCK: Final = 128  # columns that are swept before the rest is updated


def order_of_groups(diagonal: Tensor, size: int) -> Tensor:
    """Columns [columns] in order of decreasing sums of the diagonal over `size` of them, left together."""
    groups = torch.argsort(diagonal.reshape(-1, size).sum(1), descending=True, stable=True)
    return (groups[:, None] * size + torch.arange(size)).flatten()


class SparseSweep:
    """Sweeps of one weight f32 [rows, columns]; `factor` is `inverse_factor` of the Gram matrix in `order`,
    and `diagonal` [columns] that of the Gram matrix. `fixed` is the mask where the sweep chooses nothing."""

    fixed: Tensor
    choose: Tensor  # rows whose two of four the kernel chooses

    def __init__(
        self, weight: Tensor, sparsifier: Sparsifier, diagonal: Tensor, order: Tensor, factor: Tensor
    ) -> None:
        self.weight, self.diagonal, self.order, self.factor = weight, diagonal, order, factor
        self.importance = sparsifier.importance(diagonal[order], factor.diagonal())
        self.choose = torch.zeros(len(weight), dtype=torch.bool)

    def chosen(self, keep: Tensor, left: Tensor, start: int, end: int) -> None:
        """Fill `keep` from column `start` to `end`, of weights as feedback has left them."""

    def prune(self) -> None:
        """What stays without rounding, and where."""
        self.pruned, self.mask = self._sweep(None, 0, 0)

    def quantized(self, format_: KeptFormat, clip: str) -> Quantized:
        """The weight in a format, its grid searched as `clip` says."""
        if format_.is_float:
            return format_.quantized(self.pruned, self.mask)
        grid = choose_grid(self.pruned, format_.grid, clip, self.diagonal)
        size = format_.inputs_per_scale(self.weight.shape[1])
        values, mask = self._sweep(grid, format_.grid.levels, size)
        scales = grid.scales.repeat_interleave(size, dim=1)[:, : values.shape[1]]
        return format_.quantized((values / scales).round() + format_.grid.midpoint, mask, grid.scales)

    def _sweep(self, grid: Grid | None, levels: int, size: int) -> tuple[Tensor, Tensor]:
        """What became of each weight, and the mask, in the original order; no grid, no rounding."""
        rows, columns = self.weight.shape
        left = self.weight[:, self.order].contiguous()
        keep = self.fixed[:, self.order].contiguous()
        groups = (self.order // (size or columns)).numpy()
        scales = torch.ones(rows, 1) if grid is None else grid.scales
        became = torch.empty_like(left)
        for start in range(0, columns, BLOCK):
            end = min(start + BLOCK, columns)
            errors = torch.empty(rows, end - start)
            self.chosen(keep, left, start, end)
            sweep_masked(
                left.numpy(), became.numpy(), keep.numpy(), errors.numpy(), self.factor.numpy(),
                self.importance.numpy(), scales.numpy(), groups, levels, self.choose.numpy(), start, end,
            )  # fmt: skip
            left[:, end:].addmm_(errors, self.factor[start:end, end:], alpha=-1)
        return self.restored(became), self.restored(keep)

    def restored(self, swept: Tensor) -> Tensor:
        """Columns of the sweep in their original order."""
        restored = torch.empty_like(swept)
        restored[:, self.order] = swept
        return restored
