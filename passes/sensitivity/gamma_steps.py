"""GAMMA's logits by gradient steps, as differentiable search takes them; to compare with `Preferences`.

Each sample's gradient at the logits, through the Gumbel-softmax, and that of the augmented Lagrangian's
constraint move θ by one step. What is divided by is the question: by nothing that changes (sgd), by one
second moment of all logits (global), or by one for each (adam), which forgets how large a gradient was:
a logit then tells how sure a direction is, not how much it matters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from gammac.passes.sensitivity.gamma_preferences import SHRUNK, Preferences, gumbel_softmax

DECAY: Final = 0.9  # of the first moment
SECOND: Final = 0.999  # of the second


@dataclass
class SteppedPreferences(Preferences):
    """θ starts at zero. `optimizer` is sgd, global or adam; a step's size is about `rate`."""

    optimizer: str = "global"
    rate: float = 0.1
    theta: dict[str, Tensor] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    size: float = 0.0  # the mean square of all gradients so far, its steps uncounted
    taken: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, bits in self.bits.items():
            zeros = torch.zeros(len(bits), dtype=torch.float64)
            self.theta[name] = zeros.clone().requires_grad_()
            self.first[name], self.second[name], self.steps[name] = zeros.clone(), zeros.clone(), 0

    def logits(self, name: str, price: float | None = None) -> Tensor:
        """θ, whatever the price: the constraint's gradient has moved it already."""
        return self.theta[name].detach()

    def sample(self, name: str, temperature: float, generator: torch.Generator, hard: bool) -> Tensor:
        """As in `Preferences`; gradients flow to θ. The temperature is that of the relaxation."""
        return gumbel_softmax(self.theta[name], temperature, generator, hard)

    def learn(self, name: str, p: Tensor, slope: Tensor) -> None:
        """One step against ∂L/∂θ and the constraint's gradient."""
        super().learn(name, p, slope)
        (gradient,) = torch.autograd.grad(p, self.theta[name], slope)
        chance = torch.softmax(self.theta[name].detach(), -1)
        bits = torch.tensor(self.bits[name], dtype=torch.float64)
        gradient = gradient + self.price * self.shares[name] * chance * (bits - chance @ bits)
        self.steps[name] += 1
        self.taken += 1
        count = self.steps[name]
        self.first[name] = DECAY * self.first[name] + (1 - DECAY) * gradient
        self.second[name] = SECOND * self.second[name] + (1 - SECOND) * gradient.square()
        if self.optimizer == "global" or self.taken <= len(self.bits):
            self.size += (float(gradient.square().mean()) - self.size) / min(self.taken, 1 / (1 - SECOND))
        scale = torch.tensor(math.sqrt(self.size), dtype=torch.float64)
        if self.optimizer == "adam":
            scale = (self.second[name] / (1 - SECOND**count)).sqrt()
        step = self.first[name] / (1 - DECAY**count) / scale.clamp(min=1e-30)
        with torch.no_grad():
            self.theta[name] -= self.rate * step

    def settle(self, temperature: float, rate: float, steps: int = 1) -> None:
        """After a sweep: the multiplier, the penalty and the price of a bit for the next one.

        One step, whatever `steps`: the logits have to follow first. The penalty starts at `rate` as in
        `Preferences`: a share of what the losses span.
        """
        violation = self.excess(1.0)
        if math.isinf(self.violation):
            losses = [lines.losses() for lines in self.lines.values()]
            spans = torch.stack([loss.max() - loss.min() for loss in losses])
            self.penalty = rate * max(float(spans.sum()), 1e-30)
        elif self.augmented:
            self.multiplier += self.penalty * violation
            if abs(violation) > SHRUNK * abs(self.violation):
                self.penalty *= self.growth
        self.violation = violation
        self.price = self.multiplier + self.penalty * violation

    def losses(self, name: str) -> Tensor:
        """−θ without the price of bits, in nats: the unit is fitted to the losses on the lines."""
        every = {n: -(t.detach() - t.detach().mean()) for n, t in self.theta.items()}
        lines = {n: x.losses() - x.losses().mean() for n, x in self.lines.items()}
        product = math.fsum(float(every[n] @ lines[n]) for n in every)
        unit = product / max(math.fsum(float(x @ x) for x in every.values()), 1e-30)
        bits = torch.tensor(self.bits[name], dtype=torch.float64)
        found = max(unit, 1e-12) * every[name] - self.price * self.shares[name] * bits
        return found - found.min()

    def state(self) -> dict[str, Any]:
        """Everything that changes, for a record."""
        vectors = {key: {n: t.tolist() for n, t in getattr(self, key).items()} for key in VECTORS}
        return {**super().state(), **vectors, "steps": self.steps, "size": self.size, "taken": self.taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        super().restore(state)
        for key in VECTORS:
            found = {n: torch.tensor(row, dtype=torch.float64) for n, row in state[key].items()}
            setattr(self, key, found)
        self.theta = {n: t.requires_grad_() for n, t in self.theta.items()}
        self.steps, self.size, self.taken = dict(state["steps"]), float(state["size"]), int(state["taken"])


VECTORS: Final = ("theta", "first", "second")
