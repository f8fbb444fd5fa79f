"""Orthogonal matrices of two Kronecker factors: n (p + q) products for a vector of n = p · q, not n².

A row x, read as X [p, q], times P ⊗ Q is Pᵀ X Q. Factors lie near √n: 576 = 24 · 24, 1536 = 32 · 48.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gammac.passes.hadamard import hadamard, random_orthogonal, randomized

KINDS: Final = ("kronecker", "hadamard")
LARGEST: Final = 512  # a factor with more rows costs more than it brings


@dataclass(frozen=True)
class Kronecker:
    """left ⊗ right, f64 [p, p] and [q, q], both orthogonal."""

    left: Tensor
    right: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """rows [..., n] times the matrix, f64."""
        p, q = len(self.left), len(self.right)
        return (self.left.T @ (rows.double().reshape(*rows.shape[:-1], p, q) @ self.right)).reshape(
            rows.shape
        )

    @property
    def inverse(self) -> "Kronecker":
        """The transposed matrix."""
        return Kronecker(self.left.T.contiguous(), self.right.T.contiguous())


def random_kronecker(kind: str, size: int, seed: str) -> Kronecker | None:
    """`kronecker`: two random orthogonal factors (QuIP, arXiv 2307.13304, section 4.1). `hadamard`: two
    Hadamard matrices with random signs of their rows (QuIP#, arXiv 2402.04396, section 3).

    Rounded to f32. Equal seeds give equal matrices; None where the size has no such factors.
    """
    found = factors_of(size, kind)
    if found is None:
        return None
    left, right = (
        _factor(kind, n, f"{seed}.{side}") for side, n in zip(("left", "right"), found, strict=True)
    )
    return Kronecker(left.float().double(), right.float().double())


def factors_of(size: int, kind: str) -> tuple[int, int] | None:
    """p ≤ q with p · q = size, as near to each other as the kind allows; None where q gets too large."""
    for p in range(int(size**0.5), 0, -1):
        if size % p == 0 and (kind != "hadamard" or _have_hadamard(p, size // p)):
            return (p, size // p) if size // p <= LARGEST else None
    return None


def _have_hadamard(*sizes: int) -> bool:
    return all(n <= LARGEST and hadamard(n) is not None for n in sizes)


def _factor(kind: str, size: int, seed: str) -> Tensor:
    number = number_of(seed)
    if kind == "hadamard":
        return randomized(size, number)
    return random_orthogonal(size, torch.Generator().manual_seed(number))


def random_signs(size: int, seed: str) -> Tensor:
    """±1, f64 [size]."""
    generator = torch.Generator().manual_seed(number_of(seed))
    return torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1


def number_of(seed: str) -> int:
    """A seed for torch, from a text."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
