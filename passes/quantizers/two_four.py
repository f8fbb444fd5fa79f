"""2:4 weights in one sweep: SparseGPT's choice of what is kept and GPTQ's rounding share one feedback.

Two of each four are chosen when the sweep reaches them. A row that is 2:4 already keeps its zeros, whatever
the sparsifier.
"""

from torch import Tensor

from gammac.formats import is_two_four, keep_two
from gammac.passes.quantizers.sparse_sweep import SparseSweep
from gammac.passes.sparsifiers import Sparsifier


class TwoFourSweep(SparseSweep):
    """See SparseSweep; the order leaves fours whole."""

    def __init__(
        self, weight: Tensor, sparsifier: Sparsifier, diagonal: Tensor, order: Tensor, factor: Tensor
    ) -> None:
        super().__init__(weight, sparsifier, diagonal, order, factor)
        done = is_two_four(weight)
        self.fixed = keep_two(weight.abs() * self.restored(self.importance[None]))
        self.fixed[done] = keep_two((weight[done] != 0).float())
        if sparsifier.in_sweep:
            self.choose = ~done
        self.prune()
