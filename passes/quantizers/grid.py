"""Choosing scales and zero points: min-max, and the search for a range that clips.

The search moves both ends of each group's range inwards and keeps what loses least, weighting each
input by how much it carries (the diagonal of the Gram matrix) when that is known. At 2 bits it is
worth 40 % of the error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gammac.formats import Format, IntegerFormat, Quantized, spread
from gammac.passes.quantizers.kernels import best_grids

SMALLEST_SCALE: Final = 2.0**-14  # the smallest normal f16: below it a scale would lose its digits
SHRINKS: Final[dict[int, tuple[float, ...]]] = {
    # how far each end may move in; fewer bits gain from more
    1: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
    2: (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44),
    3: (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58),
    4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8),
}
FINE_SHRINKS: Final = (1.0, 0.98)
CHUNK: Final = 1 << 16  # groups whose offers are in memory at once


@dataclass(frozen=True)
class Grid:
    """Scales f32 (f16-representable) and zero points f32, both [rows, groups]."""

    scales: Tensor
    zeros: Tensor


def on_grid(format_: Format) -> IntegerFormat:
    """The format, which is integer: a quantizer is given only what it writes."""
    assert isinstance(format_, IntegerFormat), f"{format_.name} is no integer grid"
    return format_


def on_grids(formats: Sequence[Format]) -> list[IntegerFormat]:
    """The formats, all of them integer."""
    return [on_grid(f) for f in formats]


def choose_grid(
    weight: Tensor, format_: IntegerFormat, clip: str = "mse", importance: Tensor | None = None
) -> Grid:
    """Scales and zero points for weight [rows, columns]; importance [columns] weighs the inputs.

    `clip` is none (min-max) or mse.
    """
    rows, columns = weight.shape
    size, groups = format_.inputs_per_scale(columns), format_.groups(columns)
    padding = (0, groups * size - columns)
    padded = torch.nn.functional.pad(weight, padding).reshape(rows * groups, size)
    if importance is None:
        importance = torch.ones(columns)
    shares = torch.nn.functional.pad(importance, padding).reshape(groups, size)
    step = max(1, CHUNK // groups) * groups
    parts = [_search(chunk, shares, format_, clip) for chunk in torch.split(padded, step)]
    scales = torch.cat([p.scales for p in parts]).reshape(rows, groups)
    zeros = torch.cat([p.zeros for p in parts]).reshape(rows, groups)
    return Grid(scales, zeros)


def fixed_grid(weight: Tensor, format_: IntegerFormat, rho: float) -> Grid:
    """A range of ±rho root mean squares of what shares a scale, for weight [rows, columns].

    Zero points are whole numbers, so the range lies half a step to one side: the side that loses less.
    """
    rows, columns = weight.shape
    size, groups = format_.inputs_per_scale(columns), format_.groups(columns)
    padded = torch.nn.functional.pad(weight, (0, groups * size - columns)).reshape(rows * groups, size)
    counts = torch.full((groups,), float(size))
    counts[-1] -= groups * size - columns
    squares = padded.square().sum(1, keepdim=True) / counts.repeat(rows)[:, None]
    scales = _stored(2 * rho * squares.sqrt() / format_.levels)
    middle = format_.levels / 2
    sides = (format_.midpoint,) if format_.symmetric else (math.floor(middle), math.ceil(middle))
    offers = Grid(scales.repeat(1, len(sides)), torch.tensor(sides).float().repeat(len(scales), 1))
    grid = _best(padded, torch.ones(groups, size), offers, format_)
    return Grid(grid.scales.reshape(rows, groups), grid.zeros.reshape(rows, groups))


def _search(weight: Tensor, shares: Tensor, format_: IntegerFormat, clip: str) -> Grid:
    """The best grid for each row of weight [n, size]; shares [groups, size] repeats over the rows."""
    low = weight.amin(1, keepdim=True).clamp(max=0.0)
    high = weight.amax(1, keepdim=True).clamp(min=0.0)
    down, up = shrinks_of(format_) if clip == "mse" else (torch.ones(1), torch.ones(1))
    offers = grids_of(low * down, high * up, format_)
    return offers if len(down) == 1 else _best(weight, shares, offers, format_)


def _best(weight: Tensor, shares: Tensor, offers: Grid, format_: IntegerFormat) -> Grid:
    """Of the grids offered to each row of weight [n, size] the one that loses least."""
    arrays = (t.contiguous().numpy() for t in (weight, shares, offers.scales, offers.zeros))
    best = best_grids(*arrays, format_.levels)
    chosen = torch.from_numpy(best)[:, None]
    return Grid(offers.scales.gather(1, chosen), offers.zeros.gather(1, chosen))


def shrinks_of(format_: IntegerFormat) -> tuple[Tensor, Tensor]:
    """Factors of the lower and the upper end, pair by pair; the first pair moves nothing."""
    shrinks = torch.tensor(SHRINKS.get(format_.bits, FINE_SHRINKS))
    if format_.symmetric:
        return shrinks, shrinks
    pairs = torch.cartesian_prod(shrinks, shrinks)
    return pairs[:, 0], pairs[:, 1]


def grids_of(low: Tensor, high: Tensor, format_: IntegerFormat) -> Grid:
    """Grids that span low … high [n, offers], the scale rounded as it will be stored."""
    if format_.symmetric:
        # codes reach one step further down than up, so the larger end sets the scale
        scales = _stored(torch.maximum(-low / format_.midpoint, high / max(format_.midpoint - 1, 1)))
        return Grid(scales, torch.full_like(scales, format_.midpoint))
    scales = _stored((high - low) / format_.levels)
    return Grid(scales, (-low / scales).round_().clamp_(0, format_.levels))


def _stored(scales: Tensor) -> Tensor:
    return scales.clamp(min=SMALLEST_SCALE).half().float()


def round_to_grid(weight: Tensor, grid: Grid, format_: IntegerFormat) -> Quantized:
    """The nearest codes. weight [rows, columns]."""
    columns = weight.shape[1]
    size = format_.inputs_per_scale(columns)
    scales = spread(grid.scales, size, columns)
    zeros = spread(grid.zeros, size, columns)
    codes = ((weight / scales).round() + zeros).clamp(0, format_.levels)
    return as_quantized(codes, grid, format_)


def as_quantized(codes: Tensor, grid: Grid, format_: IntegerFormat) -> Quantized:
    """Codes on a grid, in the types that are stored."""
    zeros = None if format_.symmetric else grid.zeros.to(torch.uint8)
    return format_.quantized(codes.to(torch.uint8), grid.scales.half(), zeros)
