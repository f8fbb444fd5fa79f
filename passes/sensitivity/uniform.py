"""Score so that bits are spread as evenly as the budget allows: the plainest baseline, no data.

    weight @a : f32[64,64] = sha256:… {role = "block", candidates = {w2g64 = "sha256:…", w3g64 = "sha256:…"}}
    weight @b : f32[64,64] = sha256:… {role = "block", candidates = {w2g64 = "sha256:…", w3g64 = "sha256:…"}}
-> of which a budget of 2.5 makes w3g64 and w2g64
    weight @a : f32[64,64] = sha256:… {…, scores = {w2g64 = 1.0, w3g64 = 0.015625}}
    weight @b : f32[64,64] = sha256:… {…, scores = {w2g64 = 0.625, w3g64 = 0.00976562}}

Everyone gets the narrower width first; the wider one is handed out in the order of the module until the
budget is used up. This is the uniform quantization that papers compare with, made to fit any budget.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

from gammac.formats import candidates_of, parse_format
from gammac.ir import Module, Weight
from gammac.passes.candidates import weights_have_candidates
from gammac.passes.sensitivity.scores import rounded, weights_have_scores
from gammac.pipeline import Context, Invariant

# Steeper than the errors of grids, which fall by 4: what is left of a budget, less than one upgrade,
# must not pay for one small weight a step down and one large weight a step up.
BASE: Final = 64.0
# The last weight of the module counts this much less than the first. Were what they gain a bit nearly
# equal, the integer program's search would be long: under a budget in bytes, 210 weights took 50 s with
# a gentle slope and take less than two with this one.
SLOPE: Final = 0.75


@dataclass(frozen=True)
class Uniform:
    """score(b) = n · 64^−bits · (1 − ¾ depth), n parameters, depth from 0 to 1 in the module's order."""

    name: ClassVar[str] = "uniform"
    reads: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates,)
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_scores,)

    def run(self, module: Module, ctx: Context) -> Module:
        """From shapes and formats alone."""
        return with_even_scores(module, {})


def with_even_scores(module: Module, ahead: dict[str, float]) -> Module:
    """The module with uniform's scores; weights named in `ahead` are served that many bits earlier."""
    weights = [w for w in module.weights.values() if "candidates" in w.attrs]
    return module.with_weights(
        *(
            _scored(w, (1 - SLOPE * index / len(weights)) * BASE ** ahead.get(w.name, 0.0))
            for index, w in enumerate(weights)
        )
    )


def _scored(weight: Weight, level: float) -> Weight:
    level *= weight.type.numel()
    widths = {name: parse_format(name).bits for name in candidates_of(weight)}
    return weight.with_attrs(scores={name: rounded(level * BASE**-bits) for name, bits in widths.items()})
