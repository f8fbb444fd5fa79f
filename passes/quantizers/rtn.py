"""Round to nearest: each weight goes to the closest code of its group's grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gammac.formats import INTEGER, Format, Quantized
from gammac.passes.quantizers.grid import choose_grid, on_grids, round_to_grid


@dataclass(frozen=True)
class Rtn:
    """`clip`: none (min-max) or mse (the range that loses least)."""

    name: ClassVar[str] = "rtn"
    needs_gram: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = (INTEGER,)
    stacks: ClassVar[bool] = True
    clip: str = "mse"

    def quantize(self, weight: Tensor, gram: Tensor | None, formats: Sequence[Format]) -> list[Quantized]:
        """See Quantizer. The Gram matrix is not looked at."""
        return [round_to_grid(weight, choose_grid(weight, f, self.clip), f) for f in on_grids(formats)]
