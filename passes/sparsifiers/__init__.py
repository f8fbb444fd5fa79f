"""Sparsifiers: which weights are kept, in one shot: two of each four, or as many as a format says.

Each is an importance of columns: weights rank by magnitude times it. Where `in_sweep`, the ranking is that
of the weights as error feedback has left them when a sweep reaches their four columns, else of the original
ones. How they are stored is a Format's business.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

import torch
from torch import Tensor

from gammac.diagnostics import CompileError


class Sparsifier(Protocol):
    """A way to rank weights."""

    name: ClassVar[str]
    in_sweep: ClassVar[bool]

    def importance(self, diagonal: Tensor, factor: Tensor) -> Tensor:
        """[columns], of the diagonal [columns] of the Gram matrix and that of its inverse's upper factor, in
        one order of columns."""
        ...


@dataclass(frozen=True)
class Magnitude:
    """The largest weights stay."""

    name: ClassVar[str] = "magnitude"
    in_sweep: ClassVar[bool] = False

    def importance(self, diagonal: Tensor, factor: Tensor) -> Tensor:
        """All columns alike."""
        return torch.ones_like(diagonal)


@dataclass(frozen=True)
class Wanda:
    """Magnitude times the norm of the input (Sun et al. 2023, arXiv 2306.11695, equation 1)."""

    name: ClassVar[str] = "wanda"
    in_sweep: ClassVar[bool] = False

    def importance(self, diagonal: Tensor, factor: Tensor) -> Tensor:
        """The root mean square of each input."""
        return diagonal.sqrt()


@dataclass(frozen=True)
class SparseGpt:
    """What a weight's removal costs behind feedback, w² / [U]²ᵢᵢ (Frantar and Alistarh 2023, arXiv
    2301.00774, sections 3.2 and 3.3)."""

    name: ClassVar[str] = "sparsegpt"
    in_sweep: ClassVar[bool] = True

    def importance(self, diagonal: Tensor, factor: Tensor) -> Tensor:
        """1 / [U]ᵢᵢ"""
        return 1 / factor


SPARSIFIERS: Final[Mapping[str, type[Sparsifier]]] = {s.name: s for s in (SparseGpt, Wanda, Magnitude)}


def make_sparsifier(name: str) -> Sparsifier:
    """A sparsifier by name. Raises CompileError."""
    if name not in SPARSIFIERS:
        raise CompileError(f"no mask {name!r}", hint=f"there are {', '.join(SPARSIFIERS)}")
    return SPARSIFIERS[name]()
