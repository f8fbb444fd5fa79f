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
from gammac.formats import (
    DOUBLE_NORMAL_FLOAT,
    INTEGER,
    N_OF_EIGHT,
    NORMAL_FLOAT,
    TWO_FOUR,
    UNSTRUCTURED,
    Format,
    IntegerFormat,
    KeptFormat,
    NormalFloat,
    Quantized,
    TwoFourFormat,
)
from gammac.passes.quantizers.grid import Grid, as_quantized, choose_grid, on_grid
from gammac.passes.quantizers.kept import KeptSweep
from gammac.passes.quantizers.kernels import sweep_block
from gammac.passes.quantizers.nf import sweep_normal_float
from gammac.passes.quantizers.sparse_sweep import SparseSweep, order_of_groups
from gammac.passes.quantizers.two_four import TwoFourSweep
from gammac.passes.sparsifiers import make_sparsifier

DAMPING_TRIES: Final = 5


@dataclass(frozen=True)
class Gptq:
    """`damping` is a share of the mean diagonal; `block` columns are swept before the rest is updated;
    `mask`: the sparsifier that says what is kept in sparse formats."""

    name: ClassVar[str] = "gptq"
    needs_gram: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = (
        INTEGER,
        NORMAL_FLOAT,
        DOUBLE_NORMAL_FLOAT,
        TWO_FOUR,
        N_OF_EIGHT,
        UNSTRUCTURED,
    )
    stacks: ClassVar[bool] = True
    clip: str = "mse"
    act_order: bool = True
    damping: float = 0.01
    block: int = 128
    mask: str = "sparsegpt"

    def __post_init__(self) -> None:
        """Raises CompileError for a mask that isn't there."""
        make_sparsifier(self.mask)

    def quantize(self, weight: Tensor, gram: Tensor | None, formats: Sequence[Format]) -> list[Quantized]:
        """See Quantizer. Raises CompileError when the Gram matrix has no usable inverse."""
        assert gram is not None, "gptq needs the Gram matrix of the inputs"
        sparse = [f for f in formats if isinstance(f, KeptFormat)]
        dense = [f for f in formats if not isinstance(f, KeptFormat)]
        made = self._sparse(weight, gram, sparse) if sparse else []
        made += self._dense(weight, gram, dense) if dense else []
        found = {quantized.format: quantized for quantized in made}
        return [found[f] for f in formats]

    def _sparse(self, weight: Tensor, gram: Tensor, formats: Sequence[KeptFormat]) -> list[Quantized]:
        """Formats of one pattern share a mask where nothing is rounded, and the work before it."""
        diagonal = gram.diagonal().clamp(min=0)
        weight, sparsifier = weight.masked_fill(diagonal <= 0, 0.0), make_sparsifier(self.mask)
        alike: dict[tuple[str, float], list[KeptFormat]] = {}
        for format_ in formats:
            alike.setdefault((format_.kind, format_.density), []).append(format_)
        found = []
        for first, *others in alike.values():
            order = torch.arange(len(gram))
            if self.act_order:
                order = order_of_groups(diagonal, first.together)
            parts = (sparsifier, diagonal, order, inverse_factor(gram[order][:, order], self.damping))
            sweep: SparseSweep
            if isinstance(first, TwoFourFormat):
                sweep = TwoFourSweep(weight, *parts)
            else:
                sweep = KeptSweep(first, weight, *parts)
            found += [sweep.quantized(f, self.clip) for f in (first, *others)]
        return found

    def _dense(self, weight: Tensor, gram: Tensor, formats: Sequence[Format]) -> list[Quantized]:
        feedback = Feedback.of(gram, self.act_order, self.damping, self.block)
        weight = feedback.alive(weight)
        found = []
        for format_ in formats:
            if isinstance(format_, NormalFloat):
                found.append(sweep_normal_float(weight, format_, feedback.order, feedback.factor))
                continue
            integer = on_grid(format_)
            grid = choose_grid(weight, integer, self.clip, feedback.importance)
            found.append(as_quantized(feedback.codes(weight, grid, integer), grid, integer))
        return found


@dataclass(frozen=True)
class Feedback:
    """What of a Gram matrix the sweep needs; one serves every format and grid of a stack."""

    importance: Tensor  # [columns]
    order: Tensor  # [columns]
    factor: Tensor  # [columns, columns], in that order
    block: int = 128

    @classmethod
    def of(cls, gram: Tensor, act_order: bool, damping: float, block: int = 128) -> "Feedback":
        """Raises CompileError when the Gram matrix has no usable inverse."""
        diagonal = gram.diagonal()
        order = (
            torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(gram))
        )
        factor = inverse_factor(gram[order][:, order], damping)
        return cls(diagonal.clamp(min=0), order, factor, block)

    def alive(self, weight: Tensor) -> Tensor:
        """Zeros where inputs never fired: whatever these are multiplied by is lost."""
        return weight.masked_fill(self.importance <= 0, 0.0)

    def codes(
        self, weight: Tensor, grid: Grid, format_: IntegerFormat, dither: Tensor | None = None
    ) -> Tensor:
        """Codes f32 [rows, columns], in the original order of columns.

        `dither` [rows, columns], in steps, is added before each rounding, in the order of the sweep.
        """
        rows, columns = weight.shape
        left = weight[:, self.order].contiguous()
        codes = torch.empty_like(left)
        groups = (self.order // format_.inputs_per_scale(columns)).numpy()
        dither = torch.zeros(1, columns) if dither is None else dither
        for start in range(0, columns, self.block):
            end = min(start + self.block, columns)
            errors = torch.empty(rows, end - start)
            sweep_block(
                left.numpy(), codes.numpy(), errors.numpy(), self.factor.numpy(), grid.scales.numpy(),
                grid.zeros.numpy(), dither.numpy(), groups, format_.levels, start, end,
            )  # fmt: skip
            left[:, end:].addmm_(errors, self.factor[start:end, end:], alpha=-1)
        restored = torch.empty_like(codes)
        restored[:, self.order] = codes
        return restored


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
