"""Learn how much precision each module needs, once for all budgets (GAMMA, arXiv 2605.18475).

    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {w2g64 = "sha256:…", …}}
->
    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {…}, scores = {w2g64 = 0.0125, …},
        losses_alone = {w2g64 = 0.0118, …}}
    and the module's attribute `gamma` = {excess_bits = 0.001, price = 0.8}

Block by block against the full-precision model (teacher forcing: a block reads the teacher's state and
is compared with the teacher's output), each linear is a Gumbel-softmax mixture of its candidates, and one
augmented Lagrangian holds the average bits of all blocks at the target. `gamma_preferences` has the
equations. A score is the loss that was learnt, in nats a token, free of the price of bits; so it serves
every budget. Half of it comes from the samples, half is the curvature that the teacher's gradients give of
this weight alone: two estimates, whose mean is less noisy. `losses_alone` is that mean, `scores` what it
makes among the errors of all others. Embedding and head have no other module in their segment: their
losses are measured.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from gammac.cache import key_of
from gammac.calibration import SegmentWeights, Stream
from gammac.diagnostics import CompileError
from gammac.formats import candidates_of, parse_format
from gammac.ir import Module, Weight, to_text
from gammac.ir.interpret import Env, Weights
from gammac.passes.candidates import weights_have_candidates
from gammac.passes.sensitivity.gamma_interactions import with_interactions
from gammac.passes.sensitivity.gamma_preferences import Preferences
from gammac.passes.sensitivity.gamma_steps import SteppedPreferences
from gammac.passes.sensitivity.gamma_teacher import Teacher
from gammac.passes.sensitivity.scores import (
    candidate,
    check_range,
    differences,
    falling,
    rounded,
    scoring_tokens,
    weights_have_scores,
)
from gammac.pipeline import Context, Invariant, full_options_text

# bits above which a mixture loses so little that nothing is learnt of it
NOTEWORTHY: Final = 4.0
# of the method of multipliers, behind each sweep
MULTIPLIER_STEPS: Final = 8
# option → the words that it may be
WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "samples": ("soft", "hard"),
    "normalize": ("fisher", "delta", "output", "none"),
    "inputs": ("full", "mixed"),
    "constraint": ("augmented", "penalty"),
    "optimizer": ("lines", "sgd", "global", "adam"),
}


@dataclass(frozen=True)
class Gamma:
    """`windows` of calibration text, `sweeps` over all blocks with `steps` samples a block in each.

    `target`: average bits while learning (0: midway between the narrowest and 4 bits, or the widest). The
    temperature falls from `hot` to `cold`. `samples`: soft, or hard (straight-through). `normalize`: what
    a block's error is measured by: fisher ½ (g · Δ)² with the gradient g of the teacher's log-likelihood;
    delta, output: |Δ|² by what the block adds, or puts out; none. `inputs`: full (teacher forcing) or mixed
    (what the blocks before it put out in their preferred formats). `constraint`: augmented, or
    penalty (no multiplier). With each sample the earlier ones fade by `memory`; `penalty` and `growth`
    are those of `Preferences.settle`. `optimizer`: lines computes the logits from the losses; sgd, global
    and adam take steps of about `rate` (see `gamma_steps`). Behind the sweeps, `draws` whole models are run
    end to end (see `gamma_interactions`); 0 leaves it at teacher forcing. Two estimates of a loss make one:
    a share of `curvature` is what the weight loses alone, exact over all tokens (`Teacher.curvatures`), and
    the rest is from the samples, which know of the other errors in its block and are noisier.
    """

    name: ClassVar[str] = "gamma"
    reads: ClassVar[tuple[str, ...]] = ("calibration", "seed")
    requires: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates,)
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_scores,)
    windows: int = 32
    sweeps: int = 6
    steps: int = 6
    target: float = 0.0
    hot: float = 2.0
    cold: float = 0.3
    memory: float = 0.98
    samples: str = "hard"
    normalize: str = "fisher"
    inputs: str = "full"
    constraint: str = "augmented"
    penalty: float = 0.1
    growth: float = 1.5
    optimizer: str = "lines"
    rate: float = 0.1
    draws: int = 32
    curvature: float = 0.5

    def __post_init__(self) -> None:
        """Raises CompileError for options that make no sense."""
        check_range(self.name, "windows", self.windows, 1)
        check_range(self.name, "sweeps", self.sweeps, 2)
        check_range(self.name, "steps", self.steps, 1)
        check_range(self.name, "hot", self.hot, 0.01)
        check_range(self.name, "cold", self.cold, 0.01)
        check_range(self.name, "memory", self.memory, 0, 1)
        check_range(self.name, "penalty", self.penalty, 1e-6)
        check_range(self.name, "growth", self.growth, 1)
        check_range(self.name, "rate", self.rate, 1e-6)
        check_range(self.name, "draws", self.draws, 0)
        check_range(self.name, "curvature", self.curvature, 0, 1)
        for option, known in WORDS.items():
            if getattr(self, option) not in known:
                raise CompileError(
                    f"{self.name}: {option}={getattr(self, option)!r}", hint=f"it is {' or '.join(known)}"
                )
        if (self.draws or self.curvature) and self.normalize != "fisher":
            raise CompileError(
                f"{self.name}: draws and curvature need losses in nats, normalize={self.normalize} has none",
                hint="add draws=0,curvature=0, or leave it at fisher",
            )

    def check_target(self, least: float, most: float) -> None:
        """Raises CompileError for a target that no mixture of formats has: `least` to `most` bits."""
        if self.target and not least < self.target < most:
            raise CompileError(
                f"{self.name}: target={self.target:g}",
                hint=f"it is between {least:g} and {most:g}, or 0 for midway",
            )

    def run(self, module: Module, ctx: Context) -> Module:
        """Each finished sweep is remembered. Raises CompileError without calibration text or a next token."""
        tokens = scoring_tokens(self.name, self.windows, module, ctx)
        text, inputs = to_text(module), ctx.fingerprint(self.reads)
        # what the teacher alone says serves every way of learning from it
        of_teacher = key_of(text, f"gamma {self.windows}", inputs)
        curvatures = key_of(of_teacher, "curvatures")
        asked = self.curvature > 0 and not ctx.cache.has_record(curvatures)
        # called in only where something is still to be learnt
        teacher = cache(lambda: Teacher(module, tokens, ctx, asked))
        learner = Learner(self, module, teacher, _preferences(self, module), ctx)
        learning = replace(self, draws=0, curvature=0.0)  # what the sweeps depend on
        key = key_of(text, full_options_text(learning), inputs)
        # where every weight has one format there is nothing to learn
        for sweep in range(self.sweeps if learner.preferences.bits else 0):

            def learn(sweep: int = sweep) -> dict[str, Any]:
                learner.sweep(sweep)
                return learner.preferences.state()

            learner.preferences.restore(ctx.cache.record(key_of(key, str(sweep)), learn))
        losses = learner.losses()
        if self.curvature and losses:
            known = ctx.cache.record(curvatures, lambda: teacher().curvatures)
            losses = _mixed(losses, known, self.curvature)
        alone = among = losses
        if self.draws and alone:
            among = with_interactions(alone, module, learner.preferences, self.draws, self.cold, key, ctx)
        tables = ctx.cache.record(key_of(of_teacher, "tables"), lambda: _measured(module, teacher(), ctx))
        scores = {**tables, **among}
        found = learner.preferences
        scored = module.with_weights(
            *(module.weights[n].with_attrs(scores=_written(own)) for n, own in scores.items())
        )
        if among is not alone:
            scored = scored.with_weights(
                *(scored.weights[n].with_attrs(losses_alone=_written(own)) for n, own in alone.items())
            )
        if not found.bits:
            return scored
        return scored.with_attrs(
            gamma={"excess_bits": rounded(found.violation), "price": rounded(found.price)}
        )


def _written(losses: Mapping[str, float]) -> dict[str, float]:
    """As an attribute: never rising with the bits, and of a few digits."""
    return {f: rounded(x) for f, x in falling(losses).items()}


def _mixed(
    a: Mapping[str, Mapping[str, float]], b: Mapping[str, Mapping[str, float]], share: float
) -> dict[str, dict[str, float]]:
    """Losses of which `share` is from b."""
    return {n: {f: (1 - share) * x + share * b[n][f] for f, x in own.items()} for n, own in a.items()}


def _learnt(module: Module) -> dict[str, Weight]:
    """The weights that have a choice and company: the linears of the blocks."""
    return {
        n: w
        for n, w in module.weights.items()
        if w.attrs.get("role") == "block" and "candidates" in w.attrs and len(candidates_of(w)) > 1
    }


def _preferences(options: Gamma, module: Module) -> Preferences:
    """Raises CompileError for a target that no mixture of the candidates has."""
    weights = _learnt(module)
    bits = {n: [float(parse_format(f).bits) for f in candidates_of(w)] for n, w in weights.items()}
    total = sum(w.type.numel() for w in weights.values())
    shares = {n: w.type.numel() / total for n, w in weights.items()}
    least = sum(shares[n] * min(b) for n, b in bits.items())
    most = sum(shares[n] * max(b) for n, b in bits.items())
    if weights:
        options.check_target(least, most)
    middle = (least + min(most, max(least + 1, NOTEWORTHY))) / 2
    target = options.target or middle
    same = (bits, shares, target, options.memory, options.growth, options.constraint == "augmented")
    if options.optimizer == "lines":
        return Preferences(*same)
    return SteppedPreferences(*same, optimizer=options.optimizer, rate=options.rate)


class Learner:
    """Sweeps over the blocks: in each, sampled mixtures of its linears' candidates, and their slopes."""

    def __init__(
        self, options: Gamma, module: Module, teacher: Callable[[], Teacher], preferences: Preferences,
        ctx: Context,
    ) -> None:  # fmt: skip
        self.options, self.module, self.preferences, self.ctx = options, module, preferences, ctx
        self._teacher = teacher

    @property
    def teacher(self) -> Teacher:
        """The full-precision model."""
        return self._teacher()

    def sweep(self, sweep: int) -> None:
        """Visit each block once, then settle the constraint."""
        options, last = self.options, max(1, self.options.sweeps - 1)
        temperature = options.hot * (options.cold / options.hot) ** (sweep / last)
        student = self.teacher.fresh_stream() if options.inputs == "mixed" else self.teacher.stream
        title = f"gamma, sweep {sweep + 1} of {options.sweeps}"
        for index in self.ctx.progress(range(len(self.teacher.segments) - 1), title):
            self._visit(sweep, index, temperature, student)
        self.preferences.settle(temperature, options.penalty, MULTIPLIER_STEPS)

    def _visit(self, sweep: int, index: int, temperature: float, student: Stream) -> None:
        weights = SegmentWeights(self.module, self.ctx.store)
        names = [n for n in self.teacher.weights_of(index) if n in self.preferences.bits]
        deltas = {n: self._deltas(n, weights(n)) for n in names}
        generator = torch.Generator().manual_seed((self.ctx.seed * 7919 + sweep) * 7919 + index)
        for step in range(self.options.steps if names else 0):
            batch = (sweep * self.options.steps + step) % self.teacher.batches
            mixes = {n: self.preferences.sample(n, temperature, generator, self._hard) for n in names}
            self._learn(index, batch, weights, deltas, mixes, student)
        if student is not self.teacher.stream:
            preferred = {n: deltas[n][int(self.preferences.logits(n).argmax())] for n in names}
            self.teacher.advance(
                index, student, lambda n: weights(n) + preferred[n] if n in preferred else weights(n)
            )

    @property
    def _hard(self) -> bool:
        return self.options.samples == "hard"

    def _deltas(self, name: str, full: Tensor) -> Tensor:
        """W_b − W for each candidate, f32 [formats, rows, columns]."""
        return torch.stack(list(differences(self.module.weights[name], full, self.ctx).values()))

    def _learn(
        self, index: int, batch: int, weights: SegmentWeights, deltas: Mapping[str, Tensor],
        mixes: Mapping[str, Tensor], student: Stream,
    ) -> None:  # fmt: skip
        """One sample: the loss of a mixture, and its slope towards each candidate of each linear."""
        mixed = {
            n: (weights(n) + torch.tensordot(p.detach().float(), deltas[n], 1)).requires_grad_()
            for n, p in mixes.items()
        }
        out = self.teacher.run(index, batch, student, lambda n: mixed[n] if n in mixed else weights(n))
        loss = block_loss(self.options.normalize, self.teacher, index, batch, out)
        gradients = torch.autograd.grad(loss, list(mixed.values()))
        for (name, p), gradient in zip(mixes.items(), gradients, strict=True):
            slope = torch.einsum("bij,ij->b", deltas[name], gradient).double()
            self.preferences.learn(name, p, slope)

    def losses(self) -> dict[str, dict[str, float]]:
        """Weight name → format name → what was learnt."""
        return {
            n: dict(zip(candidates_of(w), self.preferences.losses(n).clamp(min=0).tolist(), strict=True))
            for n, w in _learnt(self.module).items()
        }


