"""Try allocations end to end: how far is the model in these formats from the full-precision one?

Segment by segment over a chunk of batches, as `calibration` cuts the model: a segment's weights are
loaded once, and assignments that agree in all formats so far share one state. So 630 assignments that
each differ in one weight cost half of 630 forward passes. Each run does the same arithmetic whatever is
tried beside it. Positions and measures are those of `runtime.evaluate`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import torch
from torch import Tensor

from gammac.calibration import inputs_of, segments
from gammac.diagnostics import CompileError
from gammac.formats import candidates_of, load_candidate, load_float
from gammac.ir import Module, TensorType, Value, Weight, WeightRef
from gammac.ir.interpret import Env, Weights, bind, run_ops
from gammac.ir.types import BYTES, evaluate
from gammac.progress import Progress, no_progress
from gammac.weights import WeightStore

BATCH_TOKENS: Final = 1024  # a constant, because a batch's shape is part of the arithmetic
STATE_BYTES: Final = 512 * 2**20  # what the states between two segments may take, all together
ROWS: Final = 128  # positions whose probabilities are worked out at a time

# weight name → name of one of its `candidates`; a weight not named stays in full precision
Assignment = Mapping[str, str]
# (weight, format) pairs of each segment; the first n of them name the state that flows into segment n
Path = tuple[tuple[tuple[str, str], ...], ...]
States = dict[Path, list[Env]]


@dataclass(frozen=True)
class Trial:
    """One assignment on some tokens, beside the full-precision model."""

    kl: float  # mean KL(full precision ‖ tried), nats a predicted position
    nll: float  # mean negative log-likelihood of the next token, nats
    top1: float  # share of the positions where the top token agrees

    @property
    def ppl(self) -> float:
        """The perplexity."""
        return math.exp(self.nll)


def run_trials(
    module: Module, store: WeightStore, tokens: Tensor, assignments: Sequence[Assignment],
    progress: Progress = no_progress, title: str = "trying allocations",
) -> list[Trial]:  # fmt: skip
    """One trial for each assignment, in order, over tokens i64 [windows, length].

    Raises CompileError for a model without a next token, and for a weight or format that isn't there.
    """
    _check(module, tokens, assignments)
    trials = _Trials(module, store, tokens)
    paths = [trials.path(assignment) for assignment in assignments]
    steps = [(chunk, index) for chunk in trials.chunks(paths) for index in range(len(trials.segments))]
    states: States = {}
    for chunk, index in progress(steps, title):
        states = trials.advance(chunk, index, states if index else trials.start(chunk))
    return [trials.trial(path) for path in paths]


def _check(module: Module, tokens: Tensor, assignments: Sequence[Assignment]) -> None:
    returned = module.functions["forward"].return_names
    if module.attrs.get("kind") == "encoder" or "logits" not in returned or tokens.shape[1] < 2:
        raise CompileError(
            "only a model that predicts the next token can be tried, on windows of 2 tokens or more",
            hint="use --strategy weight_mse",
        )
    for name, format_ in dict.fromkeys(pair for a in assignments for pair in a.items()):
        if name not in module.weights:
            raise CompileError(f"there is no weight {name!r} to try {format_} on")
        known = candidates_of(module.weights[name])
        if format_ not in known:
            raise CompileError(
                f"has no candidate {format_!r}", loc=name, hint=f"there are {', '.join(known) or 'none'}"
            )


@dataclass(frozen=True, eq=False)
class _Chunk:
    """What is run at a time: these paths beside the reference, over these batches."""

    tried: tuple[Path, ...]
    batches: range


class FormatWeights:
    """One segment's weights, each loaded once in each format; "" is full precision."""

    def __init__(self, module: Module, store: WeightStore) -> None:
        self.module, self.store = module, store
        self.loaded: dict[tuple[str, str], Tensor] = {}

    def get(self, name: str, format_: str) -> Tensor:
        """The weight as f32."""
        if (name, format_) not in self.loaded:
            self.loaded[name, format_] = self._load(self.module.weights[name], format_)
        return self.loaded[name, format_]

    def allocated(self, assignment: Assignment) -> Weights:
        """The weights in their formats."""
        return lambda name: self.get(name, assignment.get(name, ""))

    def _load(self, weight: Weight, format_: str) -> Tensor:
        if not format_:
            return load_float(weight, self.store)
        return load_candidate(weight, format_, self.store).dequantize()


