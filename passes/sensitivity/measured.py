"""Distances of tried allocations from full precision, remembered piece by piece for a run that is killed."""

import math
from typing import Any, Final

from torch import Tensor

from gammac.cache import key_of
from gammac.diagnostics import CompileError
from gammac.ir import Module, to_text
from gammac.pipeline import Context
from gammac.progress import Progress
from gammac.trials import Assignment, run_trials
from gammac.weights import digest_of

PIECE: Final = 32  # assignments; those that differ late share what comes before


def measured_kl(
    module: Module, ctx: Context, tokens: Tensor, assignments: list[Assignment], progress: Progress,
    title: str,
) -> list[float]:  # fmt: skip
    """Mean KL(full precision ‖ tried) of each assignment on tokens i64 [windows, length], in nats.

    Raises what `run_trials` does, and CompileError where a trial puts out no numbers.
    """
    basis = key_of("measured_kl", to_text(module), digest_of({"tokens": tokens}))
    found: list[float] = []
    for start in progress(range(0, len(assignments), PIECE), title):
        piece = assignments[start : start + PIECE]

        def compute(piece: list[Assignment] = piece) -> dict[str, Any]:
            return {"kl": [trial.kl for trial in run_trials(module, ctx.store, tokens, piece)]}

        key = key_of(basis, *(repr(sorted(assignment.items())) for assignment in piece))
        found += ctx.cache.record(key, compute)["kl"]
    for assignment, kl in zip(assignments, found, strict=True):
        if not math.isfinite(kl):
            raise CompileError(f"the KL of {_shown(assignment)} is {kl}", hint="choose other candidates")
    return found


def _shown(assignment: Assignment) -> str:
    some = [f"{name} in {format_}" for name, format_ in assignment.items()]
    return ", ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "")
