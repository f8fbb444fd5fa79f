"""Trellis-coded quantization with error feedback, as in QTIP (Tseng et al. 2024, arXiv 2406.11235).

Columns go in GPTQ's order, and each one's tiles are coded against what the columns before it lost (BlockLDLQ
there). Tiles lie within a column, so that feedback is as fine as GPTQ's: a tile of 16 × 16 weights, which
suits tensor cores, lets 16 columns go without.

A row's scale is the root mean square of its weights times a factor. Feedback makes what is really coded wider
than the weights: the factor that loses least is found by trying some with a small trellis. Once the codes are
there, each row is stretched to what suits them best (least squares).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import TRELLIS, Format, Quantized, TrellisFormat, code_values, tile_bounds
from gammac.passes.quantizers.gptq import Feedback
from gammac.passes.quantizers.grid import SMALLEST_SCALE
from gammac.passes.quantizers.viterbi import sweep_strips

FACTORS: Final = (1.03, 1.12, 1.22, 1.34)
GAUSSIAN_FACTOR: Final = FACTORS[0]  # the best for Gaussian weights without feedback
SEARCH_STATE_BITS: Final = 8  # a sixteenth of the states of 12, and the same factors win
SEARCH_ROWS: Final = 256


@dataclass(frozen=True)
class Tcq:
    """`clip`: none (a Gaussian's scale) or mse (the scale that loses least). `damping` is a share of the mean
    diagonal; with `act_order` columns of large inputs go first."""

    name: ClassVar[str] = "tcq"
    needs_gram: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = (TRELLIS,)
    stacks: ClassVar[bool] = False  # tiles run across rows
    clip: str = "mse"
    act_order: bool = True
    damping: float = 0.01

    def quantize(self, weight: Tensor, gram: Tensor | None, formats: Sequence[Format]) -> list[Quantized]:
        """See Quantizer. Raises CompileError when the Gram matrix has no usable inverse, or for few rows."""
        assert gram is not None, "tcq needs the Gram matrix of the inputs"
        trellises = on_trellises(formats, len(weight))
        feedback = Feedback.of(gram, self.act_order, self.damping)
        fed = feedback.alive(weight)
        return [self._coded(_Problem(fed, gram, feedback.order, feedback.factor, f)) for f in trellises]

    def _coded(self, problem: "_Problem") -> Quantized:
        if self.clip == "none":
            coded = problem.sweep(GAUSSIAN_FACTOR)
            return problem.format.quantized(coded.codes, coded.scales.half())
        sample = problem.smaller()
        losses = [sample.loss(sample.sweep(factor)) for factor in FACTORS]
        coded = problem.sweep(FACTORS[losses.index(min(losses))])
        return problem.format.quantized(coded.codes, problem.stretched(coded).half())


@dataclass(frozen=True)
class _Coded:
    """Codes u8 [columns, rows], scales f32 [rows, groups], and the values [rows, columns] of both."""

    codes: Tensor
    scales: Tensor
    values: Tensor


@dataclass(frozen=True)
class _Problem:
    """A weight [rows, columns], its inputs' Gram matrix, an order of columns, the inverse's factor in it."""

    weight: Tensor
    gram: Tensor
    order: Tensor
    factor: Tensor
    format: TrellisFormat

    def smaller(self) -> "_Problem":
        """Some of the rows on fewer states: which scale is best can be told from that."""
        format_ = replace(self.format, state_bits=min(SEARCH_STATE_BITS, self.format.state_bits))
        return replace(self, weight=self.weight[:: -(-len(self.weight) // SEARCH_ROWS)], format=format_)

    def sweep(self, factor: float) -> _Coded:
        """The weight coded column by column; a scale is `factor` times the root mean square under it."""
        rows, columns = self.weight.shape
        size, branches = self.format.inputs_per_scale(columns), 1 << self.format.bits
        table = code_values(self.format.state_bits)
        scales = _stored(self._root_mean_squares() * (factor / float(table.square().mean().sqrt())))
        left = self.weight[:, self.order].contiguous()
        values = table.reshape(-1, branches).T.contiguous()
        codes, found = torch.empty(columns, rows, dtype=torch.uint8), torch.empty(columns, rows)
        sweep_strips(
            left.numpy(), self.factor.numpy(), scales.numpy(), (self.order // size).numpy(),
            values.numpy(), np.array(tile_bounds(rows)), codes.numpy(), found.numpy(), tuple(range(branches)),
        )  # fmt: skip
        place = torch.argsort(self.order)
        return _Coded(codes[place], scales, found[place].T)

    def _root_mean_squares(self) -> Tensor:
        """[rows, groups]."""
        groups = torch.split(self.weight.square(), self.format.inputs_per_scale(self.weight.shape[1]), 1)
        return torch.stack([group.mean(1).sqrt() for group in groups], 1)

    def loss(self, coded: _Coded) -> float:
        """tr(Δ G Δᵀ)."""
        delta = coded.values - self.weight
        return float(((delta @ self.gram) * delta).sum())

    def stretched(self, coded: _Coded) -> Tensor:
        """The scales with each row times what brings it nearest to the weight, as G measures it."""
        seen = coded.values @ self.gram
        factors = (seen * self.weight).sum(1) / (seen * coded.values).sum(1).clamp(min=1e-30)
        return _stored(coded.scales * factors[:, None])


def on_trellises(formats: Sequence[Format], rows: int) -> list[TrellisFormat]:
    """The formats, all of them trellises. Raises CompileError where a tile would be shorter than a state."""
    found = [f for f in formats if isinstance(f, TrellisFormat)]
    assert len(found) == len(formats), f"{formats} are not all trellises"
    for format_ in found:
        if rows * format_.bits < format_.state_bits:
            raise CompileError(
                f"{format_.name} needs {-(-format_.state_bits // format_.bits)} rows or more, not {rows}",
                hint="its tiles run down the rows: leave such a weight to an integer format",
            )
    return found


def _stored(scales: Tensor) -> Tensor:
    return scales.clamp(min=SMALLEST_SCALE).half().float()
