"""DB-LLM (Chen et al. 2024, arXiv 2402.11960): two binary planes with a scale each.

Section 3.2, "Flexible Dual Binarization": begin at a symmetric 2-bit grid, whose levels -s, 0, s, 2s are
those of α₁ = 2s, α₂ = -s, and let the two scales go their own ways. The paper trains them; here they are
fitted to the weight, then in turns with the codes to the layer's outputs. `--learn-rounding` trains both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from gammac.formats import DUAL_BINARY, DualBinaryFormat, Format, IntegerFormat, Quantized
from gammac.formats.dual_binary import in_order, levels_of
from gammac.passes.quantizers.gptq import Feedback
from gammac.passes.quantizers.grid import SMALLEST_SCALE, choose_grid
from gammac.passes.quantizers.levels import by_group, sweep_to_levels

FITS: Final = 8  # of scales to the weight alone, before the first sweep
RIDGE: Final = 1e-6  # of the mean diagonal, where a plane of a group is empty


@dataclass(frozen=True)
class DbLlm:
    """`rounds` of choosing codes with error feedback and fitting scales to them; the best one is taken."""

    name: ClassVar[str] = "db_llm"
    needs_gram: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = (DUAL_BINARY,)
    stacks: ClassVar[bool] = True
    clip: str = "mse"
    act_order: bool = True
    damping: float = 0.01
    rounds: int = 4

    def quantize(self, weight: Tensor, gram: Tensor | None, formats: Sequence[Format]) -> list[Quantized]:
        """See Quantizer. Raises CompileError when the Gram matrix has no usable inverse."""
        assert gram is not None, "db_llm needs the Gram matrix of the inputs"
        feedback = Feedback.of(gram, self.act_order, self.damping)
        weight = feedback.alive(weight)
        damped = gram + self.damping * gram.diagonal().mean() * torch.eye(len(gram))
        found = []
        for format_ in formats:
            assert isinstance(format_, DualBinaryFormat), f"{format_.name} has no two planes"
            scales = fit_scales(weight, format_, self.clip, feedback.importance)
            found.append(self._in_turns(weight, format_, scales, damped, feedback))
        return found

    def _in_turns(
        self, weight: Tensor, format_: DualBinaryFormat, scales: Tensor, gram: Tensor, feedback: Feedback
    ) -> Quantized:
        """Each row keeps its best round: rows don't depend on what they are stacked with."""
        size = format_.inputs_per_scale(weight.shape[1])
        best_scales, least = scales, torch.full((len(weight),), torch.inf)
        best_codes = torch.zeros(weight.shape, dtype=torch.uint8)
        for _ in range(self.rounds):
            codes = sweep_to_levels(weight, levels_of(scales), size, feedback.order, feedback.factor)
            scales = refit_scales(weight, format_.quantized(codes, scales), gram)
            delta = format_.quantized(codes, scales).dequantize() - weight
            lost = ((delta @ gram) * delta).sum(1)
            better = lost < least
            least = torch.where(better, lost, least)
            best_codes = torch.where(better[:, None], codes, best_codes)
            best_scales = torch.where(better[:, None, None], scales, best_scales)
        return format_.quantized(best_codes, best_scales)


def int2_scales(weight: Tensor, group: int, clip: str, importance: Tensor | None = None) -> Tensor:
    """α₁, α₂ f32 [rows, groups, 2] of the symmetric 2-bit grid, the longer side where it loses less.

    The levels of a grid with the step s are -2s, -s, 0, s: α₁ = -2s, α₂ = s; or all of them negated.
    """
    found, losses = [], []
    for side in (1.0, -1.0):
        grid = choose_grid(side * weight, IntegerFormat(2, group, True), clip, importance)
        scales = torch.stack([-2 * side * grid.scales, side * grid.scales], -1)
        found.append(scales)
        losses.append(_losses(weight, scales, importance))
    return torch.where((losses[0] <= losses[1])[..., None], found[0], found[1])


