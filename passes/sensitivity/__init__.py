"""Strategies: each says what a weight loses in each format, and writes it as `scores`.

A strategy is a pass; a lower score is better. Being in the table means being tested.
"""

from typing import Final

from gammac.passes.sensitivity.amq import Amq
from gammac.passes.sensitivity.delta_loss import DeltaLoss
from gammac.passes.sensitivity.first_last_high import FirstLastHigh
from gammac.passes.sensitivity.fisher import Fisher
from gammac.passes.sensitivity.gamma import Gamma
from gammac.passes.sensitivity.greedy_kl import GreedyKl
from gammac.passes.sensitivity.hawq import Hawq
from gammac.passes.sensitivity.owl import Owl
from gammac.passes.sensitivity.random_feasible import RandomFeasible
from gammac.passes.sensitivity.uniform import Uniform
from gammac.passes.sensitivity.weight_mse import WeightMse
from gammac.pipeline import Pass

_IN_ORDER: Final[tuple[type[Pass], ...]] = (
    Gamma, Fisher, DeltaLoss, Hawq, GreedyKl, Amq, WeightMse, Uniform, FirstLastHigh, RandomFeasible, Owl,
)  # fmt: skip
STRATEGIES: Final[dict[str, type[Pass]]] = {s.name: s for s in _IN_ORDER}

# those whose loss is that of the next token, which an encoder does not predict
NEED_NEXT_TOKEN: Final = frozenset(
    {Gamma.name, Fisher.name, DeltaLoss.name, Hawq.name, GreedyKl.name, Amq.name}
)

__all__ = [
    "NEED_NEXT_TOKEN",
    "STRATEGIES",
    "Amq",
    "DeltaLoss",
    "Fisher",
    "Gamma",
    "GreedyKl",
    "Hawq",
    "Owl",
    "WeightMse",
]
