"""What a study would take, told before it starts: seconds for each row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from gammac.dryrun import compile_seconds, flops, guess_scores
from gammac.ir import Module
from gammac.runtime.tasks import Task
from gammac.study.make import plan_of
from gammac.study.rows import RowSpec
from gammac.study.run import FULL_ROW, Prepared

# forward runs beside the products of the linears: attention, norms, logarithms over the vocabulary
OVERHEAD: Final = 1.6
CHARACTERS_PER_TOKEN: Final = 4.0


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
    shared: set[tuple[bool, ...]] = set()
    for spec in ready.wish.rows:
        if spec.lacking or ready.is_done(spec):
            found.append(RowEstimate(spec, said="missing" if spec.lacking else "done"))
            continue
        calibration, quantization = _quantization(ready, spec, module)
        inputs = _sees(ready, spec)
        found.append(RowEstimate(spec, 0.0 if inputs in shared else calibration, quantization, texts + tasks))
        shared.add(inputs)
    return tuple(found)


def _sees(ready: Prepared, spec: RowSpec) -> tuple[bool, ...]:
    """Rows that agree in this share their Gram matrices."""
    choices = plan_of(spec, ready.plan).request.choices
    return choices.rotate, choices.guided


def _quantization(ready: Prepared, spec: RowSpec, module: Module) -> tuple[float, float]:
    """Seconds of the calibration, and of everything else that makes the row's codes."""
    plan = replace(plan_of(spec, ready.plan), capture_seconds=0.0)
    calibration = ready.ctx.calibration
    tokens = calibration.tokens.numel() if calibration else 0
    every = compile_seconds(plan, module, tokens)
    plain = replace(plan.request, choices=replace(plan.request.choices, quantizer="rtn", guided=False))
    without = compile_seconds(replace(plan, request=plain), module, tokens)
    return max(0.0, every - without), without


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
