"""Score by chance: the allocation that follows is one of many that fit, the floor for every strategy.

    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {w2g64 = "sha256:…"}}
->
    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {…}, scores = {w2g64 = 1730.5}}

The random search of mixed-precision papers (for example AMQ, arXiv 2509.12019, whose archive starts with
random designs), but within any budget exactly: chance sets the sensitivities, `allocate` solves for them.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from gammac.formats import candidates_of
from gammac.ir import Module
from gammac.passes.candidates import weights_have_candidates
from gammac.passes.sensitivity.scores import check_range, grid_noise, rounded, weights_have_scores
from gammac.pipeline import Context, Invariant


@dataclass(frozen=True)
class RandomFeasible:
    """score(b) = n · 4^−bits · exp(spread · x), n parameters, x normal: one draw a weight, by the seed.

    A `spread` of ln 4 = 1.39 moves a typical weight by one bit.
    """

    name: ClassVar[str] = "random"
    reads: ClassVar[tuple[str, ...]] = ("seed",)
    requires: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates,)
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_scores,)
    spread: float = 2.0

    def __post_init__(self) -> None:
        """Raises CompileError for a spread out of range."""
        check_range(self.name, "spread", self.spread, 0, 10)

    def run(self, module: Module, ctx: Context) -> Module:
        """Drawn in the order of the module."""
        generator = torch.Generator().manual_seed(ctx.seed)
        scored = []
        for weight in module.weights.values():
            if "candidates" in weight.attrs:
                level = math.exp(self.spread * float(torch.randn((), generator=generator)))
                scores = {name: rounded(grid_noise(weight, name) * level) for name in candidates_of(weight)}
                scored.append(weight.with_attrs(scores=scores))
        return module.with_weights(*scored)
