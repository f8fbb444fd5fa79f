"""AdamW by hand, so that a checkpoint holds all of its state and a resumed run repeats every bit."""

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

BETAS: Final = (0.9, 0.999)
EPS: Final = 1e-8


class Adam:
    """Moments of named parameters (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2)."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float = 0.0) -> None:
        self.parameters, self.decay = parameters, decay
        self.first = {n: torch.zeros_like(p) for n, p in parameters.items()}
        self.second = {n: torch.zeros_like(p) for n, p in parameters.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], rate: float, taken: int) -> None:
        """One step at `rate`; `taken` counts from one. Parameters without a gradient stay."""
        for name, gradient in gradients.items():
            parameter, first, second = self.parameters[name], self.first[name], self.second[name]
            first.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            size = (second / (1 - BETAS[1] ** taken)).sqrt_().add_(EPS)
            if self.decay and parameter.ndim > 1:
                parameter.mul_(1 - rate * self.decay)
            parameter.addcdiv_(first / (1 - BETAS[0] ** taken), size, value=-rate)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        kinds = {"first": self.first, "second": self.second}
        return {f"{kind}/{n}": t for kind, tensors in kinds.items() for n, t in tensors.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for name in self.parameters:
            self.first[name].copy_(tensors[f"first/{name}"])
            self.second[name].copy_(tensors[f"second/{name}"])


@torch.no_grad()
def clip_norm(gradients: Mapping[str, Tensor], most: float) -> float:
    """Scale gradients down where their joint norm exceeds `most`; the norm as it was."""
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    if norm > most > 0:
        for gradient in gradients.values():
            gradient.mul_(most / norm)
    return norm
