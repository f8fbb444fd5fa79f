"""GAMMA's preferences: a logit for each module and format, under one constraint on the bits of them all.

What is learnt of a format b is its loss ℓ(b), in nats a token: the slope of the loss, summed up on the way
from the full-precision weight to the candidate while the other modules are what their preferences make
them. Each sampled mixture p lands somewhere on that way. A line through the slopes ∂L/∂p_b against p_b,
read off in the middle, is the whole way's sum (the trapezoidal rule); mixtures that average errors away
lie on that line too, so they do not flatter a format. From the losses

    θ_b = −(ℓ(b) + μ n b) / unit       π = softmax(θ / τ)       p: a Gumbel-softmax sample of π

with n the module's share of the weights and μ = λ + ρ h the price of a bit: multiplier and penalty of an
augmented Lagrangian for h = Σ n b π − target = 0. Where losses stand still, π minimises the expected loss
minus unit τ times its entropy under the constraint. ℓ holds for every budget: another budget is another
μ, and Σ μ n b is the same for all allocations of that budget.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

SHRUNK: Final = 0.75  # the penalty grows where the violation did not shrink to this share
HALVINGS: Final = 200
RELAXATION: Final = 1.0  # of soft samples; how sharp the chances are is the temperature's business


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator, hard: bool) -> Tensor:
    """A one-hot sample [formats] of softmax(logits), relaxed by the temperature (Jang et al. 2017, eq. 2).

    `hard`: forwards it is one-hot, backwards it has the soft sample's gradient (straight-through).
    """
    uniform = torch.rand(logits.shape, generator=generator, dtype=logits.dtype).clamp(1e-12, 1 - 1e-12)
    soft = torch.softmax((logits - (-uniform.log()).log()) / temperature, -1)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return one_hot + (soft - soft.detach())


@dataclass
class Lines:
    """Sums over one module's samples, [formats] each: a line through (p_b, ∂L/∂p_b) for each format b."""

    count: Tensor
    p: Tensor
    pp: Tensor
    slope: Tensor
    p_slope: Tensor

    @classmethod
    def none(cls, formats: int) -> "Lines":
        """Before the first sample."""
        return cls(*(torch.zeros(formats, dtype=torch.float64) for _ in range(5)))

    def add(self, p: Tensor, slope: Tensor, memory: float) -> None:
        """One sample; those before it fade by `memory`."""
        for name, new in zip(vars(self), (torch.ones_like(p), p, p * p, slope, p * slope), strict=True):
            setattr(self, name, memory * getattr(self, name) + new)

    def losses(self) -> Tensor:
        """The lines at p = ½, [formats]; flat where p hardly varied.

        A line that falls is noise: on the way to a candidate the loss curves upwards.
        """
        count = self.count.clamp(min=1e-12)
        p, height = self.p / count, self.slope / count
        spread = self.pp / count - p * p
        rise = ((self.p_slope / count - p * height) / spread.clamp(min=1e-6)).clamp(min=0)
        return height + torch.where(spread > 1e-6, rise, 0.0) * (0.5 - p)


@dataclass
class Preferences:
    """Logits of all modules. `bits` by module and format; the `shares` of the modules sum up to 1."""

    bits: Mapping[str, Sequence[float]]
    shares: Mapping[str, float]
    target: float
    memory: float
    growth: float
    augmented: bool
    lines: dict[str, Lines] = field(default_factory=dict)
    unit: float = math.inf  # nats; infinite until the first losses are known: all formats alike
    multiplier: float = 0.0
    penalty: float = 0.0
    price: float = 0.0
    violation: float = math.inf
    known: dict[str, Tensor] = field(default_factory=dict)  # losses since the last sample

    def __post_init__(self) -> None:
        self.lines = {name: Lines.none(len(bits)) for name, bits in self.bits.items()}

    def logits(self, name: str, price: float | None = None) -> Tensor:
        """θ of a module, [formats]."""
        price = self.price if price is None else price
        cost = price * self.shares[name] * torch.tensor(self.bits[name], dtype=torch.float64)
        return -(Preferences.losses(self, name) + cost) / self.unit

    def sample(self, name: str, temperature: float, generator: torch.Generator, hard: bool) -> Tensor:
        """A mixture p of a module's formats, [formats]; `hard`: one of them, each as often as π says."""
        return gumbel_softmax(self.logits(name) / temperature, RELAXATION, generator, hard)

    def learn(self, name: str, p: Tensor, slope: Tensor) -> None:
        """One sample p of a module, [formats], and the slope of the loss towards each of its formats."""
        self.lines[name].add(p.detach(), slope, self.memory)
        self.known.pop(name, None)

    def losses(self, name: str) -> Tensor:
        """What was learnt of a module, [formats]; nats a token where the slopes were."""
        if name not in self.known:
            self.known[name] = self.lines[name].losses()
        return self.known[name]

    def excess(self, temperature: float, price: float | None = None) -> float:
        """h: the expected average bits, less the target."""
        bits = 0.0
        for name, widths in self.bits.items():
            chance = torch.softmax(self.logits(name, price) / temperature, -1)
            bits += self.shares[name] * float(chance @ torch.tensor(widths, dtype=torch.float64))
        return bits - self.target

    def settle(self, temperature: float, rate: float, steps: int = 1) -> None:
        """After a sweep over all modules: the unit, the multiplier, the penalty, and the price.

        `rate` is the penalty's start, as a share of what the losses span for a bit of the average. The
        losses stand still meanwhile, so that several `steps` of the method of multipliers cost nothing.
        """
        losses = [lines.losses() for lines in self.lines.values()]
        spans = torch.stack([loss.max() - loss.min() for loss in losses])
        self.unit = max(float(spans.median()), 1e-30)
        if math.isinf(self.violation):
            self.penalty = rate * max(float(spans.sum()), 1e-30)
        for _ in range(steps):
            if self.augmented and math.isfinite(self.violation):
                self.multiplier += self.penalty * self.violation
            self.price = self._balanced(temperature)
            violation = self.excess(temperature)
            if self.augmented and abs(violation) > SHRUNK * abs(self.violation):
                self.penalty *= self.growth
            self.violation = violation

    def _balanced(self, temperature: float) -> float:
        """μ with μ = λ + ρ h(μ): h falls as bits get dearer, so there is one, found by halving."""
        most = max(max(widths) for widths in self.bits.values())
        least = min(min(widths) for widths in self.bits.values())
        low = self.multiplier + self.penalty * (least - self.target)
        high = self.multiplier + self.penalty * (most - self.target)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if middle in (low, high):
                break
            if self.multiplier + self.penalty * self.excess(temperature, middle) > middle:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def state(self) -> dict[str, Any]:
        """Everything that changes, for a record."""
        lines = {name: [t.tolist() for t in vars(x).values()] for name, x in self.lines.items()}
        return {
            "lines": lines, "unit": self.unit, "multiplier": self.multiplier, "penalty": self.penalty,
            "price": self.price, "violation": self.violation,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.known.clear()
        for name, rows in state["lines"].items():
            self.lines[name] = Lines(*(torch.tensor(row, dtype=torch.float64) for row in rows))
        for name in ("unit", "multiplier", "penalty", "price", "violation"):
            setattr(self, name, float(state[name]))
