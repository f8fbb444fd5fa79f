"""The loop: batches, gradients, Adam, checkpoints, history. What is trained is a Method's business.

A run is fixed by its inputs: the batch of a step follows from the seed and the step alone. A checkpoint holds
everything that the next step depends on, so a killed run that goes on gives the bytes of one that was not.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.files import write_atomically
from gammac.passes.training.adam import Adam, clip_norm
from gammac.progress import Progress, no_progress

CHECKPOINT: Final = "checkpoint.safetensors"

Row = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """Token windows i64 [n, length], and the class of each, i64 [n], where they have one."""

    tokens: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def steps(self, tokens: int, size: int) -> int:
        """Steps of `size` windows that so many tokens make, one at least."""
        return max(1, tokens // (size * self.tokens.shape[1]))

    def take(self, indices: Tensor | slice) -> "Data":
        """Some of the windows."""
        return Data(self.tokens[indices], None if self.labels is None else self.labels[indices])

    def batch(self, step: int, size: int, seed: int) -> "Data":
        """The windows of a step: all of them in a new order at each pass."""
        places = range(step * size, (step + 1) * size)
        picked = [shuffled(len(self), seed, place // len(self))[place % len(self)] for place in places]
        return self.take(torch.tensor(picked))

    def parts(self, size: int) -> Iterator["Data"]:
        """All windows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


class Batches(Protocol):
    """What a trainer draws from."""

    def __len__(self) -> int: ...

    def steps(self, tokens: int, size: int) -> int:
        """Steps of `size` rows at most that so many tokens make, one at least."""
        ...

    def batch(self, step: int, size: int, seed: int) -> Data:
        """The rows of a step, `size` at most, of one length."""
        ...

    def parts(self, size: int) -> Iterator[Data]:
        """All rows once, `size` at most at a time."""
        ...


@lru_cache(maxsize=64)
def shuffled(count: int, seed: int, turn: int) -> Tensor:
    """The order of `count` things at a pass."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7919 + turn))


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `tokens` in all, `batch` windows a step; the rate rises linearly for `warmup` of
    the steps and falls as a cosine to `floor` of it, or stays, with a floor of 1. `save_every` steps a
    checkpoint is written."""

    tokens: int
    batch: int = 4
    rate: float = 3e-4
    decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    save_every: int = 50
    warmup: float = 0.05
    floor: float = 0.1

    def rate_at(self, step: int, steps: int) -> float:
        """The rate of a step, which counts from zero."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        share = (step - warm) / max(1, steps - warm)
        return self.rate * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share)))


class Method(Protocol):
    """What is trained, and what it does before and behind a step."""

    name: str

    def parameters(self) -> Mapping[str, Tensor]:
        """Leaves that require gradients, in a fixed order."""
        ...

    def prepare(self, data: Batches, schedule: Schedule) -> None:
        """What is going to be trained on, told before anything else."""
        ...

    def begin(self, batch: Data) -> None:
        """Once, before the first step of a fresh run."""
        ...

    def loss(self, batch: Data, step: int) -> tuple[Tensor, Row]:
        """What is made smaller, and what the history is to say of the step."""
        ...

    def after(self, gradients: Mapping[str, Tensor], batch: Data, step: int, steps: int, loss: float) -> Row:
        """Behind each step's update; what the history is to say of it."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """State besides the parameters."""
        ...

    def facts(self) -> dict[str, Any]:
        """State as JSON."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """The inverse of `tensors` and `facts`; parameters are restored already."""
        ...


@dataclass
class Trainer:
    """A method on some data. `folder` is for checkpoints; None: there are none."""

    method: Method
    data: Batches
    schedule: Schedule
    folder: Path | None = None
    history: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.steps = self.data.steps(self.schedule.tokens, self.schedule.batch)
        self.adam = Adam(self.method.parameters(), self.schedule.decay)
        self.done = 0

    def run(self, progress: Progress = no_progress) -> list[Row]:
        """Train to the end, from a checkpoint if there is one; a row a step. Raises CompileError where the
        loss is no number any more."""
        self.method.prepare(self.data, self.schedule)
        if not self._resume():
            self.method.begin(self._batch(0))
        for step in progress(range(self.done, self.steps), f"training ({self.method.name})"):
            self._step(step)
            self.done = step + 1
            if self.done % self.schedule.save_every == 0 and self.done < self.steps:
                self.save()
        return self.history

    def _batch(self, step: int) -> Data:
        return self.data.batch(step, self.schedule.batch, self.schedule.seed)

    def _step(self, step: int) -> None:
        batch = self._batch(step)
        loss, said = self.method.loss(batch, step)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CompileError(
                f"the loss of step {step} is {value}", hint=f"a lower --rate than {self.schedule.rate:g}"
            )
        parameters = self.method.parameters()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
        norm = clip_norm(gradients, self.schedule.clip_norm)
        rate = self.schedule.rate_at(step, self.steps)
        self.adam.step(gradients, rate, step + 1)
        said |= self.method.after(gradients, batch, step, self.steps, value)
        tokens = (self.history[-1]["tokens"] if self.history else 0) + batch.tokens.numel()
        self.history.append(
            {"step": step, "tokens": tokens, "loss": value, "rate": rate, "norm": norm, **said}
        )

    # ---- checkpoints ----------------------------------------------------------------------------

    def save(self) -> None:
        """Write what the next step depends on."""
        if self.folder is None:
            return
        parts = {"parameter": self.method.parameters(), "adam": self.adam.tensors()}
        parts["method"] = self.method.tensors()
        flat = {f"{kind}/{n}": t.detach().contiguous() for kind, ts in parts.items() for n, t in ts.items()}
        facts = {"done": self.done, "history": self.history, "method": self.method.facts()}
        write_atomically(self.folder / CHECKPOINT, save(flat, {"facts": json.dumps(facts)}))

    def _resume(self) -> bool:
        path = self.folder / CHECKPOINT if self.folder else None
        if path is None or not path.is_file():
            return False
        try:
            parts, facts = _read(path)
        except (
            SafetensorError,
            OSError,
            ValueError,
        ):  # a damaged checkpoint costs time, never a wrong result
            return False
        with torch.no_grad():
            for name, parameter in self.method.parameters().items():
                parameter.copy_(parts["parameter"][name])
        self.adam.restore(parts["adam"])
        self.method.restore(parts["method"], facts["method"])
        self.done, self.history = int(facts["done"]), list(facts["history"])
        return True


def _read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    parts: dict[str, dict[str, Tensor]] = {"parameter": {}, "adam": {}, "method": {}}
    with safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            kind, _, name = key.partition("/")
            parts[kind][name] = file.get_tensor(key)
    return parts, facts


def smoothed_losses(history: Sequence[Mapping[str, Any]], keep: float = 0.9) -> Iterator[float]:
    """The exponential mean of the loss, row by row."""
    mean: float | None = None
    for row in history:
        mean = row["loss"] if mean is None else keep * mean + (1 - keep) * row["loss"]
        yield mean
