"""One row's model: the pipeline of a compile up to what an emitter would write, and what it took."""

from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Final

from gammac.budget import SIZE, parse_budgets
from gammac.cache import key_of
from gammac.driver import Plan, extra_bytes
from gammac.ir import Module, to_text
from gammac.passes import LEGALIZERS, default_pipeline
from gammac.passes.candidates import Candidates
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.collect_guided_grams import CollectGuidedGrams
from gammac.passes.fold_constants import FoldConstants
from gammac.passes.insert_kv_cache import InsertKvCache
from gammac.passes.keep_precision import KeepPrecision
from gammac.passes.raise_patterns import RaisePatterns
from gammac.passes.split_rows import SplitRows
from gammac.pipeline import Context, Pass, Pipeline, Step, full_options_text
from gammac.runtime.probe import peak_rss_bytes
from gammac.study.rows import RowSpec
from gammac.sweep import seconds_of, sum_of
from gammac.targets.target import load_target

CALIBRATING: Final = (CollectGrams, CollectGuidedGrams)
# passes of no time worth telling, which any other compile may have left in the cache
REWRITING: Final = (FoldConstants, RaisePatterns, InsertKvCache, KeepPrecision, SplitRows)


@dataclass(frozen=True)
class Seconds:
    """What the passes of a row took when they ran; None: that was before a study watched them."""

    calibration: float | None  # shared by all rows that see the same inputs
    candidates: float | None
    rest: float | None  # transforms, allocation, learning

    @property
    def total(self) -> float | None:
        """What a compile from an empty cache would take of these."""
        return sum_of((self.calibration, self.candidates, self.rest))


@dataclass(frozen=True)
class Made:
    """A quantized module. `peak_bytes`: resident while its passes ran; None where it is not known."""

    module: Module
    seconds: Seconds
    peak_bytes: int | None


def plan_of(row: RowSpec, plan: Plan) -> Plan:
    """The study's plan with the options of a row. Raises CompileError for options that make no sense."""
    request = row.request(plan.request)
    target = plan.target if request.target == plan.request.target else load_target(request.target)
    return replace(plan, request=request, target=target, budgets=parse_budgets(request.budget))


def passes_of(plan: Plan) -> tuple[Pass, ...]:
    """A compile's passes, without the last, which is the emitter's. Raises CompileError."""
    sized = any(budget.kind == SIZE for budget in plan.budgets)
    every = default_pipeline(
        plan.request.choices, plan.target.emitter, compiler=plan.compiler,
        extra_bytes=extra_bytes(plan, plan.module) if sized else 0,
    )  # fmt: skip
    return tuple(takewhile(lambda p: not isinstance(p, tuple(LEGALIZERS.values())), every))


def key_of_row(plan: Plan, ctx: Context) -> str:
    """What a row's module depends on."""
    passes = passes_of(plan)
    reads = sorted({name for p in passes for name in p.reads})
    own = replace(ctx, target=plan.target, budgets=plan.budgets).fingerprint(reads)
    return key_of("study", to_text(plan.module), own, *map(full_options_text, passes))


def make(plan: Plan, ctx: Context) -> Made:
    """Run a row's passes; those that rows share are found in the cache. Raises CompileError."""
    steps: list[Step] = []
    fresh = _forget_peak()
    own = replace(ctx, target=plan.target, budgets=plan.budgets)
    module = Pipeline(passes_of(plan), (steps.append,)).run(plan.module, own)
    worked = any(not step.cached for step in steps if isinstance(step.pass_, Candidates))
    peak = peak_rss_bytes() if fresh and worked else None
    took = [(s.pass_, seconds_of(s, own)) for s in steps if not isinstance(s.pass_, REWRITING)]
    calibration = [s for p, s in took if isinstance(p, CALIBRATING)]
    candidates = [s for p, s in took if isinstance(p, Candidates)]
    rest = [s for p, s in took if not isinstance(p, (*CALIBRATING, Candidates))]
    known = ctx.cache.record(key_of("peak", key_of_row(plan, ctx)), lambda: {"bytes": peak})
    return Made(module, Seconds(sum_of(calibration), sum_of(candidates), sum_of(rest)), known["bytes"])


def _forget_peak() -> bool:
    """Start to count the peak of resident memory anew, where Linux lets us."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False
