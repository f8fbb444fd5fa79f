"""Learn each weight's rounding and scales, block by block, from what the block should put out.

    weight @up : f32[64,64] = sha256:… {role = "block", format = "w3g64", candidates = {w3g64 = "sha256:aa"}}
->
    weight @up : f32[64,64] = sha256:… {role = "block", format = "w3g64", candidates = {w3g64 = "sha256:bb"}}
    and the module's attribute `rounding` = {before = 0.081, after = 0.047}

A block reads what the already quantized blocks before it put out, and is compared with what the
full-precision block puts out on full-precision inputs: errors of earlier blocks are made up for. Each code
has a latent value: at first the weight itself in units of its step, moved into the cell of the code that
the quantizer chose. Steps of one size along the sign of the gradient move the latents and the logarithms
of the scales (SignRound, arXiv 2309.05516, section 3; straight-through rounding). Codes on two binary
planes learn alike, each plane with its own scale (DB-LLM, arXiv 2402.11960, section 3.2). Or, by `gumbel`,
each code has a logit for itself and for each of its neighbours, and blocks run with mixtures that are drawn
from them, ever sharper. A block whose
error on windows set apart is not lower afterwards stays as it was. `before` and `after` are the mean
relative errors of the blocks' outputs there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from gammac.cache import key_of
from gammac.calibration import BATCH_WINDOWS, Segment
from gammac.diagnostics import CompileError
from gammac.formats import Quantized, candidates_of, load_chosen, load_float
from gammac.ir import Module, to_text
from gammac.ir.interpret import Weights
from gammac.passes.candidates import weights_have_candidates
from gammac.passes.finetune.latents import LEARNABLE, SIGN, latents_of
from gammac.passes.finetune.two_models import TwoModels, in_place_of, loaded_once, windows_to_learn_from
from gammac.passes.quantize import weights_have_formats
from gammac.passes.sensitivity.scores import check_range, rounded
from gammac.pipeline import Context, Invariant, full_options_text


@dataclass(frozen=True)
class LearnRounding:
    """`steps` of `batch` windows each in a block; `rate`: a first step in units of a code, falling linearly
    (0: the latents' own pace over the steps); `scale_rate`: the same of the logarithm of a scale. `by`: sign,
    or gumbel for integer formats, whose latents are logits and take some 100 bytes a weight of the block."""

    name: ClassVar[str] = "learn_rounding"
    reads: ClassVar[tuple[str, ...]] = ("calibration", "seed")
    requires: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates, weights_have_formats)
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates, weights_have_formats)
    steps: int = 60
    batch: int = 4
    rate: float = 0.0
    scale_rate: float = 0.002
    by: str = SIGN

    def __post_init__(self) -> None:
        """Raises CompileError for options that make no sense."""
        check_range(self.name, "steps", self.steps, 1)
        check_range(self.name, "batch", self.batch, BATCH_WINDOWS)
        check_range(self.name, "rate", self.rate, 0, 10)
        check_range(self.name, "scale_rate", self.scale_rate, 0, 0.1)
        if self.by not in LEARNABLE:
            raise CompileError(
                f"{self.name}: nothing learns by {self.by!r}", hint=f"by {' or '.join(LEARNABLE)}"
            )

    def run(self, module: Module, ctx: Context) -> Module:
        """Each finished block is remembered. Raises CompileError without two batches of calibration text."""
        tokens = windows_to_learn_from(self.name, ctx)
        key = key_of(to_text(module), full_options_text(self), ctx.fingerprint(self.reads))
        learner = _Learner(self, module, ctx, tokens)
        errors: list[tuple[float, float]] = []
        for index in ctx.progress(range(len(learner.models.segments) - 1), "learning to round"):
            learner.models.advance_teacher(index, learner.full)
            found = ctx.cache.record(key_of(key, str(index)), partial(learner.learn, index), ctx.store)
            learner.adopt(found["digests"])
            learner.models.advance_student(index, learner.allocated)
            if "before" in found:
                errors.append((found["before"], found["after"]))
        if not errors:
            return learner.module
        before, after = (rounded(math.fsum(column) / len(errors)) for column in zip(*errors, strict=True))
        return learner.module.with_attrs(rounding={"before": before, "after": after})


class _Learner:
    """Full-precision and allocated model side by side, each behind the same segment."""

    def __init__(self, options: LearnRounding, module: Module, ctx: Context, tokens: Tensor) -> None:
        self.options, self.module, self.ctx = options, module, ctx
        self.models = TwoModels(module.functions["forward"], tokens)

    # ---- the two models -------------------------------------------------------------------------

    def full(self, name: str) -> Tensor:
        """A weight as it was."""
        return load_float(self.module.weights[name], self.ctx.store)

    def codes(self, name: str) -> Quantized:
        """A weight in the format that it was given."""
        return load_chosen(self.module.weights[name], self.ctx.store)

    def allocated(self, name: str) -> Tensor:
        """A weight as the codes have it; in full precision where it has no format."""
        chosen = "format" in self.module.weights[name].attrs
        return self.codes(name).dequantize() if chosen else self.full(name)

    def adopt(self, digests: Mapping[str, str]) -> None:
        """Take on codes that were learnt."""
        weights = []
        for name, digest in digests.items():
            weight = self.module.weights[name]
            candidates = {**candidates_of(weight), str(weight.attrs["format"]): digest}
            weights.append(weight.with_attrs(candidates=candidates))
        self.module = self.module.with_weights(*weights)

    # ---- one block ------------------------------------------------------------------------------

    def learn(self, index: int) -> dict[str, Any]:
        """Digests of better codes by weight name, and the errors before and behind."""
        names = _learnable(self.models.segments[index], self.module)
        if not names:
            return {"digests": {}}
        start = {n: self.codes(n) for n in names}
        latents = {n: latents_of(self.full(n), start[n], self.options.by) for n in names}
        fixed = loaded_once(self.allocated)
        before = self._error(index, start, fixed)
        generator = torch.Generator().manual_seed(self.ctx.seed * 7919 + index)
        count, used = max(1, self.options.batch // BATCH_WINDOWS), self.models.used
        for step in range(self.options.steps):
            picked = torch.randint(len(used), (count,), generator=generator).tolist()
            left = 1 - step / self.options.steps
            drawn = {n: x.drawn(left, generator) for n, x in latents.items()}
            gradients = self._gradients(index, [used[i] for i in picked], drawn, fixed)
            for n, x in latents.items():
                rate = self.options.rate or x.pace / self.options.steps
                x.move(gradients[n], rate * left, self.options.scale_rate * left)
        learnt = {n: x.quantized() for n, x in latents.items()}
        after = self._error(index, learnt, fixed)
        if after >= before:
            return {"digests": {}, "before": before, "after": before}
        digests = {n: self.ctx.store.put(q.parts) for n, q in learnt.items()}
        return {"digests": digests, "before": before, "after": after}

    def _gradients(
        self, index: int, batches: list[int], drawn: Mapping[str, Tensor], fixed: Weights
    ) -> dict[str, Tensor]:
        """∂L/∂W of a block's squared error at these weights, by name."""
        leaves = {n: weight.requires_grad_() for n, weight in drawn.items()}
        loss = self.models.lost(index, batches, in_place_of(leaves, fixed))
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def _error(self, index: int, tried: Mapping[str, Quantized], fixed: Weights) -> float:
        return self.models.error(index, {n: q.dequantize() for n, q in tried.items()}, fixed)


def _learnable(segment: Segment, module: Module) -> list[str]:
    """The linears of a block that have a format."""
    refs = [op.weight() for op in segment.linears()]
    names = dict.fromkeys(ref.name for ref in refs if ref is not None)
    attrs = {n: module.weights[n].attrs for n in names}
    return [n for n in names if attrs[n].get("role") == "block" and "format" in attrs[n]]
