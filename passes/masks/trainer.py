"""The trainer that all methods share: steps of Adam, masks by a method, checkpoints to resume from.

Whatever a step draws follows from the seed and the step's number, so that a resumed run gives equal bits.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gammac.files import write_atomically
from gammac.formats import keep_two
from gammac.passes.masks.curvature import hutchinson
from gammac.passes.masks.gates import binarity
from gammac.passes.masks.methods import Clock, Dense
from gammac.progress import Progress, no_progress

BETAS: Final = (0.9, 0.95)
EPSILON: Final = 1e-8
CLIP: Final = 1.0
LAST_RATE: Final = 0.1  # of the first
WARM_UP: Final = 0.05  # of all steps
MAIN: Final = 0.85  # of all steps: masks move; behind them they are frozen
SAVED: Final = 25  # steps between checkpoints


class Problem(Protocol):
    """Something to train: parameters by name, of which some are to be sparse, and a loss."""

    parameters: dict[str, Tensor]
    sparse: tuple[str, ...]

    def loss(self, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        """The training loss of a step's batch."""
        ...

    def error(self, parameters: Mapping[str, Tensor]) -> float:
        """The loss on what is not trained on."""
        ...


@dataclass
class Trainer:
    """Trains `problem` in place for `steps` steps; `rows` are the curves, `report` what to tell of it."""

    problem: Problem
    method: Dense
    steps: int
    rate: float = 1e-4
    seed: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    report: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Moments are zero, masks the method's first."""
        moved = self.problem.parameters if self.method.trains_weights else {}
        self.first = {n: torch.zeros_like(p) for n, p in moved.items()}
        self.second = {n: torch.zeros_like(p) for n, p in moved.items()}
        self.frozen: dict[str, Tensor] = {}
        self.sparse = self.problem.sparse if self.method.sparse else ()
        self.method.begin({n: self.problem.parameters[n] for n in self.sparse})
        self.done = 0

    @property
    def main(self) -> int:
        """Steps in which masks move; all of them where no weights are trained."""
        return max(1, round(MAIN * self.steps)) if self.method.trains_weights else self.steps

    def run(self, checkpoint: Path | None = None, key: str = "", progress: Progress = no_progress) -> None:
        """All steps, from the checkpoint's on where there is one of this key."""
        if checkpoint is not None:
            self._restore(checkpoint, key)
        if not self.done:
            self.report["before"] = self.problem.error(self.problem.parameters)
        for step in progress(range(self.done, self.steps), f"training ({self.method.name})"):
            if step == self.main:
                self._freeze()
            self._step(step)
            self.done = step + 1
            if checkpoint is not None and self.done % SAVED == 0:
                self._save(checkpoint, key)
        if self.sparse and not self.frozen:
            self._freeze()
        self.report["after"] = self.problem.error(self.problem.parameters)

    # ---- a step ---------------------------------------------------------------------------------

    def _masks(self, at: Clock) -> dict[str, Tensor]:
        if self.frozen:
            return self.frozen
        return {n: self.method.mask(n, self.problem.parameters[n], at) for n in self.sparse}

    def _step(self, step: int) -> None:
        at = Clock(step, self.main, self.seed)
        masks = self._masks(at)
        leaves = {
            n: (p * masks[n] if n in masks else p).detach().requires_grad_()
            for n, p in self.problem.parameters.items()
        }
        probes = not self.frozen and self.method.probes(at)
        loss = self.problem.loss(leaves, step)
        found = torch.autograd.grad(loss, list(leaves.values()), create_graph=probes, allow_unused=True)
        gradients = {n: g for n, g in zip(leaves, found, strict=True) if g is not None}
        curvatures: dict[str, Tensor] = {}
        if probes:
            names = [n for n in self.sparse if n in gradients]
            seed = self.seed * 104729 + step
            diagonal = hutchinson([gradients[n] for n in names], [leaves[n] for n in names], seed)
            curvatures = dict(zip(names, diagonal, strict=True))
        gradients = {n: g.detach() for n, g in gradients.items()}
        if not self.frozen:
            for n in self.sparse:
                weight = self.problem.parameters[n]
                self.method.learn(n, weight, gradients[n], curvatures.get(n), at)
        self._move(gradients, at)
        self._note(step, float(loss.detach()), masks)

    def _move(self, gradients: Mapping[str, Tensor], at: Clock) -> None:
        """Adam, gradients clipped together; decay is scaled by the second moment but no part of the first.

        Decay takes no weight past zero, however small its gradients have been.
        """
        taken = {n: gradients[n] * self.frozen.get(n, 1.0) for n in self.first if n in gradients}
        if not taken:
            return
        norm = math.sqrt(sum(float(g.square().sum()) for g in taken.values()))
        since = at.step - self.main + 1 if at.step >= self.main else at.step + 1
        rate = self.rate * self._schedule(at.step)
        for name, gradient in taken.items():
            gradient = gradient * min(1.0, CLIP / (norm + 1e-12))
            self.first[name].lerp_(gradient, 1 - BETAS[0])
            self.second[name].lerp_(gradient.square(), 1 - BETAS[1])
            step = self.first[name] / (1 - BETAS[0] ** since)
            weight = self.problem.parameters[name]
            sparse = name in self.sparse and not self.frozen
            pull = self.method.pull(name, weight, at) if sparse else None
            size = (self.second[name] / (1 - BETAS[1] ** since)).sqrt() + EPSILON
            if pull is not None:
                most = weight.abs()
                weight.sub_((rate * pull / size).clamp(-most, most))
            weight.sub_(rate * step / size)

    def _schedule(self, step: int) -> float:
        warm = max(1, round(WARM_UP * self.steps))
        if step < warm:
            return (step + 1) / warm
        share = (step - warm) / max(1, self.steps - warm)
        return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * share))

    def _freeze(self) -> None:
        """The final masks, exactly 2:4; the optimizer begins anew. What that does to the loss is reported."""
        parameters = self.problem.parameters
        if self.sparse:
            masks = self._masks(Clock(self.main, self.main, self.seed))
            soft = {n: p * masks[n] if n in masks else p for n, p in parameters.items()}
            self.report["before_final_mask"] = self.problem.error(soft)
        for n in self.sparse:
            self.frozen[n] = keep_two(self.method.ranking(n, parameters[n])).float()
            parameters[n].mul_(self.frozen[n])
        if self.sparse:
            self.report["behind_final_mask"] = self.problem.error(parameters)
        for moments in (self.first, self.second):
            for tensor in moments.values():
                tensor.zero_()

    def _note(self, step: int, loss: float, masks: Mapping[str, Tensor]) -> None:
        soft = [self.method.state[n] for n in self.sparse if n in self.method.state and not self.frozen]
        own = [m for m in soft if float(m.min()) >= 0 and float(m.max()) <= 1]  # logits are no masks
        judged = own or list(masks.values())
        size = sum(m.numel() for m in judged) or 1
        self.rows.append(
            {
                "step": step,
                "loss": loss,
                "binarity": sum(binarity(m) * m.numel() for m in judged) / size,
                "density": sum(float(m.sum()) for m in masks.values()) / size if masks else 1.0,
                "frozen": float(bool(self.frozen)),
            }
        )

    # ---- checkpoints ----------------------------------------------------------------------------

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        return {
            "parameters": self.problem.parameters, "first": self.first, "second": self.second,
            "method": self.method.state, "frozen": self.frozen,
        }  # fmt: skip

    def _save(self, path: Path, key: str) -> None:
        flat = {f"{kind}/{n}": t.contiguous() for kind, ts in self._parts().items() for n, t in ts.items()}
        told = {"key": key, "done": self.done, "rows": self.rows, "report": self.report}
        write_atomically(path, save(flat, {"trainer": json.dumps(told)}))

    def _restore(self, path: Path, key: str) -> None:
        """Go on from a checkpoint; one of another request, or a damaged one, is not looked at."""
        try:
            with safe_open(path, framework="pt") as file:
                told: dict[str, Any] = json.loads((file.metadata() or {}).get("trainer", "{}"))
                if told.get("key") != key:
                    return
                parts = self._parts()
                for flat in file.keys():  # noqa: SIM118
                    kind, _, name = flat.partition("/")
                    tensor = file.get_tensor(flat)
                    if kind == "parameters":
                        parts[kind][name].copy_(tensor)
                    else:
                        parts[kind][name] = tensor
        except (OSError, SafetensorError, ValueError):
            return
        self.done, self.rows, self.report = told["done"], told["rows"], told["report"]
