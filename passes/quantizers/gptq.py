"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round column by column, and let the columns still
to come make up for the error.

Columns go in order of decreasing diagonal of the Gram matrix (act-order). Scales and zero points are
chosen before the sweep from the original weights (static groups), so that the stored group index of
a column stays column // group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import INTEGER, NORMAL_FLOAT, Format, IntegerFormat, NormalFloat, Quantized
from gammac.passes.quantizers.grid import Grid, as_quantized, choose_grid, on_grid
from gammac.passes.quantizers.kernels import sweep_block
from gammac.passes.quantizers.nf import sweep_normal_float

DAMPING_TRIES: Final = 5


@dataclass(frozen=True)
class Gptq:
    """`damping` is a share of the mean diagonal; `block` columns are swept before the rest is updated."""

    name: ClassVar[str] = "gptq"
    needs_gram: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = (INTEGER, NORMAL_FLOAT)
    stacks: ClassVar[bool] = True
    clip: str = "mse"
    act_order: bool = True
    damping: float = 0.01
    block: int = 128

    def quantize(self, weight: Tensor, gram: Tensor | None, formats: Sequence[Format]) -> list[Quantized]:
        """See Quantizer. Raises CompileError when the Gram matrix has no usable inverse."""
        assert gram is not None, "gptq needs the Gram matrix of the inputs"
        columns = weight.shape[1]
        diagonal = gram.diagonal()
        dead = diagonal <= 0  # inputs that never fired: whatever they are multiplied by is lost
        order = (
            torch.argsort(diagonal, descending=True, stable=True) if self.act_order else torch.arange(columns)
        )
        factor = inverse_factor(gram[order][:, order], self.damping)
        weight = weight.masked_fill(dead, 0.0)
        importance = diagonal.clamp(min=0)
        found = []
        for format_ in formats:
            if isinstance(format_, NormalFloat):
                found.append(sweep_normal_float(weight, format_, order, factor))
                continue
            integer = on_grid(format_)
            grid = choose_grid(weight, integer, self.clip, importance)
            codes = _sweep(weight, grid, integer, order, factor, self.block)
            found.append(as_quantized(codes, grid, integer))
        return found


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with UᵀU = (G + damping · mean diagonal · I)⁻¹ [columns, columns].

    Where the matrix is not positive definite the damping grows tenfold, in double precision.
    Raises CompileError after five tries.
    """
    mean = gram.diagonal().mean().clamp(min=1e-12)
    for attempt in range(DAMPING_TRIES):
        matrix = (gram if attempt == 0 else gram.double()).clone()
        matrix.diagonal().add_(damping * 10**attempt * mean)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            continue
        inverse = torch.cholesky_inverse(factor)
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed and bool(torch.isfinite(upper).all()):
            result: Tensor = upper.float().contiguous()
            return result
    raise CompileError(
        "the Gram matrix of the inputs has no inverse, however much it is damped",
        hint="calibrate on more or other text: the inputs hold NaN, infinity or nothing at all",
    )


def _sweep(
    weight: Tensor, grid: Grid, format_: IntegerFormat, order: Tensor, factor: Tensor, block: int
) -> Tensor:
    """Codes f32 [rows, columns], in the original order of columns."""
    rows, columns = weight.shape
    left = weight[:, order].contiguous()
    codes = torch.empty_like(left)
    groups = (order // format_.inputs_per_scale(columns)).numpy()
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty(rows, end - start)
        sweep_block(
            left.numpy(), codes.numpy(), errors.numpy(), factor.numpy(), grid.scales.numpy(),
            grid.zeros.numpy(), groups, format_.levels, start, end,
        )  # fmt: skip
        left[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return restored
