"""Orthogonal matrices that spread whatever stands out: randomized Hadamard matrices.

A Hadamard matrix has entries ±1 and orthogonal rows. Sizes here are products of a power of two and of what
Paley's two constructions give: 12, 20, 24, 28, 36, 44, … so 576, 896, 1536 and 2560 have one.
"""

from functools import cache

import torch
from torch import Tensor


def randomized(size: int, seed: int) -> Tensor:
    """An orthogonal matrix f64 [size, size]: a Hadamard matrix with random signs of its rows, scaled.

    A size that none is known for gets a random orthogonal matrix. Equal seeds give equal matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    found = hadamard(size)
    if found is None:
        return random_orthogonal(size, generator)
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    return torch.mul(signs[:, None], found / size**0.5)


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix f64 [size, size], none likelier than another."""
    factors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return torch.mul(factors.Q, factors.R.diagonal().sign())


@cache
def hadamard(size: int) -> Tensor | None:
    """Entries ±1, f64 [size, size], with H Hᵀ = size · I; None if no construction here has that size."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size % 4:
        return None
    found = _paley(size)
    for factor in (2, *range(12, size // 2 + 1, 4)):
        if found is not None:
            break
        if size % factor == 0:
            left, right = hadamard(factor), hadamard(size // factor)
            found = torch.kron(left, right) if left is not None and right is not None else None
    return found


def _paley(size: int) -> Tensor | None:
    """Paley's constructions (1933) over a prime q: q + 1 for q ≡ 3, 2 (q + 1) for q ≡ 1 modulo 4."""
    if _is_prime(size - 1):
        skew = _bordered(size - 1, -1.0)
        return skew + torch.eye(size, dtype=torch.float64)
    half = size // 2
    if not _is_prime(half - 1) or (half - 1) % 4 != 1:
        return None
    symmetric, eye = _bordered(half - 1, 1.0), torch.eye(half, dtype=torch.float64)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(symmetric, plus) + torch.kron(eye, minus)


def _bordered(q: int, corner: float) -> Tensor:
    """Jacobsthal's matrix of quadratic residues with a border of ones: [q + 1, q + 1], zero diagonal."""
    residues = {x * x % q for x in range(1, q)}
    row = torch.tensor([0.0] + [1.0 if x in residues else -1.0 for x in range(1, q)], dtype=torch.float64)
    index = (torch.arange(q)[:, None] - torch.arange(q)[None]) % q
    found = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    found[1:, 1:] = row[index]
    found[0, 1:], found[1:, 0] = 1.0, corner
    return found


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
