"""Weights of which so many of each eight, or a share of each row, are kept: pruned and rounded in one sweep.

In the sweep, a block of 128 columns is chosen when it is reached, from weights as feedback has left them
(SparseGPT, arXiv 2301.00774, section 3.2). Of a row that keeps a share, those of the block stay that are
among the largest of all that are still to come.
"""

import torch
from torch import Tensor

from gammac.formats import KeptFormat
from gammac.formats.kept import largest
from gammac.passes.quantizers.sparse_sweep import SparseSweep
from gammac.passes.sparsifiers import Sparsifier


class KeptSweep(SparseSweep):
    """See SparseSweep; one for each density. The order leaves eights whole where the format counts them."""

    def __init__(
        self, format_: KeptFormat, weight: Tensor, sparsifier: Sparsifier, diagonal: Tensor, order: Tensor,
        factor: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(weight, sparsifier, diagonal, order, factor)
        self.format, self.in_sweep = format_, sparsifier.in_sweep
        self.fixed = torch.zeros(weight.shape, dtype=torch.bool)
        if not sparsifier.in_sweep:
            self.fixed = format_.best(weight.abs() * self.restored(self.importance[None]))
        self.prune()

    def chosen(self, keep: Tensor, left: Tensor, start: int, end: int) -> None:
        """See SparseSweep."""
        if not self.in_sweep:
            return
        if self.format.together > 1:
            keep[:, start:end] = self.format.best(left[:, start:end].abs() * self.importance[start:end])
            return
        scores = left[:, start:].abs() * self.importance[start:]
        counts = self.format.kept_of(left.shape[1]) - keep[:, :start].sum(1)
        keep[:, start:end] = largest(scores, counts)[:, : end - start]
