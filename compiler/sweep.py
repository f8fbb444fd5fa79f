"""Strategies beside each other: every strategy at every budget, allocated and tried end to end.

No artifact is written. A strategy scores once; each budget is an allocation of its own; all allocations
are tried on one text. Scores, allocations and trials are kept in the cache one by one, so that a killed
sweep goes on where it stopped and a repeated one finds everything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from gammac.budget import LOSS, SIZE, Budget, parse_budgets
from gammac.cache import key_of
from gammac.diagnostics import CompileError
from gammac.driver import Plan, Request, context_of, demand_predictions, extra_bytes, make_plan
from gammac.dryrun import guess_scores
from gammac.formats import candidates_of
from gammac.ir import Module, to_text
from gammac.passes import default_pipeline
from gammac.passes.allocate import Allocate
from gammac.passes.awq import Awq
from gammac.passes.candidates import Candidates
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.collect_guided_grams import CollectGuidedGrams
from gammac.passes.finetune import LearnRounding
from gammac.passes.quantize import Quantize
from gammac.passes.sensitivity import STRATEGIES, WeightMse
from gammac.pipeline import Context, Pass, Pipeline, Step, full_options_text
from gammac.progress import Progress, no_progress
from gammac.runtime.evaluate import WINDOW, windows_for
from gammac.targets.cost import Cost, module_cost
from gammac.targets.target import BLOCK
from gammac.trials import Assignment, Trial, run_trials
from gammac.weights import digest_of

FULL: Final = "full precision"
CALIBRATION: Final = "the calibration text"
PREPARING: Final = (Awq, CollectGrams, CollectGuidedGrams, Candidates)
# assignments tried together: what a killed sweep loses at most
GROUP: Final = 8


@dataclass(frozen=True)
class SweepRequest:
    """`request` with each strategy, budget and seed in place of its own.

    The allocations are tried on the first `windows` windows of `text`, of 1024 tokens each; without a
    text on the first of the calibration windows. Only strategies that read the seed run for each seed.
    """

    request: Request
    strategies: tuple[str, ...]
    budgets: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    text: Path | None = None
    windows: int = 40


@dataclass(frozen=True)
class Seconds:
    """What the work behind a row took when it was done; None: it was done before a sweep watched it."""

    candidates: float | None = None  # Gram matrices included; shared by all rows
    scoring: float | None = None  # shared by all budgets
    allocation: float | None = None

    @property
    def total(self) -> float | None:
        """What a compile from an empty cache would take of these."""
        return sum_of((self.candidates, self.scoring, self.allocation))


@dataclass(frozen=True)
class Row:
    """A strategy at a budget, and what came of it."""

    strategy: str
    budget: str
    seed: int | None  # None: the strategy does not read it
    payload_bits: float  # this and true bits: means over the block linears
    true_bits: float
    bytes: int  # of all weights, as the target stores them
    seconds_per_token: float  # predicted on the target
    kl: float  # this and the next two: see `Trial`
    ppl: float
    top1: float
    seconds: Seconds = field(default_factory=Seconds)
    assignment: Assignment = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """What a sweep found. `parameters`: how many a weight has, by name, of those in the blocks."""

    model: str
    target: str
    text: str
    windows: tuple[int, int]  # how many, tokens in each
    options: Mapping[str, Any]
    parameters: Mapping[str, int]
    full: Row
    rows: tuple[Row, ...]


def run_sweep(wish: SweepRequest, cache: Path | None = None, progress: Progress = no_progress) -> Sweep:
    """Raises CompileError; for all that can be known early, before any long work."""
    granted = [parse_budgets(text) for text in wish.budgets]
    # _check refuses an encoder whatever the strategy; this one suits every model
    plan = make_plan(_with_strategy(wish.request, WeightMse.name), cache, artifact=False)
    _check(wish, plan)
    ctx = context_of(plan, progress)
    text, tokens = _tokens(wish, plan, ctx)
    _refuse_what_can_t_be_met(plan, ctx, granted)
    allocated = _allocate_all(wish, plan, ctx, granted)
    module = allocated[0].module
    every = [_Allocated(module, {}, module_cost(module, plan.target)), *allocated]
    full, *rows = map(_row, every, _try_each(every, ctx, tokens))
    return Sweep(
        model=plan.source.name,
        target=plan.target.name,
        text=text,
        windows=(tokens.shape[0], tokens.shape[1]),
        options=_options(wish, ctx),
        parameters={n: w.type.numel() for n, w in module.weights.items() if w.attrs.get("role") == BLOCK},
        full=full,
        rows=tuple(rows),
    )


def _with_strategy(request: Request, strategy: str) -> Request:
    return replace(request, choices=replace(request.choices, strategy=strategy))


def _check(wish: SweepRequest, plan: Plan) -> None:
    demand_predictions(plan, "a sweep")
    if plan.request.choices.mask:
        raise CompileError(
            "a sweep compares formats of one model, and learnt masks make another of it",
            hint="compile with each --mask and compare by gammac eval, or sweep with --mask sparsegpt",
        )
    for strategy in wish.strategies:
        _passes(plan, strategy, ())


def _refuse_what_can_t_be_met(plan: Plan, ctx: Context, granted: Sequence[Sequence[Budget]]) -> None:
    """Which budgets can be met depends on formats and sizes, so that any scores will do, but for a loss."""
    module = guess_scores(plan, ctx)
    for budgets in granted:
        _, choose = _passes(plan, WeightMse.name, budgets)
        known = tuple(budget for budget in budgets if budget.kind != LOSS)
        Pipeline(tuple(choose[:1])).run(module, replace(ctx, budgets=known))


def _tokens(wish: SweepRequest, plan: Plan, ctx: Context) -> tuple[str, Tensor]:
    """The text's name, and its windows i64 [windows, length]."""
    if wish.text is not None:
        length = min(WINDOW, int(str(plan.module.attrs.get("max_positions", WINDOW))))
        return wish.text.name, windows_for(wish.text, plan.source.tokenizer, wish.windows, length)
    assert ctx.calibration is not None, "with a tokenizer there is calibration text"
    return CALIBRATION, ctx.calibration.spread(wish.windows).tokens


