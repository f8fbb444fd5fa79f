"""Strategies: each says what a weight loses in each format, and writes it as `scores`.

A strategy is a pass; a lower score is better. Being in the table means being tested.
"""

from typing import Final

from gammac.passes.sensitivity.fisher import Fisher
from gammac.passes.sensitivity.weight_mse import WeightMse
from gammac.pipeline import Pass

STRATEGIES: Final[dict[str, type[Pass]]] = {s.name: s for s in (Fisher, WeightMse)}

# those whose loss is that of the next token, which an encoder does not predict
NEED_NEXT_TOKEN: Final = frozenset({Fisher.name})

__all__ = ["NEED_NEXT_TOKEN", "STRATEGIES", "Fisher", "WeightMse"]
