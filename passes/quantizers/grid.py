"""Choosing scales and zero points: min-max, and the search for a range that clips.

The search shrinks each group's range at both ends and keeps what loses least, weighting each input
by how much it carries (the diagonal of the Gram matrix) when that is known. At 2 bits it is worth
40 % of the error.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gammac.formats import Format, Quantized

SMALLEST_SCALE: Final = 2.0**-14  # the smallest normal f16: below it a scale would lose its digits
CLIPS: Final = ("none", "mse")
SHRINKS: Final[dict[int, tuple[float, ...]]] = {
    # how far each end may move in; fewer bits gain from more
    1: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
    2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
    3: (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58),
    4: (1.0, 0.95, 0.9, 0.85, 0.8),
}
FINE_SHRINKS: Final = (1.0, 0.97)
CHUNK: Final = 1 << 18  # weights searched at once: what fits the cache next to its copies


@dataclass(frozen=True)
class Grid:
    """Scales f32 (f16-representable) and zero points f32, both [rows, groups]."""

    scales: Tensor
    zeros: Tensor


def choose_grid(weight: Tensor, format_: Format, clip: str = "mse", importance: Tensor | None = None) -> Grid:
    """Scales and zero points for weight [rows, columns]; importance [columns] weighs the inputs."""
    rows, columns = weight.shape
    size = format_.inputs_per_scale(columns)
    groups = format_.groups(columns)
    padded = torch.nn.functional.pad(weight, (0, groups * size - columns)).reshape(rows * groups, size)
    if importance is None:
        importance = torch.ones(columns)
    shares = torch.nn.functional.pad(importance, (0, groups * size - columns)).reshape(groups, size)
    step = max(1, CHUNK // size // groups) * groups
    parts = [_search(padded[i : i + step], shares, format_, clip) for i in range(0, rows * groups, step)]
    scales = torch.cat([p.scales for p in parts]).reshape(rows, groups)
    zeros = torch.cat([p.zeros for p in parts]).reshape(rows, groups)
    return Grid(scales, zeros)


def _search(weight: Tensor, shares: Tensor, format_: Format, clip: str) -> Grid:
    """The best grid for each row of weight [n * groups, size]; shares [groups, size] repeats."""
    low = weight.amin(1, keepdim=True).clamp(max=0.0)
    high = weight.amax(1, keepdim=True).clamp(min=0.0)
    importance = shares.repeat(weight.shape[0] // shares.shape[0], 1)
    best = _grid_of(low, high, format_)
    if clip == "none":
        return best
    best_error = _error(weight, importance, best, format_)
    for down, up in _shrink_pairs(format_):
        grid = _grid_of(low * down, high * up, format_)
        error = _error(weight, importance, grid, format_)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = Grid(
            torch.where(better, grid.scales, best.scales), torch.where(better, grid.zeros, best.zeros)
        )
    return best


def _shrink_pairs(format_: Format) -> list[tuple[float, float]]:
    shrinks = SHRINKS.get(format_.bits, FINE_SHRINKS)
    if format_.symmetric:
        return [(s, s) for s in shrinks[1:]]
    return [(a, b) for a in shrinks for b in shrinks if (a, b) != (1.0, 1.0)]


def _grid_of(low: Tensor, high: Tensor, format_: Format) -> Grid:
    """The grid that spans low … high, its scale rounded as it will be stored."""
    if format_.symmetric:
        # codes reach one step further down than up, so the larger end sets the scale
        reach = torch.maximum(-low / format_.midpoint, high / max(format_.midpoint - 1, 1))
        scales = _stored(reach)
        return Grid(scales, torch.full_like(scales, format_.midpoint))
    scales = _stored((high - low) / format_.levels)
    return Grid(scales, (-low / scales).round().clamp(0, format_.levels))


def _stored(scales: Tensor) -> Tensor:
    return scales.clamp(min=SMALLEST_SCALE).half().float()


def _error(weight: Tensor, importance: Tensor, grid: Grid, format_: Format) -> Tensor:
    codes = (weight / grid.scales).round_().add_(grid.zeros).clamp_(0, format_.levels)
    return (
        codes.sub_(grid.zeros).mul_(grid.scales).sub_(weight).square_().mul_(importance).sum(1, keepdim=True)
    )


def round_to_grid(weight: Tensor, grid: Grid, format_: Format) -> Quantized:
    """The nearest codes. weight [rows, columns]."""
    columns = weight.shape[1]
    size = format_.inputs_per_scale(columns)
    scales = Quantized.spread(grid.scales, size, columns)
    zeros = Quantized.spread(grid.zeros, size, columns)
    codes = ((weight / scales).round() + zeros).clamp(0, format_.levels)
    return as_quantized(codes, grid, format_)


def as_quantized(codes: Tensor, grid: Grid, format_: Format) -> Quantized:
    """Codes on a grid, in the types that are stored."""
    zeros = None if format_.symmetric else grid.zeros.to(torch.uint8)
    return Quantized(format_, codes.to(torch.uint8), grid.scales.half(), zeros)