def assign(weight: Tensor, scales: Tensor) -> Tensor:
    """Which of the ascending levels is nearest, u8 [rows, groups, size], as weight is; scales
    [rows, groups, 2].

    DB-LLM, section 3.2: b₁ = [w > (α₁ + α₂) / 2], b₂ = [w < α₁ b₁ + α₂ / 2] for α₂ < 0 < α₁ + α₂ < α₁.
    """
    mirrored = scales[..., :1] < 0
    sign = torch.where(mirrored, -1.0, 1.0)
    long, short = (sign * part[..., None] for part in scales.float().unbind(-1))
    values = sign * weight
    first = (values > (long + short) / 2).to(torch.uint8)
    second = (values < long * first + short / 2).to(torch.uint8)
    code = 2 * first + 1 - second
    return torch.where(mirrored, 3 - code, code)


def fit_scales(weight: Tensor, format_: DualBinaryFormat, clip: str, importance: Tensor) -> Tensor:
    """α₁, α₂ f32 [rows, groups, 2], fitted in turns with the nearest codes, from the 2-bit grid on.

    Weighted least squares with importance [columns]; a group keeps what loses least.
    """
    size = format_.inputs_per_scale(weight.shape[1])
    shares, groups = by_group(importance[None], size), by_group(weight, size)
    best = int2_scales(weight, format_.group, clip, importance)
    least, scales = _losses(weight, best, importance), best
    for _ in range(FITS):
        planes = _planes(format_, assign(groups, scales), scales).float()
        weighted = planes * shares[:, :, None]
        normal = weighted @ planes.mT
        wanted = weighted @ groups[..., None]
        scales = in_order(_solve(normal, wanted), SMALLEST_SCALE)
        lost = _losses(weight, scales, importance)
        best = torch.where((lost < least)[..., None], scales, best)
        least = torch.minimum(lost, least)
    return best


def refit_scales(weight: Tensor, found: Quantized, gram: Tensor) -> Tensor:
    """α₁, α₂ f32 [rows, groups, 2] that lose least of the outputs for the codes as they are.

    Group after group, the others held: least squares of tr(Δ G Δᵀ) in two unknowns a row. A step that the
    order of the levels would turn into a loss is not taken.
    """
    format_ = found.format
    size, columns = format_.inputs_per_scale(weight.shape[1]), weight.shape[1]
    scales = found.scales.float().clone()
    planes = torch.stack([found.parts["first"], found.parts["second"]], 1).float()
    delta = weight - found.dequantize()
    for group, start in enumerate(range(0, columns, size)):
        end = min(start + size, columns)
        b = planes[:, :, start:end]
        bg = b @ gram[start:end, start:end]
        normal, wanted = bg @ b.mT, b @ (delta @ gram[:, start:end])[..., None]
        tried = in_order(scales[:, group] + _solve(normal, wanted), SMALLEST_SCALE)
        step = (tried - scales[:, group])[..., None]
        change = (step.mT @ normal @ step - 2 * step.mT @ wanted)[:, :, 0]
        step = step * (change < 0)[..., None]
        same_side = (tried[:, :1] < 0) == (scales[:, group, :1] < 0)
        step = step * same_side[..., None]
        scales[:, group] += step[..., 0]
        delta[:, start:end] -= (step.mT @ b)[:, 0]
    return scales


def _solve(normal: Tensor, wanted: Tensor) -> Tensor:
    """x [..., 2] of normal [..., 2, 2] · x = wanted [..., 2, 1]."""
    ridge = RIDGE * normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-20)
    solved: Tensor = torch.linalg.solve(normal + ridge[..., None, None] * torch.eye(2), wanted)
    return solved[..., 0]


def _planes(format_: DualBinaryFormat, codes: Tensor, scales: Tensor) -> Tensor:
    """first and second u8 [rows, groups, 2, size] of codes [rows, groups, size]."""
    rows, groups, size = codes.shape
    parts = format_.with_group(size).quantized(codes.reshape(rows, groups * size), scales).parts
    return torch.stack([parts[name].reshape(rows, groups, size) for name in ("first", "second")], 2)


def _losses(weight: Tensor, scales: Tensor, importance: Tensor | None) -> Tensor:
    """What the nearest levels lose, [rows, groups]."""
    columns = weight.shape[1]
    size = -(-columns // scales.shape[1])
    levels = levels_of(scales)
    codes = assign(by_group(weight, size), scales).long()
    delta = by_group(weight, size) - levels.gather(-1, codes)
    shares = by_group((torch.ones(columns) if importance is None else importance)[None], size)
    return (delta.square() * shares).sum(-1)
