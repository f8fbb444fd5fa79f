"""Learn scales, norms and biases of the whole model from full precision's predictions.

    weight @up : f32[512,192] = sha256:… {role = "block", format = "w2g64", candidates = {w2g64 = "…aa"}}
->
    weight @up : f32[512,192] = sha256:… {role = "block", format = "w2g64", candidates = {w2g64 = "…bb"}}

Codes stay. The loss is KL(full precision ‖ allocated), or DB-LLM's, a mean over positions: the end-to-end
phase of EfficientQAT (Chen et al. 2024, arXiv 2407.11062, §3.3) with the teacher's predictions in place of
the next token. Zero points stay too: they are integers here. Batches that are set apart decide whether
what was learnt is taken.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from gammac.cache import key_of
from gammac.calibration import BATCH_WINDOWS
from gammac.diagnostics import CompileError
from gammac.formats import candidates_of
from gammac.ir import Module, to_text
from gammac.passes.candidates import weights_have_candidates
from gammac.passes.finetune.deviation_aware import deviation_aware_loss
from gammac.passes.finetune.student import Learnt, Student
from gammac.passes.finetune.two_models import windows_to_learn_from
from gammac.passes.kl_gradient import KlGradient, MeanKl
from gammac.passes.quantize import weights_have_formats
from gammac.passes.sensitivity.scores import check_range, rounded
from gammac.pipeline import Context, Invariant, full_options_text

APART: Final = 16  # every so manieth batch of windows is set apart
LOSSES: Final = ("kl", "deviation_aware")
CHUNK: Final = 8  # steps after which a killed run goes on
BETAS: Final = (0.9, 0.95)


@dataclass(frozen=True)
class Distill:
    """`steps` of `batch` windows each; `rate`: Adam's first step, relative to a scale or to a vector's
    root mean square, falling to zero as a cosine; `vectors`: norms and biases learn, too. `loss`: kl, or
    deviation_aware, which is DB-LLM's with `focus` on positions that are hard to tell."""

    name: ClassVar[str] = "distill"
    reads: ClassVar[tuple[str, ...]] = ("calibration", "seed")
    requires: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates, weights_have_formats)
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates, weights_have_formats)
    steps: int = 64
    batch: int = 4
    rate: float = 0.003
    vectors: bool = True
    loss: str = "kl"
    focus: float = 0.5

    def __post_init__(self) -> None:
        """Raises CompileError for options that make no sense."""
        check_range(self.name, "steps", self.steps, 1)
        check_range(self.name, "batch", self.batch, BATCH_WINDOWS)
        check_range(self.name, "rate", self.rate, 0, 0.1)
        check_range(self.name, "focus", self.focus, 0, 4)
        if self.loss not in LOSSES:
            raise CompileError(f"{self.name}: no loss {self.loss!r}", hint=f"there are {', '.join(LOSSES)}")

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError without calibration text, or for an encoder."""
        if module.attrs.get("kind") == "encoder":
            raise CompileError(
                f"{self.name} needs a model that predicts the next token", hint="leave it out: --no-distill"
            )
        tokens = windows_to_learn_from(self.name, ctx)
        key = key_of(to_text(module), full_options_text(self), ctx.fingerprint(self.reads))
        trainer = _Trainer(self, module, tokens, ctx)
        before = trainer.error()
        for start in ctx.progress(range(0, self.steps, CHUNK), "distilling"):
            found = ctx.cache.record(key_of(key, str(start)), partial(trainer.train, start), ctx.store)
            trainer.restore(found["state"])
        after = trainer.error()
        report = {"before": rounded(before), "after": rounded(min(before, after))}
        module = module.with_attrs(distillation=report)
        return module if after >= before else _adopted(module, trainer.student, ctx)


class _Trainer:
    """A student, its teacher, and Adam between them."""

    def __init__(self, options: Distill, module: Module, tokens: Tensor, ctx: Context) -> None:
        self.options, self.ctx = options, ctx
        self.teacher = KlGradient(module, tokens, ctx)
        self.batches = torch.split(tokens, BATCH_WINDOWS)
        every = range(len(self.batches))
        self.apart = tuple(every)[::APART]
        self.used = tuple(b for b in every if b not in self.apart)
        self.student = Student(module, ctx.store, vectors=options.vectors)
        self.first = {n: torch.zeros_like(t) for n, t in self.student.learnt.tensors().items()}
        self.second = {n: torch.zeros_like(t) for n, t in self.first.items()}

    def error(self) -> float:
        """KL in nats a position on the batches that are set apart."""
        losses = []
        for batch in self.apart:
            logits = self.student.forward(self.batches[batch]).logits()
            losses.append(float(self._kl(logits, batch)))
        return math.fsum(losses) / len(losses)

    def train(self, start: int) -> dict[str, Any]:
        """Up to CHUNK steps from `start` on; what they came to is in the store."""
        count = max(1, self.options.batch // BATCH_WINDOWS)
        for step in range(start, min(start + CHUNK, self.options.steps)):
            generator = torch.Generator().manual_seed(self.ctx.seed * 7919 + step)
            picked = torch.randint(len(self.used), (count,), generator=generator).tolist()
            self._step(step, [self.used[i] for i in picked])
        state = {"now": self.student.learnt.tensors(), "first": self.first, "second": self.second}
        flat = {f"{kind}/{name}": t for kind, tensors in state.items() for name, t in tensors.items()}
        return {"state": self.ctx.store.put(flat)}

    def restore(self, digest: str) -> None:
        """Go on from what `train` left."""
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "first": {}, "second": {}}
        for key, tensor in self.ctx.store.get(digest).items():
            kind, _, name = key.partition("/")
            parts[kind][name] = tensor.clone()
        self.student.learnt = Learnt.of(parts["now"])
        self.first, self.second = parts["first"], parts["second"]

    def _kl(self, logits: Tensor, batch: int) -> Tensor:
        kl: Any = MeanKl.apply(logits[:, :-1], self.teacher.log_p(batch))  # type: ignore[no-untyped-call]
        assert isinstance(kl, Tensor)
        return kl

    def _loss(self, logits: Tensor, batch: int) -> Tensor:
        """What is made smaller; whether it helped is told by the KL alone."""
        if self.options.loss == "kl":
            return self._kl(logits, batch)
        tokens, log_p = self.batches[batch][:, 1:], self.teacher.log_p(batch)
        return deviation_aware_loss(logits[:, :-1], log_p, tokens, self.options.focus)

    def _step(self, step: int, batches: Sequence[int]) -> None:
        now = self.student.learnt.tensors()
        sums = {n: torch.zeros_like(t) for n, t in now.items()}
        for batch in batches:
            run = self.student.forward(self.batches[batch])
            _, gradients = run.backward(partial(self._loss, batch=batch))
            for name, gradient in gradients:
                kind = "scales" if name in self.student.learnt.scales else "vectors"
                sums[f"{kind}:{name}"] += gradient / len(batches)
        rate = self.options.rate * 0.5 * (1 + math.cos(math.pi * step / self.options.steps))
        for name, gradient in sums.items():
            now[name] -= rate * self._direction(name, gradient, step + 1)

    def _direction(self, name: str, gradient: Tensor, taken: int) -> Tensor:
        """Adam (Kingma & Ba 2015, algorithm 1)."""
        b1, b2 = BETAS
        self.first[name].mul_(b1).add_(gradient, alpha=1 - b1)
        self.second[name].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        first = self.first[name] / (1 - b1**taken)
        second = self.second[name] / (1 - b2**taken)
        return first / (second.sqrt() + 1e-12)


def _adopted(module: Module, student: Student, ctx: Context) -> Module:
    """The module with what was learnt in the place of what was there."""
    weights = []
    for name in student.learnt.scales:
        weight = module.weights[name]
        digest = ctx.store.put(student.scaled(name).parts)
        candidates = {**candidates_of(weight), str(weight.attrs["format"]): digest}
        weights.append(weight.with_attrs(candidates=candidates))
    for name in student.learnt.vectors:
        digest = ctx.store.put({"data": student.vector(name)})
        weights.append(replace(module.weights[name], digest=digest))
    return module.with_weights(*weights)
