"""DSA-QAT's quantization-aware loss: L = L_task + γ Σ_l (A_l − Q(A_l))².

As printed the penalty pulls activations towards zero, where errors are small; each term is therefore
divided by the layer's own mean square, and the sum is a mean over layers. Where activations stay floats, what
is quantized is the weight, and A_l stands for it: that holds weights near their codes (the dampening of
Nagel et al. 2022, the paper's reference 12).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def squared_noise(values: Tensor, quantized: Tensor) -> Tensor:
    """Σ (A − Q(A))², the paper's term; no gradient flows through Q."""
    return (values - quantized.detach()).square().sum()


def relative_noise(values: Tensor, quantized: Tensor) -> Tensor:
    """The same over Σ A², which no scale changes; no gradient flows through the divisor."""
    return squared_noise(values, quantized) / values.detach().square().sum().clamp(min=1e-30)


def quantization_aware_loss(task: Tensor, noises: Sequence[Tensor], gamma: float) -> Tensor:
    """L_task + γ · mean over layers of their noise."""
    return task if not noises or gamma == 0 else task + gamma * torch.stack(list(noises)).mean()
