"""Mean and largest magnitude of what linears read, channel by channel, over calibration tokens."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gammac.ir import Operand


@dataclass
class InputMagnitudes:
    """By the value that is read."""

    sums: dict[Operand, Tensor] = field(default_factory=dict)
    largest: dict[Operand, Tensor] = field(default_factory=dict)
    counts: dict[Operand, int] = field(default_factory=dict)

    def add(self, value: Operand, x: Tensor) -> None:
        """One batch: x [..., channels]."""
        magnitude = x.flatten(0, -2).float().abs()
        if value not in self.sums:
            self.sums[value] = torch.zeros(magnitude.shape[1])
            self.largest[value] = torch.zeros(magnitude.shape[1])
            self.counts[value] = 0
        self.sums[value] += magnitude.sum(0)
        self.largest[value] = torch.maximum(self.largest[value], magnitude.amax(0))
        self.counts[value] += len(magnitude)

    def mean(self, value: Operand) -> Tensor:
        """Mean |x| of each channel, f32 [channels]."""
        return self.sums[value] / self.counts[value]
