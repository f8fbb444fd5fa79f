"""SmoothQuant: hand the outliers of activations over to the weights (arXiv 2211.10438, equations 3 and 4).

    %1 = rms_norm %0, @norm                       @norm divided by s
    %2 = linear %1, @q                            columns of @q, @k and @v times s
    %3 = linear %1, @k
    %4 = linear %1, @v

s_j = max |X_j|^α / max |W_j|^(1−α), the maxima over all calibration tokens and over the rows of all readers.
Afterwards channel j reaches (max |X_j| · max |W_j|)^(1−α): the larger α, the more alike the channels. As in
the authors' code only norms are smoothed, not what o and down read. The function is kept (see scale_sites);
the gain shows where activations are rounded (see quantize_activations).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from gammac.calibration import Segment, SegmentWeights
from gammac.diagnostics import CompileError
from gammac.ir import Module, Op, Value
from gammac.passes.by_segment import collect_by_segment
from gammac.passes.input_magnitudes import InputMagnitudes
from gammac.passes.scale_sites import NORMS, Site, find_sites, fold_scales
from gammac.passes.sensitivity.scores import check_range
from gammac.pipeline import Context, Invariant

SMALLEST: Final = 1e-5
"""Of a scale, and of a column's largest weight, as in the authors' code."""


@dataclass(frozen=True)
class SmoothQuant:
    """`alpha`: how much of the difficulty goes into the weights, 0 to 1. The authors take 0.85 for Llama, 0.8
    for Mistral, 0.5 for OPT."""

    name: ClassVar[str] = "smooth_quant"
    reads: ClassVar[tuple[str, ...]] = ("calibration",)
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()
    alpha: float = 0.85

    def __post_init__(self) -> None:
        """Raises CompileError for an `alpha` outside 0 … 1."""
        check_range(self.name, "alpha", self.alpha, 0, 1)

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError for a module smoothed before, or without text."""
        sites = {s.value: s for s in find_sites(module, self.name) if s.source.name in NORMS}
        if not sites:
            raise CompileError(
                "no norm is read by linears of blocks alone: nothing can be smoothed",
                hint="compile without --smooth-quant",
            )
        again = [n for s in sites.values() for n in s.weights() if "smoothed" in module.weights[n].attrs]
        if again:
            raise CompileError("is smoothed already", loc=again[0], hint="run smooth_quant once")
        # the maxima hold for every alpha
        largest = collect_by_segment(module, ctx, self.name, "calibrating", lambda: _Maxima(sites))
        scales = {
            site: smoothing(
                ctx.store.tensor(largest[site.weights()[0]]), _largest_weights(module, site, ctx), self.alpha
            )
            for site in sites.values()
        }
        module = fold_scales(module, scales, ctx)
        names = [n for site in sites.values() for n in site.weights()]
        return module.with_weights(*(module.weights[n].with_attrs(smoothed=self.alpha) for n in names))


@dataclass
class _Maxima:
    """The largest magnitudes at the sites of one segment."""

    sites: dict[Value, Site]
    magnitudes: InputMagnitudes = field(default_factory=InputMagnitudes)
    seen: list[Site] = field(default_factory=list)

    def visit(self, segment: Segment, weights: SegmentWeights, op: Op, tensors: list[Tensor]) -> None:
        value = op.operands[0]
        site = self.sites.get(value) if isinstance(value, Value) else None
        if site is not None and op is site.linears[0]:
            self.magnitudes.add(site.value, tensors[0])
            self.seen += [] if site in self.seen else [site]

    def results(self, ctx: Context) -> dict[str, Any]:
        return {s.weights()[0]: ctx.store.put({"data": self.magnitudes.largest[s.value]}) for s in self.seen}


def _largest_weights(module: Module, site: Site, ctx: Context) -> Tensor:
    """max |W_j| over the rows of all readers, f32 [channels]."""
    columns = [ctx.store.tensor(module.weights[n].digest).abs().amax(0) for n in site.weights()]
    return torch.stack(columns).amax(0)


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Equation 4: s [channels] of the largest magnitudes of inputs and weights [channels].

    A channel that was never anything but zero keeps its scale.
    """
    scales = inputs.pow(alpha) / weights.clamp(min=SMALLEST).pow(1 - alpha)
    return torch.where(inputs > 0, scales.clamp(min=SMALLEST), 1.0)
