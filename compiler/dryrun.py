"""What a compile would take and give, told before any long work.

Sizes and bits are exact for the allocation that a noise model chooses: halving the step of a grid
quarters its error. The real scores move bits between weights, not the totals. Times come from a
measured matrix product and the operations that each pass is known to do.
"""

import time
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

import torch

from gammac.budget import LOSS
from gammac.calibration import BATCH_WINDOWS
from gammac.diagnostics import CompileError
from gammac.driver import Plan, Request, calibration_of, context_of, extra_bytes
from gammac.ir import Module, Weight
from gammac.passes import (
    default_pipeline,
    incoherence_of,
    learn_rounding_of,
    refine_of,
    sparsify_of,
    strategy_of,
)
from gammac.passes.allocate import Allocate
from gammac.passes.awq import Awq
from gammac.passes.candidates import Candidates
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.collect_guided_grams import CollectGuidedGrams
from gammac.passes.finetune import Distill
from gammac.passes.incoherence import Incoherence
from gammac.passes.masks.methods import Clock
from gammac.passes.quantize_activations import QuantizeActivations, parse_activations
from gammac.passes.quantizers import make_quantizer
from gammac.passes.refine import TRIES
from gammac.passes.sensitivity import Amq, DeltaLoss, Fisher, Gamma, GreedyKl, Hawq
from gammac.passes.sensitivity.scores import grid_noise
from gammac.passes.smooth_quant import SmoothQuant
from gammac.passes.sparsify import Sparsify
from gammac.pipeline import Context, Pass, Pipeline
from gammac.targets.cost import Cost, module_cost

# of a weight in a format: 134 million weights in four formats took 63 s on two cores
SWEEP_NANOSECONDS: Final = 120.0
# for quantizers that take longer: the same weights in three trellis formats took 166 s
SLOW_SWEEPS: Final = {"tcq": 400.0}
# passes that take long and change nothing that a size or a time depends on
MEASURING: Final = (SmoothQuant, Awq, Sparsify, CollectGrams, CollectGuidedGrams)


@dataclass(frozen=True)
class Estimate:
    """`cost` of the artifact; seconds and peak bytes of the compile itself."""

    cost: Cost
    seconds: float
    peak_bytes: int
    calibration_tokens: int
    module: Module


class NoEstimate(CompileError):
    """What is asked for can be compiled, and not told beforehand."""


def estimate(plan: Plan) -> Estimate:
    """Raises CompileError for a budget that can't be met, as the compile would; NoEstimate for a trained
    folder and for a limit of the loss."""
    if plan.request.choices.trained:
        raise NoEstimate(
            f"{plan.source.name} was trained in its formats: there is nothing to estimate",
            hint="compile it: that takes seconds; training.json says its bits",
        )
    if any(budget.kind == LOSS for budget in plan.budgets):
        raise NoEstimate(
            "a limit of the predicted loss takes scores, and a dry run makes none",
            hint="leave it out, or compile: another limit starts at the allocation",
        )
    ctx = context_of(plan)
    extra = extra_bytes(plan, plan.module)
    allocate = Allocate(tie=plan.request.choices.tie, extra_bytes=extra)
    module = Pipeline((allocate,)).run(guess_scores(plan, ctx), ctx)
    calibration = calibration_of(plan)
    tokens = calibration.tokens.numel() if calibration else 0
    cost = module_cost(module, plan.target, extra_bytes=extra)
    return Estimate(
        cost,
        compile_seconds(plan, module, tokens),
        _peak_bytes(plan.request, module, tokens),
        tokens,
        module,
    )


def guess_scores(plan: Plan, ctx: Context) -> Module:
    """The module as candidates would find it, with the noise model's scores."""
    choices = plan.request.choices
    passes = default_pipeline(choices, plan.target.emitter, compiler=plan.compiler)
    before = tuple(takewhile(lambda p: not isinstance(p, Candidates), passes))
    collected = any(isinstance(p, CollectGrams | CollectGuidedGrams) for p in before)
    module = Pipeline(tuple(p for p in before if not isinstance(p, (*MEASURING, Incoherence)))).run(
        plan.module, ctx
    )
    if collected:
        module = module.with_weights(*(_with_white_gram(w, ctx) for w in _choosable(module)))
    module = Pipeline(incoherence_of(choices)).run(module, ctx)
    candidates = Candidates(choices.block, choices.table, compiler=plan.compiler)
    return module.with_weights(*(_guessed(w, candidates, ctx) for w in _choosable(module)))


def _with_white_gram(weight: Weight, ctx: Context) -> Weight:
    """As calibration on white noise would find it: no pass needs more for sizes to be exact."""
    columns = weight.type.shape[1]
    assert isinstance(columns, int)
    return weight.with_attrs(gram=ctx.store.put({"data": torch.eye(columns)}))


def _choosable(module: Module) -> list[Weight]:
    return [w for w in module.weights.values() if "role" in w.attrs]


def _guessed(weight: Weight, candidates: Candidates, ctx: Context) -> Weight:
    formats = candidates.formats_for(weight, ctx)
    return weight.with_attrs(scores={f.name: grid_noise(weight, f.name) for f in formats})


