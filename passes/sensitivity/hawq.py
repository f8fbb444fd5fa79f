"""Score a format by its squared change of the weight, times the mean curvature of the loss there.

    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {w2g64 = "sha256:…"}}
->
    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {…}, scores = {w2g64 = 0.0021}}

HAWQ-v2 (arXiv 1911.03852); with `allocate` in place of its Pareto frontier, as in HAWQ-v3's integer
program (arXiv 2011.10680). Traces are Hutchinson's estimates: E[zᵀHz] = tr H for random signs z. All
weights are probed at once, since E[zᵢᵀHᵢⱼzⱼ] = 0 for the blocks off the diagonal. Hz is the central
difference of two gradients.
"""

import math
import statistics
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gammac.cache import key_of
from gammac.calibration import Stream, backward_segments, run_up_to_last
from gammac.formats import load_float
from gammac.ir import Module, to_text
from gammac.passes.candidates import weights_have_candidates
from gammac.passes.sensitivity.scores import (
    check_range,
    rounded,
    scoring_tokens,
    squared_errors,
    weights_have_scores,
)
from gammac.pipeline import Context, Invariant
from gammac.weights import digest_of


@dataclass(frozen=True)
class Hawq:
    """score(b) = (tr H / n) · Σ (W_b − W)², H the weight's block of the Hessian, in nats per token.

    `probes` random directions over `windows` of the calibration text; a step of `epsilon` times the
    weight's root mean square. An estimate below its own standard error, which chance can even make
    negative, is raised to that: at a minimum of the loss no trace is negative.
    """

    name: ClassVar[str] = "hawq"
    reads: ClassVar[tuple[str, ...]] = ("calibration", "seed")
    requires: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates,)
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_scores,)
    probes: int = 16
    windows: int = 4
    epsilon: float = 0.003

    def __post_init__(self) -> None:
        """Raises CompileError for options out of range."""
        check_range(self.name, "probes", self.probes, 2)
        check_range(self.name, "windows", self.windows, 1)
        check_range(self.name, "epsilon", self.epsilon, 1e-6, 1)

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError without calibration text, or for an encoder, which has no next token."""
        estimates = self.mean_curvatures(module, ctx)
        scored = []
        for name in ctx.progress(list(estimates), "scoring (hawq, candidates)"):
            curvature, weight = at_least_its_error(estimates[name]), module.weights[name]
            errors = squared_errors(weight, ctx)
            scored.append(weight.with_attrs(scores={f: rounded(curvature * e) for f, e in errors.items()}))
        return module.with_weights(*scored)

    def mean_curvatures(self, module: Module, ctx: Context) -> dict[str, list[float]]:
        """Weight name → an estimate of tr H / n from each probe, in nats per token.

        Finished probes are remembered: a killed run goes on behind them.
        """
        tokens = scoring_tokens(self.name, self.windows, module, ctx)
        found: dict[str, list[float]] = {n: [] for n, w in module.weights.items() if "candidates" in w.attrs}
        key = key_of(self.name, to_text(module), digest_of({"tokens": tokens}))
        for index in range(self.probes):
            probe = Probe(f"{ctx.seed}.{index}", self.epsilon)
            title = f"hawq, probe {index + 1} of {self.probes}"

            def compute(probe: Probe = probe, title: str = title) -> dict[str, float]:
                return _curvatures(module, tokens, ctx, probe, title)

            for name, value in ctx.cache.record(key_of(key, repr(probe)), compute).items():
                found[name].append(value)
        return found


@dataclass(frozen=True)
class Probe:
    """A random direction in the space of all weights: signs times a step in the weight's own scale."""

    seed: str
    epsilon: float

    def step(self, weight: Tensor) -> float:
        """The length of each element."""
        return self.epsilon * (float(weight.square().mean().sqrt()) or 1.0)

    def direction(self, name: str, weight: Tensor) -> Tensor:
        """The part of the direction that belongs to one weight, f32 of its shape."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        signs = torch.randint(0, 2, weight.shape, generator=generator).float().mul_(2.0).sub_(1.0)
        return signs.mul_(self.step(weight))


def _curvatures(module: Module, tokens: Tensor, ctx: Context, probe: Probe, title: str) -> dict[str, float]:
    """Weight name → vᵀHv / ‖v‖², of the loss a token; v is the weight's part of the probe."""
    up, down = (_slopes(module, tokens, ctx, probe, sign, title) for sign in (1.0, -1.0))
    found = {}
    for name, weight in module.weights.items():
        if "candidates" in weight.attrs:
            # gᵀv at W + v less that at W − v is 2 vᵀHv
            square = probe.step(load_float(weight, ctx.store)) ** 2 * weight.type.numel()
            found[name] = (up[name] - down[name]) / (2 * square * tokens.numel())
    return found


def _slopes(
    module: Module, tokens: Tensor, ctx: Context, probe: Probe, sign: float, title: str
) -> Mapping[str, float]:
    """Weight name → the summed loss's gradient times the probe's direction, at the weights moved by it."""
    probed = {name for name, w in module.weights.items() if "candidates" in w.attrs}

    def moved(name: str, weight: Tensor) -> Tensor:
        return weight + sign * probe.direction(name, weight) if name in probed else weight

    stream = Stream(module.functions["forward"], tokens)
    run_up_to_last(module, stream, ctx.store, ctx.progress, f"scoring ({title}, forward)", moved)
    slopes: dict[str, float] = defaultdict(float)
    for segment, _, gradients in backward_segments(
        module, stream, ctx.store, ctx.progress, f"scoring ({title}, backward)", moved
    ):
        names = {op: ref.name for op in segment.linears() if (ref := op.weight()) and ref.name in probed}
        directions = {
            n: probe.direction(n, load_float(module.weights[n], ctx.store)) for n in set(names.values())
        }
        for gradient in gradients:
            if gradient.op in names:
                name = names[gradient.op]
                change = gradient.output_change(directions[name])
                slopes[name] += float(change.mul_(gradient.gradient).sum(dtype=torch.float64))
    return slopes


def at_least_its_error(estimates: list[float]) -> float:
    """The mean of two or more estimates, raised to its standard error."""
    error = statistics.stdev(estimates) / math.sqrt(len(estimates))
    return max(statistics.fmean(estimates), error)
