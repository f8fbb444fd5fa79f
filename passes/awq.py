"""AWQ's scales: channels that carry much are spread over finer steps (arXiv 2306.00978, section 3.2).

    %1 = rms_norm %0, @norm                       @norm divided by s
    %2 = linear %1, @gate                         columns of @gate and @up times s
    %3 = linear %1, @up

s = a^α / √(max a^α · min a^α) with a the mean magnitude of each input channel and α of 0, 0.05 … 0.95 the one
whose rounded weights change the output least. Where the paper runs a whole attention or MLP for q, k, v and
for gate, up, the loss here is the relative output error tr(Δ G Δᵀ) / tr(W G Wᵀ), summed over the linears of
a site, with Δ = Q(W·s)/s − W and the Gram matrix G of the full-precision inputs: the same for o and down, and
twenty candidates cost no run of the model. Sites and what makes a model keep its function: see scale_sites.

One scaling serves all candidates of a weight, so α is tied to one format.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from torch import Tensor

from gammac.calibration import Segment, SegmentWeights
from gammac.diagnostics import CompileError
from gammac.formats import IntegerFormat, parse_format
from gammac.ir import Module, Op, Operand
from gammac.passes.by_segment import collect_by_segment
from gammac.passes.collect_grams import GramSums
from gammac.passes.input_magnitudes import InputMagnitudes
from gammac.passes.quantizers import output_error
from gammac.passes.quantizers.grid import choose_grid, on_grid, round_to_grid
from gammac.passes.scale_sites import Site, find_sites, fold_scales, query_key_weights
from gammac.pipeline import Context, Invariant, full_options_text

SMALLEST: Final = 1e-4
"""Of a channel's mean magnitude, as in the authors' code."""


@dataclass(frozen=True)
class Awq:
    """`format`: the one that α is chosen for; `steps`: how many α are tried, 0 among them. `keep_qk_range`:
    mark q and k so that no quantizer clips them, as the authors do."""

    name: ClassVar[str] = "awq"
    reads: ClassVar[tuple[str, ...]] = ("calibration",)
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()
    format: str = "w3g64"
    steps: int = 20
    keep_qk_range: bool = False

    def run(self, module: Module, ctx: Context) -> Module:
        """Each finished block is remembered. Raises CompileError for a wrong option, or without text."""
        parse_format(self.format)
        if self.steps < 1:
            raise CompileError(f"steps={self.steps}", hint="steps is 1 or more")
        sites = {site.value: site for site in find_sites(module, self.name)}
        found = collect_by_segment(
            module,
            ctx,
            full_options_text(self),
            "searching scales",
            lambda: _Search(self, module, sites),
        )
        scales = {
            s: ctx.store.tensor(r["scales"]) for s in sites.values() if (r := found.get(s.weights()[0]))
        }
        module = fold_scales(module, scales, ctx)
        said = {w: found[s.weights()[0]]["said"] for s in scales for w in s.weights()}
        module = module.with_weights(*(module.weights[n].with_attrs(awq=a) for n, a in said.items()))
        if not self.keep_qk_range:
            return module
        kept = query_key_weights(module.functions["forward"])
        return module.with_weights(*(module.weights[n].with_attrs(clip="none") for n in kept))


@dataclass
class _Search:
    """The sites whose linears stand in one segment."""

    options: Awq
    module: Module
    sites: dict[Any, Site]
    grams: GramSums = field(init=False)
    magnitudes: InputMagnitudes = field(default_factory=InputMagnitudes)
    seen: dict[Operand, Site] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.grams = GramSums(self.module)

    def visit(self, segment: Segment, weights: SegmentWeights, op: Op, tensors: list[Tensor]) -> None:
        """Sums of the inputs of each site, once."""
        site = self.sites.get(op.operands[0])
        if site is not None and op is site.linears[0]:
            self.seen[site.value] = site
            self.grams.visit(segment, weights, op, tensors)
            self.magnitudes.add(site.value, tensors[0])

    def results(self, ctx: Context) -> dict[str, Any]:
        """First weight of a site → the digest of its scales, and what the weights will say of them."""
        return {site.weights()[0]: self._search(site, ctx) for site in self.seen.values()}

    def _search(self, site: Site, ctx: Context) -> dict[str, Any]:
        weights = [ctx.store.tensor(self.module.weights[name].digest) for name in site.weights()]
        gram, mean = self.grams.mean(site.weights()[0]), self.magnitudes.mean(site.value)
        format_ = on_grid(parse_format(self.options.format)).fit(site.channels)
        alphas = [i / self.options.steps for i in range(self.options.steps)]
        losses = [rounding_loss(weights, gram, scales_for(mean, alpha), format_) for alpha in alphas]
        best = min(range(len(losses)), key=losses.__getitem__)
        said = {"alpha": alphas[best], "loss": _short(losses[best]), "unscaled": _short(losses[0])}
        return {"scales": ctx.store.put({"data": scales_for(mean, alphas[best])}), "said": said}


def scales_for(mean: Tensor, alpha: float) -> Tensor:
    """a^α, normalised so that the largest and the smallest lie around one; a [channels]."""
    scales = mean.clamp(min=SMALLEST).pow(alpha)
    return scales / (scales.max() * scales.min()).sqrt()


def rounding_loss(weights: list[Tensor], gram: Tensor, scales: Tensor, format_: IntegerFormat) -> float:
    """Σ tr(Δ G Δᵀ) / tr(W G Wᵀ) of weights [rows, columns] that are scaled, rounded, and scaled back."""
    total = 0.0
    for weight in weights:
        wide = weight * scales
        rounded = round_to_grid(wide, choose_grid(wide, format_, "none"), format_)
        total += output_error(weight, rounded.dequantize() / scales, gram)
    return total


def _short(loss: float) -> float:
    return float(f"{loss:.6g}")