def compile_seconds(plan: Plan, module: Module, tokens: int) -> float:
    """What a compile would take; `module` as `guess_scores` makes it, `tokens` of calibration."""
    weights = _choosable(module)
    block = sum(w.type.numel() for w in weights if w.attrs["role"] == "block")
    every = sum(w.type.numel() for w in weights)
    formats = len(plan.request.choices.block.split("+"))
    gemm = _scaling_flops(plan, weights, tokens)
    if make_quantizer(plan.request.choices.quantizer).needs_gram:
        grams = sum(int(str(w.type.shape[1])) ** 2 for w in weights)
        guided = plan.request.choices.guided  # forward, forward again, backward; a product for each linear
        # otherwise q, k, v and gate, up share a matrix
        gemm += 2 * tokens * (3 * every + grams if guided else block + 0.6 * grams)
    windows, products = scoring_work(strategy_of(plan.request.choices), len(weights), formats)
    gemm += 2 * min(tokens, windows * plan.request.calibration_length) * every * products
    for refine in refine_of(plan.request.choices):
        # a round: forward, forward again, backward; its proposals beside full precision, on other windows
        products = 2 + (5 + TRIES) * refine.rounds
        read = refine.windows * plan.request.calibration_length
        gemm += 2 * min(tokens // 2, read) * every * products
    for learn in learn_rounding_of(plan.request.choices):
        gemm += 2 * block * (3 * learn.steps * learn.batch * plan.request.calibration_length + 4 * tokens)
    for sparsify in sparsify_of(plan.request.choices):
        # what reads curvature is differentiated twice
        passes = 6 if sparsify.made().probes(Clock(0, 1)) else 3
        read = sparsify.steps * sparsify.batch * plan.request.calibration_length
        gemm += 2 * block * (passes * read + 3 * tokens)
    if plan.request.choices.distill:
        distill = Distill()
        learnt_from = distill.steps * distill.batch * plan.request.calibration_length
        # forward, forward again, backward, the teacher; probabilities take as long as half of that
        gemm += 2 * every * (8 * learnt_from + 1.25 * tokens)
    quantizer = plan.request.choices.quantizer.partition(":")[0]
    sweeps = every * formats * SLOW_SWEEPS.get(quantizer, SWEEP_NANOSECONDS) * 1e-9
    return plan.capture_seconds + gemm / flops() + sweeps + every * 1e-8


def _scaling_flops(plan: Plan, weights: list[Weight], tokens: int) -> float:
    """Of the runs of the calibration text for scales and steps of activations, and of AWQ's candidates."""
    passes = default_pipeline(plan.request.choices, plan.target.emitter, compiler=plan.compiler)
    static = [p for p in passes if isinstance(p, QuantizeActivations) and parse_activations(p.format).static]
    runs = len(static) + sum(isinstance(p, SmoothQuant | Awq) for p in passes)
    tried = sum(p.steps for p in passes if isinstance(p, Awq))
    block = [w.type for w in weights if w.attrs["role"] == "block"]
    products = sum(t.numel() * int(str(t.shape[1])) for t in block)
    return 2.0 * (tokens * runs * sum(t.numel() for t in block) + tried * products)


def scoring_work(strategy: Pass, weights: int, formats: int) -> tuple[int, int]:
    """Windows that a strategy reads, and the products with each weight that it makes of them.

    A backward run takes three: forward, forward again, backward. Trying one weight alone takes half a
    forward run in the mean.
    """
    match strategy:
        case Gamma():
            products = BATCH_WINDOWS * (4 * strategy.sweeps * strategy.steps + 6 * strategy.draws)
            passes = 4 + (formats if strategy.curvature else 0)
            return strategy.windows, passes + products // strategy.windows
        case Fisher():
            return strategy.windows, 3 + formats
        case DeltaLoss():
            return strategy.windows, 4 * formats
        case Hawq():
            return strategy.windows, 2 * 4 * strategy.probes
        case GreedyKl():
            return strategy.windows, weights * formats // 2
        case Amq():
            designs = strategy.initial + strategy.iterations * strategy.per_iteration
            return strategy.windows, weights // 2 + designs
    return 0, 0


def flops() -> float:
    """Operations a second of a matrix product of this model's kind, measured."""
    a, b = torch.randn(2048, 576), torch.randn(576, 1536)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * 2048 * 576 * 1536 / best


def _peak_bytes(request: Request, module: Module, tokens: int) -> int:
    """torch itself, the largest weight with its candidates, and a batch of activations or logits.

    A gradient of the divergence between two models holds both models' logits and their gradients.
    """
    largest = max((w.type.numel() for w in _choosable(module)), default=0)
    widest = max((int(str(w.type.shape[0])) for w in _choosable(module)), default=0)
    batch = min(tokens, BATCH_WINDOWS * request.calibration_length)
    strategy = strategy_of(request.choices)
    draws = isinstance(strategy, Gamma) and strategy.draws > 0
    copies = 6 if draws or refine_of(request.choices) or request.choices.distill else 3
    return 700_000_000 + 4 * largest * 8 + 4 * batch * widest * copies
