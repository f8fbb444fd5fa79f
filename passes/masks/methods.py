"""Methods: who decides which weights stay. Each gives the mask of a step and learns from its gradients.

The trainer owns the weights and their optimizer. Gradients are those at the masked weights, dense: they pass
the mask straight through, so that a weight that is masked out keeps learning and may come back.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, Protocol

import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import keep_two
from gammac.formats.two_four import FOUR, PATTERNS, by_four
from gammac.passes.masks import gates

State = dict[str, Tensor]


@dataclass(frozen=True)
class Clock:
    """A step, of `main` steps in which masks move."""

    step: int
    main: int
    seed: int = 0

    def part(self, start: float, end: float) -> float:
        """How far the step is from share `start` of the main phase to share `end`: 0…1."""
        return min(1.0, max(0.0, (self.step / self.main - start) / (end - start)))


class Method(Protocol):
    """A way to come by masks. `state` is all that it remembers, by name, for checkpoints."""

    name: ClassVar[str]
    sparse: ClassVar[bool]
    trains_weights: ClassVar[bool]
    state: State

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Before the first step."""
        ...

    def mask(self, name: str, weight: Tensor, at: Clock) -> Tensor:
        """What the weight is multiplied by in this step, f32 of its shape."""
        ...

    def probes(self, at: Clock) -> bool:
        """Whether this step needs curvature."""
        ...

    def learn(self, name: str, weight: Tensor, gradient: Tensor, curvature: Tensor | None, at: Clock) -> None:
        """Update the mask behind a step; `gradient` is that at the masked weight."""
        ...

    def pull(self, name: str, weight: Tensor, at: Clock) -> Tensor | None:
        """What decay adds to the optimizer's numerator, outside of its moments; None is nothing."""
        ...

    def ranking(self, name: str, weight: Tensor) -> Tensor:
        """The final mask keeps the two largest of each four of this."""
        ...


@dataclass
class Dense:
    """Nothing is pruned: what the same tokens do for a dense model."""

    name: ClassVar[str] = "dense"
    sparse: ClassVar[bool] = False
    trains_weights: ClassVar[bool] = True
    state: State = field(default_factory=dict)

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """See Method."""

    def mask(self, name: str, weight: Tensor, at: Clock) -> Tensor:
        """See Method."""
        return torch.ones_like(weight)

    def probes(self, at: Clock) -> bool:
        """See Method."""
        return False

    def learn(self, name: str, weight: Tensor, gradient: Tensor, curvature: Tensor | None, at: Clock) -> None:
        """See Method."""

    def pull(self, name: str, weight: Tensor, at: Clock) -> Tensor | None:
        """See Method."""
        return None

    def ranking(self, name: str, weight: Tensor) -> Tensor:
        """See Method."""
        return weight.abs()


@dataclass
class Ast(Dense):
    """A hard mask by magnitude, made anew every `every` steps; decay on what it masks out, from zero up.

    AST (Huang et al. 2024, arXiv 2407.20584), section 3; the decay is SR-STE's, outside of Adam's moments.
    """

    name: ClassVar[str] = "ast"
    sparse: ClassVar[bool] = True
    every: int = 4
    decay: float = 1e-4

    def mask(self, name: str, weight: Tensor, at: Clock) -> Tensor:
        """See Method."""
        if at.step % self.every == 0 or name not in self.state:
            self.state[name] = keep_two(weight.abs()).float()
        return self.state[name]

    def pull(self, name: str, weight: Tensor, at: Clock) -> Tensor | None:
        """See Method."""
        return self.decay * at.part(0, 1) * weight * (1 - self.state[name])


@dataclass
class Cast(Ast):
    """Dense forward; what the magnitude mask leaves out is driven to zero by decay that Adam's second moment
    scales. CAST (arXiv 2509.25996), without its weight scaling: AdamS alone."""

    name: ClassVar[str] = "cast"
    every: int = 10
    decay: float = 1e-3

    def mask(self, name: str, weight: Tensor, at: Clock) -> Tensor:
        """See Method."""
        super().mask(name, weight, at)
        return torch.ones_like(weight)

    def pull(self, name: str, weight: Tensor, at: Clock) -> Tensor | None:
        """See Method."""
        return self.decay * at.part(0, 1) * weight.sign() * (1 - self.state[name])