def block_loss(normalize: str, teacher: Teacher, index: int, batch: int, out: Env) -> Tensor:
    """How far a block's output is from the teacher's; a scalar, in nats a token if `normalize` is fisher."""
    wanted, gradients = teacher.puts_out(index, batch), teacher.gradients(index, batch)
    errors = {v: out[v] - wanted[v] for v in gradients}
    if normalize == "fisher":
        by_token = sum((errors[v] * gradients[v]).sum(-1) for v in gradients)
        assert isinstance(by_token, Tensor)
        return 0.5 * by_token.square().mean()
    error = torch.stack([e.square().sum() for e in errors.values()]).sum()
    if normalize == "none":
        return error / teacher.tokens.numel() * teacher.batches
    before = teacher.reads(index, batch)
    size = 0.0
    for v in gradients:
        same = [x for u, x in before.items() if u.type == v.type] if normalize == "delta" else []
        size += float((wanted[v] - (same[0] if same else 0.0)).square().sum())
    return error / max(size, 1e-30)


def _measured(module: Module, teacher: Teacher, ctx: Context) -> dict[str, dict[str, float]]:
    """Losses of the weights that are not learnt, each alone: of embedding and head, in nats a token.

    A weight that two segments read, as a tied embedding is, loses in both.
    """
    found: dict[str, dict[str, float]] = {
        n: dict.fromkeys(candidates_of(w), 0.0)
        for n, w in module.weights.items()
        if "candidates" in w.attrs and n not in _learnt(module)
    }
    last = len(teacher.segments) - 1
    for index in ctx.progress(tuple(dict.fromkeys((0, last))), "gamma (embedding and head)"):
        weights = SegmentWeights(module, ctx.store)
        for name in (n for n in teacher.weights_of(index) if n in found):
            tried = {f: candidate(module.weights[name], f, ctx) for f in found[name]}
            for batch in range(teacher.batches):
                for format_, loss in _tried(teacher, index, batch, weights, name, tried).items():
                    found[name][format_] += loss / teacher.batches
    return found


def _tried(
    teacher: Teacher, index: int, batch: int, weights: SegmentWeights, name: str, tried: Mapping[str, Tensor]
) -> dict[str, float]:
    """Format name → the loss of one batch with one weight replaced."""
    with torch.no_grad():
        if index + 1 < len(teacher.segments):
            return {
                f: float(
                    block_loss("fisher", teacher, index, batch, teacher.run(index, batch, teacher.stream, w))
                )
                for f, w in ((f, _replaced(weights, name, t)) for f, t in tried.items())
            }
        log_p = teacher.log_p(batch, weights)
        return {
            f: float(
                (log_p.exp() * (log_p - teacher.log_p(batch, _replaced(weights, name, t)))).sum(-1).mean()
            )
            for f, t in tried.items()
        }


def _replaced(weights: Weights, name: str, tensor: Tensor) -> Weights:
    return lambda n: tensor if n == name else weights(n)
