"""Trellis-coded quantization with error feedback, as in QTIP (Tseng et al. 2024, arXiv 2406.11235).

Columns go in GPTQ's order, and each one's tiles are coded against what the columns before it lost (BlockLDLQ
there). Tiles lie within a column, so that feedback is as fine as GPTQ's: a tile of 16 × 16 weights, which
suits tensor cores, lets 16 columns go without.

A row's scale is the root mean square of its weights times a factor. Feedback makes what is really coded wider
than the weights: the factor that loses least is found by trying some with a small trellis. Once the codes are
there, each row is stretched to what suits them best (least squares).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import TRELLIS, Format, Quantized, TrellisFormat, code_values, tile_bounds
from gammac.passes.quantizers.gptq import Feedback
from gammac.passes.quantizers.grid import SMALLEST_SCALE
from gammac.passes.quantizers.viterbi import SEAM, sweep_strip

FACTORS: Final = (1.03, 1.12, 1.22, 1.34)
GAUSSIAN_FACTOR: Final = FACTORS[0]  # the best for Gaussian weights without feedback
SEARCH_ROWS: Final = 64
SEARCH_SEAM: Final = 8


def search_state_bits(bits: int) -> int:
    """As few as fill a vector (of 16 states that lead to the same successors): the same factors win."""
    return max(8, 2 * bits + 4)


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
        problems = [_Problem(fed, gram, feedback.order, feedback.factor, f) for f in trellises]
        searched = self.clip != "none"
        factors = _best_factors(problems) if searched else [GAUSSIAN_FACTOR] * len(problems)
        swept = _swept(list(zip(problems, factors, strict=True)))
        return [p.stored(coded, searched) for p, coded in zip(problems, swept, strict=True)]


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
    seam: int = SEAM

    def smaller(self) -> "_Problem":
        """Some of the rows on fewer states: which scale is best can be told from that."""
        state_bits = min(search_state_bits(self.format.bits), self.format.state_bits)
        rows = self.weight[:: -(-len(self.weight) // SEARCH_ROWS)]
        format_ = replace(self.format, state_bits=state_bits)
        return replace(self, weight=rows, format=format_, seam=SEARCH_SEAM)

    def scales(self, factor: float) -> Tensor:
        """[rows, groups]: `factor` times what gives the values the weights' root mean square."""
        groups = torch.split(self.weight.square(), self.format.inputs_per_scale(self.weight.shape[1]), 1)
        squares = torch.stack([group.mean(1) for group in groups], 1)
        table = code_values(self.format.state_bits)
        return _stored(squares.sqrt() * (factor / float(table.square().mean().sqrt())))

    def loss(self, coded: _Coded) -> float:
        """tr(Δ G Δᵀ)."""
        delta = coded.values - self.weight
        return float(((delta @ self.gram) * delta).sum())

    def stored(self, coded: _Coded, stretched: bool) -> Quantized:
        """Codes and scales in the format."""
        scales = self._stretched(coded) if stretched else coded.scales
        return self.format.quantized(coded.codes, scales.half())

    def _stretched(self, coded: _Coded) -> Tensor:
        """The scales with each row times what brings it nearest to the weight, as G measures it."""
        seen = coded.values @ self.gram
        factors = (seen * self.weight).sum(1) / (seen * coded.values).sum(1).clamp(min=1e-30)
        return _stored(coded.scales * factors[:, None])


class _Sweep:
    """One pass over a problem's columns: what is left of the weight, and what has been found."""

    def __init__(self, problem: _Problem, factor: float) -> None:
        rows, columns = problem.weight.shape
        self.problem, self.scales = problem, problem.scales(factor)
        self.left = problem.weight[:, problem.order].contiguous()
        self.codes, self.found = torch.empty(columns, rows, dtype=torch.uint8), torch.empty(columns, rows)
        self.strips = list(pairwise(tile_bounds(rows)))

    def run(self, begin: int, end: int) -> None:
        """Code one tile's rows."""
        problem, columns = self.problem, self.left.shape[1]
        branches = 1 << problem.format.bits
        codes = np.empty((columns, end - begin), np.uint8)
        found = np.empty((columns, end - begin), np.float32)
        sweep_strip(
            self.left[begin:end].numpy(), problem.factor.numpy(), self.scales[begin:end].numpy(),
            (problem.order // problem.format.inputs_per_scale(columns)).numpy(),
            code_values(problem.format.state_bits).reshape(-1, branches).T.contiguous().numpy(),
            codes, found, tuple(range(branches)), problem.seam,
        )  # fmt: skip
        self.codes[:, begin:end], self.found[:, begin:end] = torch.from_numpy(codes), torch.from_numpy(found)

    def coded(self) -> _Coded:
        """What was found, columns in their own order again."""
        place = torch.argsort(self.problem.order)
        return _Coded(self.codes[place], self.scales, self.found[place].T)


def _swept(jobs: Sequence[tuple[_Problem, float]]) -> list[_Coded]:
    """Each problem coded with its factor. The tiles of all of them share the threads."""
    sweeps = [_Sweep(problem, factor) for problem, factor in jobs]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        running = [pool.submit(sweep.run, *strip) for sweep in sweeps for strip in sweep.strips]
        for strip in running:
            strip.result()
    return [sweep.coded() for sweep in sweeps]


def _best_factors(problems: Sequence[_Problem]) -> list[float]:
    """For each problem the factor of the scale that loses least on some of its rows."""
    samples = [problem.smaller() for problem in problems]
    swept = iter(_swept([(sample, factor) for sample in samples for factor in FACTORS]))
    losses = [[sample.loss(next(swept)) for _ in FACTORS] for sample in samples]
    return [FACTORS[row.index(min(row))] for row in losses]


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
