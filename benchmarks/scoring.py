"""What the benchmarks of allocation share: a model with candidates and scores, as compile would make it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gammac.budget import parse_budgets
from gammac.cli.console import show_progress
from gammac.driver import Plan, Request, context_of, make_plan
from gammac.ir import Module
from gammac.passes import Choices, default_pipeline
from gammac.passes.allocate import Allocate
from gammac.passes.sensitivity import STRATEGIES
from gammac.pipeline import Context, Pass, Pipeline
from gammac.trials import Assignment

BLOCK_FORMATS = "w2g64+w3g64+w4g64"
TABLE_FORMATS = "w8g64"


class Scoring:
    """One model on one device, calibrated on one text: candidates once, and scores by any strategy."""

    def __init__(
        self, model: str, device: str, calibration: Path, cache: Path | None = None, quantizer: str = "gptq",
        formats: str = BLOCK_FORMATS, backend: str = "",
    ) -> None:  # fmt: skip
        self.choices = Choices(formats, TABLE_FORMATS, quantizer=quantizer, refine=False)
        request = Request(model, device, "3", self.choices, calibration, backend=backend)
        self.plan: Plan = make_plan(request, cache)
        self.ctx: Context = context_of(self.plan, show_progress)
        before, _ = self._passes("weight_mse")
        self.candidates: Module = Pipeline(before).run(self.plan.module, self.ctx)

    def _passes(self, strategy: str) -> tuple[Sequence[Pass], Pass]:
        """What stands before a strategy, and the strategy."""
        choices = replace(self.choices, strategy=strategy)
        passes = default_pipeline(choices, self.plan.target.emitter, compiler=self.plan.compiler)
        cut = next(i for i, p in enumerate(passes) if isinstance(p, tuple(STRATEGIES.values())))
        return passes[:cut], passes[cut]

    def score(self, strategy: str, seed: int = 0, calibration: Path | None = None) -> Module:
        """The candidates with scores; learnt from another text than they were made with, if one is given."""
        ctx = self.ctx
        if calibration is not None:
            request = replace(self.plan.request, calibration=calibration)
            ctx = context_of(replace(self.plan, request=request), show_progress)
        return Pipeline((self._passes(strategy)[1],)).run(self.candidates, replace(ctx, seed=seed))

    def allocate(self, scored: Module, budget: str) -> tuple[Module, Assignment]:
        """The allocation, and the format of each weight by name."""
        chosen = Allocate().run(scored, replace(self.ctx, budgets=parse_budgets(budget)))
        return chosen, {n: str(w.attrs["format"]) for n, w in chosen.weights.items() if "format" in w.attrs}