class _Trials:
    """A module on some tokens: what is run, and the sums over positions that each path came to."""

    def __init__(self, module: Module, store: WeightStore, tokens: Tensor) -> None:
        self.module, self.store, function = module, store, module.functions["forward"]
        self.segments = segments(function)
        logits = function.returns[function.return_names.index("logits")]
        assert isinstance(logits, Value)
        self.logits: Value = logits
        self.batches = torch.split(tokens, max(1, BATCH_TOKENS // tokens.shape[1]))
        self.bound = [bind(function, inputs_of(function, batch)) for batch in self.batches]
        self.reference = self.path({})
        # one (KL, negative log-likelihood, agreeing positions) a batch
        self.sums: dict[Path, list[tuple[float, float, float]]] = {}

    def path(self, assignment: Assignment) -> Path:
        """The assignment, segment by segment; a weight that two segments read stands in both."""
        read = [
            {o.name for op in s.ops for o in op.operands if isinstance(o, WeightRef)} for s in self.segments
        ]
        return tuple(tuple((n, assignment[n]) for n in sorted(names & assignment.keys())) for names in read)

    def chunks(self, paths: Sequence[Path]) -> list[_Chunk]:
        """Chunks whose states fit in STATE_BYTES: all paths over some batches, or some over one."""
        tried = sorted(set(paths))  # those that begin alike stand together
        capacity = STATE_BYTES // max(1, self._state_bytes())
        size = max(1, min(len(tried), capacity - 1))
        step = max(1, capacity // (size + 1))
        return [
            _Chunk(tuple(tried[i : i + size]), range(len(self.batches))[b : b + step])
            for i in range(0, len(tried), size)
            for b in range(0, len(self.batches), step)
        ]

    def _state_bytes(self) -> int:
        """What flows between two segments for one batch, where it is most."""
        sizes = self.bound[0][1]
        return max(sum(_bytes(v.type, sizes) for v in s.live_in) for s in self.segments)

    def start(self, chunk: _Chunk) -> States:
        """What the first segment reads: the parameters."""
        return {(): [self.bound[batch][0] for batch in chunk.batches]}

    def advance(self, chunk: _Chunk, index: int, states: States) -> States:
        """Run a segment once for each state and formats that differ; `states` are freed on the way.

        Behind the last segment the paths are compared with the reference, and no state is left.
        """
        weights = FormatWeights(self.module, self.store)
        if index + 1 == len(self.segments):
            self._compare(chunk, states, weights)
            return {}
        behind: States = {}
        paths = sorted({path[: index + 1] for path in (self.reference, *chunk.tried)})
        for before, branches in groupby(paths, key=lambda path: path[:-1]):
            envs = states.pop(before)
            for path in branches:
                behind[path] = [
                    self._run(path, env, batch, weights)
                    for env, batch in zip(envs, chunk.batches, strict=True)
                ]
        return behind

    def _run(self, path: Path, state: Env, batch: int, weights: FormatWeights) -> Env:
        """What the path's last segment leaves to the next one; the logits behind the last."""
        index, formats = len(path) - 1, dict(path[-1])
        last = index + 1 == len(self.segments)
        keep = (self.logits,) if last else self.segments[index + 1].live_in
        env = dict(state)
        with torch.no_grad():
            run_ops(
                self.segments[index].ops, env, self.bound[batch][1],
                lambda name: weights.get(name, formats.get(name, "")), keep,
            )  # fmt: skip
        return {value: env[value] for value in keep}

    def _compare(self, chunk: _Chunk, states: States, weights: FormatWeights) -> None:
        for place, batch in enumerate(chunk.batches):
            targets = [rows for window in self.batches[batch] for rows in window[1:].split(ROWS)]

            def logits(path: Path, place: int = place, batch: int = batch) -> Iterator[Tensor]:
                state = states[path[:-1]][place]
                return predicting_rows(self._run(path, state, batch, weights)[self.logits])

            log_p = [rows.log_softmax(-1) for rows in logits(self.reference)]
            chances = [rows.exp() for rows in log_p]
            for path in chunk.tried:
                log_q = log_p if path == self.reference else (r.log_softmax(-1) for r in logits(path))
                parts = [divergence(*rows) for rows in zip(log_p, chances, log_q, targets, strict=True)]
                kl, nll, agreeing = (math.fsum(column) for column in zip(*parts, strict=True))
                self.sums.setdefault(path, []).append((kl, nll, agreeing))

    def trial(self, path: Path) -> Trial:
        """The means over all positions."""
        count = sum(batch[:, 1:].numel() for batch in self.batches)
        return Trial(*(math.fsum(column) / count for column in zip(*self.sums[path], strict=True)))


def predicting_rows(logits: Tensor) -> Iterator[Tensor]:
    """The positions that predict, f32 [rows, vocab], some at a time; logits [windows, length, vocab]."""
    for window in logits:
        yield from window[:-1].float().split(ROWS)


def divergence(log_p: Tensor, chances: Tensor, log_q: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """Sums over rows: KL(p ‖ q), negative log-likelihood under q, rows with one top token."""
    kl = torch.linalg.vecdot(chances, log_p - log_q).double().sum().item()
    nll = -log_q.gather(1, targets[:, None]).double().sum().item()
    return kl, nll, float((log_p.argmax(-1) == log_q.argmax(-1)).sum().item())


def _bytes(type_: TensorType, sizes: dict[str, int]) -> int:
    return BYTES[type_.dtype] * math.prod(evaluate(dim, sizes) for dim in type_.shape)