@dataclass
class MaskLlm(Dense):
    """Logits over the six patterns of each four, sampled by Gumbel-Softmax; weights stay as they are.

    MaskLLM (Fang et al. 2024, arXiv 2409.17481), sections 3.2 and 3.3: temperature 4 → 0.05, logits times
    100 → 500, a prior of `strength` for the magnitude mask. Logits move by their mean slope in units of its
    deviation, `rate` a step: not by Adam.
    """

    name: ClassVar[str] = "maskllm"
    sparse: ClassVar[bool] = True
    trains_weights: ClassVar[bool] = False
    rate: float = 1e-3
    strength: float = 3.0
    beta: float = 0.9

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """See Method."""
        for name, weight in weights.items():
            agreed = by_four(keep_two(weight.abs()).float()) @ _table().T / 2
            centred = agreed - agreed.mean(2, keepdim=True)
            self.state[name] = self.strength * 0.01 * centred / centred.std().clamp(min=1e-6)
            self.state[f"{name}.moved"] = torch.zeros_like(self.state[name])

    def _chances(self, name: str, at: Clock) -> Tensor:
        share = at.part(0, 1)
        noise = torch.rand(
            self.state[name].shape,
            generator=torch.Generator().manual_seed(zlib.crc32(f"{name} {at.seed} {at.step}".encode())),
        )
        gumbel = -(-noise.clamp(1e-9, 1 - 1e-7).log()).log()
        temperature = 4 + share * (0.05 - 4)
        return ((self.state[name] * (100 + 400 * share) + gumbel) / temperature).softmax(2)

    def mask(self, name: str, weight: Tensor, at: Clock) -> Tensor:
        """See Method."""
        return (self._chances(name, at) @ _table()).reshape(weight.shape)

    def learn(self, name: str, weight: Tensor, gradient: Tensor, curvature: Tensor | None, at: Clock) -> None:
        """See Method."""
        chances = self._chances(name, at)
        at_chances = by_four(gradient * weight) @ _table().T
        slope = chances * (at_chances - (chances * at_chances).sum(2, keepdim=True))
        moved = self.beta * self.state[f"{name}.moved"] + (1 - self.beta) * slope
        self.state[f"{name}.moved"] = moved
        self.state[name] = self.state[name] - self.rate * moved / (moved.std() + 1e-20)

    def ranking(self, name: str, weight: Tensor) -> Tensor:
        """See Method."""
        best = self.state[name].argmax(2)
        return _table()[best].reshape(weight.shape)


def _table() -> Tensor:
    """The six patterns f32 [6, 4]."""
    return torch.tensor([[float(i in pattern) for i in range(FOUR)] for pattern in PATTERNS])


@dataclass
class SparseForge(Dense):
    """Soft masks by curvature, hardened and quenched to 2:4 while the weights learn by gradient.

    arXiv 2605.06402, with the released schedule as shares of the main phase: masks move from 3 % on, are
    quenched from 12 % to 95 %, and then are exactly 2:4. `score` as in `gates.score`; every `every` steps
    masks move by `rate`. `hardening`: gates are pulled towards two of each four, and mixed with the mask's
    own two largest, wholly from 60 % on; the release mixes with the scores', which takes longer to settle.
    """

    name: ClassVar[str] = "sparseforge"
    sparse: ClassVar[bool] = True
    score: str = "hessian_obd"
    hardening: bool = True
    every: int = 2
    rate: float = 0.1
    beta: float = 0.98
    cooling: float = 0.97

    def __post_init__(self) -> None:
        """Raises CompileError for a score that isn't there."""
        if self.score not in gates.SCORES:
            raise CompileError(f"no score {self.score!r}", hint=f"there are {', '.join(gates.SCORES)}")

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """See Method."""
        for name, weight in weights.items():
            self.state[name] = torch.ones_like(weight)
            self.state[f"{name}.curvature"] = torch.zeros_like(weight)
            self.state[f"{name}.updates"] = torch.zeros(2)  # of the mask, of the curvature

    def _moves(self, at: Clock) -> bool:
        return at.step % self.every == 0 and at.step >= 0.03 * at.main and at.part(0.12, 0.95) < 1

    def probes(self, at: Clock) -> bool:
        """See Method."""
        return self.score.startswith("hessian") and at.step % self.every == 0

    def mask(self, name: str, weight: Tensor, at: Clock) -> Tensor:
        """See Method."""
        return gates.quenched(self.state[name], 1 - at.part(0.12, 0.95))

    def learn(self, name: str, weight: Tensor, gradient: Tensor, curvature: Tensor | None, at: Clock) -> None:
        """See Method."""
        seen = gradient.square() if self.score == "fisher" else curvature
        count = self.state[f"{name}.updates"]
        if seen is not None:
            old = self.state[f"{name}.curvature"]
            self.state[f"{name}.curvature"] = self.beta * old + (1 - self.beta) * seen.clamp(min=0)
            count[1] += 1
        if not self._moves(at):
            return
        # updates are counted: a temperature of the step would jump where `every` changes
        temperature = self.cooling ** float(count[0])
        count[0] += 1
        unbiased = self.state[f"{name}.curvature"] / max(1 - self.beta ** float(count[1]), 1e-12)
        scores, mask = gates.score(self.score, weight, unbiased), self.state[name]
        gate = gates.gate(scores, temperature)
        if self.hardening:
            eased = at.part(0.12, 0.6)
            eased = eased * eased * (3 - 2 * eased)
            gate = gates.harden(gate, mask, 0.3 * (0.2 + 0.8 * at.part(0, 1)) * at.part(0.03, 0.12))
            gate = (1 - eased) * gate + eased * keep_two(mask).float()
        self.state[name] = ((1 - self.rate) * mask + self.rate * gate).clamp(0, 1)

    def ranking(self, name: str, weight: Tensor) -> Tensor:
        """See Method."""
        return self.state[name]


METHODS: Final[Mapping[str, type[Dense]]] = {m.name: m for m in (SparseForge, Ast, Cast, MaskLlm, Dense)}
