"""Information calibration: NormalFloat around the offset that makes a group's codes say the most.

IR-QLoRA (Qin et al. 2024, arXiv 2402.05445), section 3.2: of offsets τ near a group's median the one whose
codes have the largest entropy. The paper's search leaves out τ = 0; here it is the first candidate, and what
is stored never has less entropy than NormalFloat has. Entropy is not error: the squared error may grow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from gammac.formats import (
    CALIBRATED_NORMAL_FLOAT,
    OFFSET_NORMAL_FLOAT,
    CalibratedNormalFloat,
    Format,
    OffsetNormalFloat,
    Quantized,
    spread,
)
from gammac.formats.normal_float import nearest_level, normal_levels, to_dynamic
from gammac.passes.quantizers.grid import SMALLEST_SCALE
from gammac.passes.quantizers.levels import by_group
from gammac.passes.quantizers.nf import Nf, divisors

Around = CalibratedNormalFloat | OffsetNormalFloat

REACH: Final = 0.1  # of σ, on each side of the median
SIGMA: Final = 0.5411  # of what NormalFloat scales to 1: 1 / Φ⁻¹(0.9677)


@dataclass(frozen=True)
class Icq:
    """`steps` offsets on each side of the median; the paper has 50."""

    name: ClassVar[str] = "icq"
    needs_gram: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = (CALIBRATED_NORMAL_FLOAT, OFFSET_NORMAL_FLOAT)
    stacks: ClassVar[bool] = True
    steps: int = 50

    def quantize(self, weight: Tensor, gram: Tensor | None, formats: Sequence[Format]) -> list[Quantized]:
        """See Quantizer. The Gram matrix is not looked at."""
        found = []
        for format_ in formats:
            assert isinstance(format_, Around), f"{format_.name} has no offsets"
            found.append(_calibrated(weight, format_, self.steps))
        return found


def entropies(codes: Tensor, count: int) -> Tensor:
    """Bits that a code says in each group, f32 [rows, groups], for codes [rows, groups, size] below count."""
    rows, groups, size = codes.shape
    places = torch.arange(rows * groups)[:, None] * count + codes.reshape(-1, size)
    counts = torch.bincount(places.flatten(), minlength=rows * groups * count)
    shares = counts.reshape(rows, groups, count) / size
    entropy: Tensor = -torch.special.xlogy(shares, shares).sum(-1) / torch.log(torch.tensor(2.0))
    return entropy


def offsets_by_entropy(groups: Tensor, bits: int, steps: int) -> Tensor:
    """τ f32 [rows, groups] of the largest entropy for groups [rows, groups, size]; of equals the first."""
    levels, count = normal_levels(bits), 1 << bits
    median = groups.median(-1).values
    width = (groups - median[..., None]).abs().amax(-1)
    shares = torch.linspace(-REACH * SIGMA, REACH * SIGMA, 2 * steps + 1).tolist()
    best = torch.zeros_like(median)
    most = torch.full_like(median, -1.0)
    for offset in (torch.zeros_like(median), *(median + share * width for share in shares)):
        shifted = groups - offset[..., None]
        scale = shifted.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_SCALE)
        found = entropies(nearest_level(shifted / scale, levels), count)
        better = found > most
        best, most = torch.where(better, offset, best), torch.where(better, found, most)
    return best


def _calibrated(weight: Tensor, format_: Around, steps: int) -> Quantized:
    """What is stored of an offset and its scale is a little off; groups that lose by it go without offset."""
    size = format_.inputs_per_scale(weight.shape[1])
    (plain,) = Nf().quantize(weight, None, [format_.plain])
    offsets = format_.offset_parts(offsets_by_entropy(by_group(weight, size), format_.bits, steps))
    first = _rounded(weight, format_, plain, offsets)

    def said(q: Quantized) -> Tensor:
        return entropies(by_group(q.codes, size), 1 << format_.bits)

    none = format_.offset_parts(torch.zeros_like(format_.offsets_of(offsets)))["offsets"]
    kept = torch.where(said(first) < said(plain), none, offsets["offsets"])
    return _rounded(weight, format_, plain, {**offsets, "offsets": kept})


def _rounded(weight: Tensor, format_: Around, plain: Quantized, offsets: dict[str, Tensor]) -> Quantized:
    """Codes around stored offsets. Scales are on the levels of the plain weight's, so that a group without
    offset has the plain weight's codes."""
    columns = weight.shape[1]
    size = format_.inputs_per_scale(columns)
    shifted = weight - spread(format_.offsets_of(offsets), size, columns)
    widths = by_group(shifted, size).abs().amax(-1).clamp(min=SMALLEST_SCALE)
    stored = {n: t for n, t in plain.parts.items() if n != "codes"}
    if isinstance(format_, CalibratedNormalFloat):
        stored["scales"] = to_dynamic(widths - stored["mean"], scales=stored["block_scales"])[0]
    else:
        stored |= format_.scale_parts(widths)
    scales = spread(divisors(format_, stored), size, columns)
    codes = nearest_level(shifted / scales, normal_levels(format_.bits))
    return format_.quantized(codes, {**stored, **offsets})
