"""Diagonals of the Hessian of a loss, estimated."""

from collections.abc import Sequence

import torch
from torch import Tensor


def hutchinson(gradients: Sequence[Tensor], leaves: Sequence[Tensor], seed: int) -> list[Tensor]:
    """v · (H v) for one Rademacher probe v over all leaves: unbiased for the Hessian's diagonal.

    `gradients` are those at `leaves`, made with `create_graph=True`; their graph is freed. Bekas, Kokiopoulou
    and Saad 2007, An estimator for the diagonal of a matrix; Yao et al. 2021, arXiv 2006.00719, section 3.2.
    """
    generator = torch.Generator().manual_seed(seed)
    probes = [2.0 * torch.randint(0, 2, leaf.shape, generator=generator) - 1 for leaf in leaves]
    products = torch.autograd.grad(gradients, leaves, probes, allow_unused=True)
    return [
        torch.zeros_like(probe) if product is None else probe * product
        for probe, product in zip(probes, products, strict=True)
    ]
