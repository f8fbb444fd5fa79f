"""Score a format by the squared change of the weight itself: no data, the plainest baseline.

    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {w2g64 = "sha256:…"}}
->
    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {…}, scores = {w2g64 = 5.25}}
"""

from dataclasses import dataclass
from typing import ClassVar

from gammac.ir import Module, Weight
from gammac.passes.candidates import weights_have_candidates
from gammac.passes.sensitivity.scores import rounded, squared_errors, weights_have_scores
from gammac.pipeline import Context, Invariant


@dataclass(frozen=True)
class WeightMse:
    """score(b) = Σ (W_b − W)²."""

    name: ClassVar[str] = "weight_mse"
    reads: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates,)
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_scores,)

    def run(self, module: Module, ctx: Context) -> Module:
        """Weight by weight."""
        weights = [w for w in module.weights.values() if "candidates" in w.attrs]
        return module.with_weights(*(_scored(w, ctx) for w in ctx.progress(weights, "scoring (weight_mse)")))


def _scored(weight: Weight, ctx: Context) -> Weight:
    return weight.with_attrs(scores={name: rounded(e) for name, e in squared_errors(weight, ctx).items()})
