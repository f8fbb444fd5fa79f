"""Search over allocations with a surrogate, and score so that `allocate` lands on the best one found.

    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {w2g64 = …, w3g64 = …, w4g64 = …}}
-> with a budget of 3
    module @tiny attributes {amq = {evaluations = 145, kl = 0.21, payload_bits = 2.98}} {
    weight @up : f32[512,192] = sha256:… {…, scores = {w2g64 = 0.0131, w3g64 = 0, w4g64 = 0}}

AMQ (arXiv 2509.12019, EMNLP 2025), from 10,250 evaluations to what a small machine does: one linear at a time
in the narrowest format says which are pinned to the widest; uniform and random designs fill an archive; then
a surrogate of the measured loss proposes designs along the front of loss and bits, round after round.
Here linears that are tied make one decision, the loss is KL, and the first scan teaches the surrogate, too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from torch import Tensor

from gammac.budget import PAYLOAD, TRUE, Budget
from gammac.formats import Format, candidates_of, parse_format
from gammac.ir import Module, Weight
from gammac.passes.candidates import weights_have_candidates
from gammac.passes.sensitivity.amq_decisions import (
    Decision,
    assignment_of,
    decisions_of,
    formats_in,
    is_searched,
    scan_of,
    space_of,
)
from gammac.passes.sensitivity.amq_search import Floats, Ints, new_ones, propose
from gammac.passes.sensitivity.greedy_kl import scored_alone
from gammac.passes.sensitivity.measured import measured_kl
from gammac.passes.sensitivity.scores import check_range, rounded, scoring_tokens, weights_have_scores
from gammac.pipeline import Context, Invariant
from gammac.progress import Progress, no_progress

LEAST: Final = 1e-9  # nats: a format narrower than the design's is never free


@dataclass(frozen=True, eq=False)
class Archive:
    """What was measured: designs i64 [designs, decisions], the format's index for each decision, and their
    losses f64 [designs]; what each decision alone adds in its narrowest format, f64 [decisions]."""

    designs: Ints
    losses: Floats
    added: Floats
    evaluations: int


@dataclass(frozen=True)
class Amq:
    """A weight's scores are 0 from the design's format on: of equal ones `allocate` takes the smallest.

    Narrower formats score what the scan measured, in proportion to 4^−bits, so that under budgets that the
    search knows nothing of (bytes, seconds), or that nothing in the archive fits, `allocate` leaves the
    design where that costs least. Embedding and head are not searched; they score as in `greedy_kl`.
    Formats of more than `widest` bits are not searched. A loss above `pin` times the median pins a decision.
    The module's attribute `amq` tells of the design, and how many allocations the whole search has tried.
    """

    name: ClassVar[str] = "amq"
    reads: ClassVar[tuple[str, ...]] = ("budget", "calibration", "seed", "target")
    requires: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates,)
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_scores,)
    windows: int = 2
    initial: int = 20
    iterations: int = 10
    per_iteration: int = 10
    widest: int = 4
    pin: float = 2.0

    def __post_init__(self) -> None:
        """Raises CompileError for options that make no sense."""
        check_range(self.name, "windows", self.windows, 1)
        check_range(self.name, "initial", self.initial, 2)
        check_range(self.name, "iterations", self.iterations, 0)
        check_range(self.name, "per_iteration", self.per_iteration, 1)
        check_range(self.name, "widest", self.widest, 1, 16)
        check_range(self.name, "pin", self.pin, 0)

    def run(self, module: Module, ctx: Context) -> Module:
        """Another budget measures nothing again.

        Raises CompileError without calibration text, or for an encoder, which has no next token.
        """
        tokens = scoring_tokens(self.name, self.windows, module, ctx)
        tables = [w for w in module.weights.values() if "candidates" in w.attrs and not is_searched(w)]
        scored = scored_alone(tables, module, ctx, tokens, f"scoring ({self.name}, tables)")
        decisions = decisions_of(module, ctx.target.tie, self.widest)
        archive = self._search(module, ctx, tokens, decisions)
        best = best_within(archive, decisions, ctx.budgets)
        design = formats_in(decisions, archive.designs[best])
        for decision, format_, added in zip(decisions, design, archive.added, strict=True):
            scored += _scored_around(decision, format_, max(LEAST, float(added)))
        found = {
            "evaluations": archive.evaluations + sum(len(candidates_of(w)) for w in tables),
            "kl": rounded(float(archive.losses[best])),
            "payload_bits": rounded(_total(decisions, design, PAYLOAD) / sum(d.numel for d in decisions)),
        }
        return module.with_weights(*scored).with_attrs(amq=found)

    def _search(self, module: Module, ctx: Context, tokens: Tensor, decisions: Sequence[Decision]) -> Archive:
        """Scan, first designs, rounds. What was measured is remembered, so that a killed search goes on."""
        rng = np.random.default_rng(ctx.seed)

        def measure(designs: Ints, progress: Progress, what: str) -> Floats:
            tried = [assignment_of(decisions, design) for design in designs]
            return np.array(
                measured_kl(module, ctx, tokens, tried, progress, f"scoring ({self.name}, {what})")
            )

        scan = scan_of(decisions)
        measured = measure(scan, ctx.progress, "one at a time")
        space = space_of(decisions, measured[1:] > self.pin * np.median(measured))
        kept = np.concatenate([[True], space.low < space.high])
        designs, losses, evaluations = scan[kept], measured[kept], len(scan)
        for index in ctx.progress(range(1 + self.iterations), f"scoring ({self.name}, search)"):
            if index:
                fresh = propose(space, designs, losses, self.per_iteration, rng)
            else:
                fresh = new_ones(space.first(self.initial, rng), designs)
            losses = np.concatenate([losses, measure(fresh, no_progress, "")])
            designs = np.concatenate([designs, fresh])
            evaluations += len(fresh)
        return Archive(designs, losses, measured[1:] - measured[0], evaluations)


def best_within(archive: Archive, decisions: Sequence[Decision], budgets: Sequence[Budget]) -> int:
    """The design of the least loss within all budgets of payload and true bits; if none is, the smallest."""
    numel = sum(d.numel for d in decisions)
    limits = [(b.kind, b.exact * numel) for b in budgets if b.kind in (PAYLOAD, TRUE)]

    def rank(index: int) -> tuple[bool, float, int]:
        design = formats_in(decisions, archive.designs[index])
        fits = all(_total(decisions, design, kind) <= limit for kind, limit in limits)
        size = _total(decisions, design, TRUE)
        return (not fits, float(archive.losses[index]) if fits else 0.0, size)

    return min(range(len(archive.designs)), key=rank)


def _total(decisions: Sequence[Decision], design: Sequence[Format], kind: str) -> int:
    return sum(d.amount(format_, kind) for d, format_ in zip(decisions, design, strict=True))


def _scored_around(decision: Decision, chosen: Format, added: float) -> Iterator[Weight]:
    """Its weights with scores; `added`, nats, is what they lose in their narrowest format together."""
    narrowest, floor = decision.noise(decision.formats[0]), decision.noise(chosen)
    for weight in decision.weights:
        share = added * weight.type.numel() / decision.numel
        scores = {}
        for name in candidates_of(weight):
            rise = max(0.0, decision.noise(parse_format(name)) - floor)
            scores[name] = rounded(share * rise / narrowest)
        yield weight.with_attrs(scores=scores)
