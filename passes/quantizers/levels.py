"""Error feedback onto levels that are no integer grid: a group has a few numbers to choose from."""

from typing import Final

import torch
from torch import Tensor

from gammac.passes.quantizers.kernels import sweep_levels

BLOCK: Final = 128  # columns that are swept before the rest is updated


def sweep_to_levels(weight: Tensor, levels: Tensor, size: int, order: Tensor, factor: Tensor) -> Tensor:
    """Indices of levels u8 [rows, columns], each column making up for those before it in `order`.

    weight f32 [rows, columns]; levels f32 [rows, groups, n] for groups of `size` columns; factor is
    `inverse_factor` of the Gram matrix in that order. GPTQ (arXiv 2210.17323), algorithm 1.
    """
    rows, columns = weight.shape
    left = weight[:, order].contiguous()
    codes = torch.empty_like(left)
    groups = (order // size).numpy()
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.empty(rows, end - start)
        sweep_levels(
            left.numpy(), codes.numpy(), errors.numpy(), factor.numpy(), levels.contiguous().numpy(), groups,
            start, end,
        )  # fmt: skip
        left[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return restored.to(torch.uint8)


def by_group(values: Tensor, size: int) -> Tensor:
    """[rows, columns] as [rows, groups, size], the last group filled up with zeros."""
    rows, columns = values.shape
    return torch.nn.functional.pad(values, (0, -columns % size)).reshape(rows, -1, size)
