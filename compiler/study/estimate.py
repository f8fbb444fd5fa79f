"""What a study would take, told before it starts: seconds for each row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Final

from gammac.driver import Plan
from gammac.dryrun import compile_seconds, flops, guess_scores
from gammac.ir import Module
from gammac.passes.candidates import Candidates
from gammac.pipeline import full_options_text
from gammac.runtime.tasks import Task
from gammac.study.make import passes_of, plan_of
from gammac.study.rows import RowSpec
from gammac.study.run import FULL_ROW, Prepared

# forward runs beside the products of the linears: attention, norms, logarithms over the vocabulary
OVERHEAD: Final = 1.6
CHARACTERS_PER_TOKEN: Final = 3.5


@dataclass(frozen=True)
class RowEstimate:
    """Seconds that a row would take; `calibration` only for the first of those that share it.

    `said`: done (in the cache already), missing (its quantizer), or nothing.
    """

    spec: RowSpec
    calibration: float = 0.0
    quantization: float = 0.0
    evaluation: float = 0.0
    said: str = ""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.calibration + self.quantization + self.evaluation


def estimate_rows(ready: Prepared) -> tuple[RowEstimate, ...]:
    """One for each row, full precision first."""
    module = guess_scores(ready.plan, ready.ctx)
    texts, tasks = _evaluation(ready, module)
    found = [RowEstimate(FULL_ROW, evaluation=texts + tasks)]
    shared: set[tuple[str, ...]] = set()
    for spec in ready.wish.rows:
        if spec.lacking or ready.is_done(spec):
            found.append(RowEstimate(spec, said="missing" if spec.lacking else "done"))
            continue
        plan = replace(plan_of(spec, ready.plan), capture_seconds=0.0)
        calibration, quantization = _quantization(ready, plan, module)
        seen = _sees(plan)
        found.append(RowEstimate(spec, 0.0 if seen in shared else calibration, quantization, texts + tasks))
        shared.add(seen)
    return tuple(found)


def _sees(plan: Plan) -> tuple[str, ...]:
    """The passes before the candidates: rows that agree in them share what they collect."""
    before = takewhile(lambda p: not isinstance(p, Candidates), passes_of(plan))
    return tuple(full_options_text(p) for p in before)


def _quantization(ready: Prepared, plan: Plan, module: Module) -> tuple[float, float]:
    """Seconds of what reads the calibration text, and of everything else that makes the row's codes."""
    calibration = ready.ctx.calibration
    tokens = calibration.tokens.numel() if calibration else 0
    every, rest = (compile_seconds(plan, module, read) for read in (tokens, 0))
    return max(0.0, every - rest), rest


def _evaluation(ready: Prepared, module: Module) -> tuple[float, float]:
    """Seconds of one model on the texts and on the tasks."""
    weights = sum(w.type.numel() for w in module.weights.values() if "role" in w.attrs)
    head = max((w.type.numel() for w in module.weights.values() if w.attrs.get("role") == "table"), default=0)
    rate = flops() / OVERHEAD
    words = sum(text.tokens.numel() for text in ready.harness.texts)
    # the full-precision model's head is run again beside each row's
    return 2 * words * (weights + head) / rate, 2 * _tokens(ready.harness.tasks) * weights / rate


def _tokens(tasks: Sequence[Task]) -> float:
    options = (o for task in tasks for example in task.examples for o in example.options)
    return sum(len(o.before) + len(o.after) for o in options) / CHARACTERS_PER_TOKEN