def _options(wish: SweepRequest, ctx: Context) -> dict[str, Any]:
    """What decided the rows, without paths of the machine."""
    choices = {k: v for k, v in asdict(wish.request.choices).items() if k not in ("strategy", "inputs")}
    asked = {"strategies": wish.strategies, "budgets": wish.budgets, "seeds": wish.seeds}
    return {**asked, **choices, "calibration": ctx.calibration.digest if ctx.calibration else None}


# ---- allocations --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Allocated:
    """A row before it is tried."""

    module: Module  # scored; where linears are turned at random, the seed decides its candidates
    assignment: Assignment
    cost: Cost
    strategy: str = FULL
    budget: str = ""
    seed: int | None = None
    seconds: Seconds = field(default_factory=Seconds)


def _row(found: _Allocated, trial: Trial) -> Row:
    cost = found.cost
    return Row(
        found.strategy, found.budget, found.seed,
        round(cost.payload_bits, 6), round(cost.true_bits, 6), cost.bytes, round(cost.decode_seconds, 9),
        trial.kl, trial.ppl, trial.top1, found.seconds, found.assignment,
    )  # fmt: skip


def up_to_allocation(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes before codes are learnt or stored: weights have formats, and the same candidates for all."""
    return tuple(takewhile(lambda p: not isinstance(p, LearnRounding | Quantize), passes))


def _passes(plan: Plan, strategy: str, budgets: Sequence[Budget]) -> tuple[Sequence[Pass], Sequence[Pass]]:
    """What scores, and what chooses. Raises CompileError for an unknown strategy."""
    sized = any(b.kind == SIZE for b in budgets)
    every = default_pipeline(
        _with_strategy(plan.request, strategy).choices,
        plan.target.emitter,
        compiler=plan.compiler,
        extra_bytes=extra_bytes(plan, plan.module) if sized else 0,
    )
    passes = up_to_allocation(every)
    cut = next(i for i, p in enumerate(passes) if isinstance(p, Allocate))
    return passes[:cut], passes[cut:]


def _reads(what: str, passes: Sequence[Pass]) -> bool:
    return any(what in p.reads for p in passes)


def _allocate_all(
    wish: SweepRequest, plan: Plan, ctx: Context, granted: Sequence[Sequence[Budget]]
) -> list[_Allocated]:
    """An allocation for each strategy, seed and budget."""
    found = []
    for strategy in wish.strategies:
        score, choose = _passes(plan, strategy, ())
        random = _reads("seed", (*score, *choose))
        for seed in wish.seeds if random else wish.seeds[:1]:
            rows = _allocate(plan, replace(ctx, seed=seed), strategy, granted)
            found += [replace(row, seed=seed if random else None) for row in rows]
    return found


def _allocate(
    plan: Plan, ctx: Context, strategy: str, granted: Sequence[Sequence[Budget]]
) -> list[_Allocated]:
    """An allocation for each budget; scored again only if scores read the budget."""
    scored, before = plan.module, list[float | None]()
    found: list[_Allocated] = []
    for budgets in granted:
        own = replace(ctx, budgets=tuple(budgets))
        score, choose = _passes(plan, strategy, budgets)
        if not found or _reads("budget", score):
            scored, before = _timed(score, plan.module, own)
        chosen, behind = _timed(choose, scored, own)
        prepared = [before[i] for i, p in enumerate(score) if isinstance(p, PREPARING)]
        scoring = [before[i] for i, p in enumerate(score) if isinstance(p, tuple(STRATEGIES.values()))]
        found.append(
            _Allocated(
                scored,
                {n: str(w.attrs["format"]) for n, w in chosen.weights.items() if "format" in w.attrs},
                module_cost(chosen, plan.target),
                strategy,
                "+".join(map(str, budgets)),
                seconds=Seconds(sum_of(prepared), sum_of(scoring), sum_of(behind)),
            )
        )
    return found


def _timed(passes: Sequence[Pass], module: Module, ctx: Context) -> tuple[Module, list[float | None]]:
    """The module behind the passes, and what each took."""
    steps: list[Step] = []
    after = Pipeline(tuple(passes), (steps.append,)).run(module, ctx)
    return after, [seconds_of(step, ctx) for step in steps]


def seconds_of(step: Step, ctx: Context) -> float | None:
    """What a pass took when it ran; None if no sweep or study watched it then."""
    own = (full_options_text(step.pass_), ctx.fingerprint(step.pass_.reads), to_text(step.before))
    taken = {"seconds": None if step.cached else round(step.seconds, 3)}
    found: float | None = ctx.cache.record(key_of("seconds", *own), lambda: taken)["seconds"]
    return found


def sum_of(seconds: Sequence[float | None]) -> float | None:
    """The sum, None if one of them is not known."""
    known = [s for s in seconds if s is not None]
    return round(sum(known), 3) if len(known) == len(seconds) else None


# ---- trials -------------------------------------------------------------------------------------


def _try_each(every: Sequence[_Allocated], ctx: Context, tokens: Tensor) -> list[Trial]:
    """A trial for each; those whose models differ only in formats run together."""
    alike: dict[str, list[int]] = {}
    for index, found in enumerate(every):
        alike.setdefault(_stored(found.module), []).append(index)
    trials: dict[int, Trial] = {}
    for indices in alike.values():
        assignments = [every[i].assignment for i in indices]
        trials |= zip(indices, try_all(every[indices[0]].module, ctx, tokens, assignments), strict=True)
    return [trials[i] for i in range(len(every))]


def _stored(module: Module) -> str:
    """What is run, and what may stand in for its weights."""
    candidates = ((name, sorted(candidates_of(w).items())) for name, w in module.weights.items())
    return f"{_program(module)}\n{[*candidates]}"


def try_all(module: Module, ctx: Context, tokens: Tensor, assignments: Sequence[Assignment]) -> list[Trial]:
    """A trial for each assignment, in order; those that the cache knows are not run again.

    `module` has candidates; tokens i64 [windows, length].
    """
    same = key_of("trial", _program(module), digest_of({"tokens": tokens}))
    keys = [key_of(same, *_tried(module, assignment)) for assignment in assignments]
    todo = {k: a for k, a in zip(keys, assignments, strict=True) if not ctx.cache.has_record(k)}
    found: dict[str, Trial] = {}
    for start in range(0, len(todo), GROUP):
        group = list(todo)[start : start + GROUP]
        title = f"trying {start + 1} to {start + len(group)} of {len(todo)}"
        trials = run_trials(module, ctx.store, tokens, [todo[k] for k in group], ctx.progress, title)
        for key, trial in zip(group, trials, strict=True):
            found[key] = Trial(**ctx.cache.record(key, partial(asdict, trial)))

    def known(key: str, assignment: Assignment) -> Trial:
        return Trial(
            **ctx.cache.record(key, lambda: asdict(run_trials(module, ctx.store, tokens, [assignment])[0]))
        )

    return [found.get(k) or known(k, a) for k, a in zip(keys, assignments, strict=True)]


def _program(module: Module) -> str:
    """What is run, whatever the passes wrote about its weights."""
    weights = {name: replace(w, attrs={}) for name, w in module.weights.items()}
    forward = {"forward": module.functions["forward"]}
    return to_text(Module("m", forward, weights).without_unused_weights())


def _tried(module: Module, assignment: Assignment) -> list[str]:
    """What stands in for which weights."""
    return sorted(f"{n} {f} {candidates_of(module.weights[n])[f]}" for n, f in assignment.items())
