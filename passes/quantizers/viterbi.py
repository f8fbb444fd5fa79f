"""The encoder of trellis codes, compiled by numba: Viterbi's search (1967) in each tile, feedback behind it.

A strip of rows is worked on from its first column to its last, whatever runs beside it: what comes out does
not depend on how many threads there are. `digits` is (0, …, 2ᵏ − 1): numba compiles a kernel for each length
of a tuple, so the number of branches is a constant and the loops over states become vector instructions.
"""

from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Digits = tuple[int, ...]

SEAM: Final = 32  # steps on either side of a tile's ends, after which a path has forgotten where it began
BLOCK: Final = 32  # columns whose errors reach the columns behind them together
REACH: Final = 128  # of those at a time: BLOCK rows of the factor stay in the nearest cache
_FORBIDDEN: Final = np.float32(1e30)
# products and sums may be contracted; nothing here depends on NaN or on signed zeros
_FAST: Final = {"contract", "nsz", "arcp"}


def _compiled(function: Any) -> Any:
    return numba.njit(fastmath=_FAST, cache=True, nogil=True)(function)


@_compiled
def _step(
    before: Floats, values: Floats, target: float, root: float, low: Floats, taken: Bytes, digits: Digits
) -> None:
    """One weight further: the cheapest of the states that lead to the same successors.

    Those are the states with equal last L − k bits. before [j] is the least that leads to the states
    j·2ᵏ + b, whose own error, (target − root·value)², comes on top. low [b, i] is the least over the first k
    bits d of the states whose last k bits are b, i between them, and taken [b, i] that d.
    """
    inner = low.shape[1]
    for b in range(len(digits)):
        for i in range(inner):
            error = target - root * values[b, i]
            best, digit = before[i] + error * error, np.int32(0)
            for d in range(1, len(digits)):
                error = target - root * values[b, d * inner + i]
                cost = before[d * inner + i] + error * error
                digit = np.int32(d) if cost < best else digit
                best = min(cost, best)
            low[b, i] = best
            taken[b, i] = np.uint8(digit)


@_compiled
def _in_order(low: Floats, ordered: Floats, digits: Digits) -> None:
    """low [b, i] to ordered [i, b], both as one dimension: with two it becomes no vector instructions."""
    inner = len(low) // len(digits)
    for i in range(inner):
        for b in range(len(digits)):
            ordered[i * len(digits) + b] = low[b * inner + i]


@_compiled
def encode(
    targets: Floats, weights: Floats, values: Floats, taken: Bytes, states: Integers, digits: Digits,
    seam: int = SEAM,
) -> None:  # fmt: skip
    """Fill states [T] with the path that loses least, Σ weight·(target − value)², and bites its tail.

    values [2ᵏ, 2ᴸ⁻ᵏ]: that of state j·2ᵏ + b at [b, j]; taken [T, 2ᵏ, 2ᴸ⁻²ᵏ] is scratch. The L − k bits that
    the first state shares with the last are those of the best path over `seam` steps on either side that is
    free there; among paths that have them at both ends the best is found exactly (QTIP's approximation for
    tail-biting trellises).
    """
    length, branches, inner = taken.shape
    before = np.zeros(branches * inner, np.float32)
    low = np.empty((branches, inner), np.float32)
    flat = low.reshape(-1)
    roots = np.sqrt(weights)

    span = min(seam, length // 2)
    for u in range(-span, span):
        target, root = targets[u % length] * roots[u % length], roots[u % length]
        _step(before, values, target, root, low, taken[(u + 1) % length], digits)
        _in_order(flat, before, digits)
    shared = np.argmin(before)
    for t in range(span, 0, -1):
        first = taken[t % length, shared % branches, shared // branches]
        shared = (first * (branches * inner) + shared) // branches

    before[:] = _FORBIDDEN
    before[shared] = 0
    for t in range(length):
        _step(before, values, targets[t] * roots[t], roots[t], low, taken[(t + 1) % length], digits)
        _in_order(flat, before, digits)
    j = shared
    for t in range(length - 1, -1, -1):
        states[t] = taken[(t + 1) % length, j % branches, j // branches] * (branches * inner) + j
        j = states[t] // branches


@_compiled
def _subtract(row: Floats, factor: float, other: Floats) -> None:
    """row -= factor · other."""
    for j in range(len(row)):
        row[j] -= factor * other[j]


@_compiled
def _feed(left: Floats, errors: Floats, factor: Floats, first: int) -> None:
    """Take a block's errors [BLOCK, rows], of columns from `first` on, from the columns behind it."""
    size, rows = errors.shape
    for begin in range(first + size, left.shape[1], REACH):
        end = min(begin + REACH, left.shape[1])
        for t in range(rows):
            for c in range(size):
                _subtract(left[t, begin:end], errors[c, t], factor[first + c, begin:end])


@_compiled
def sweep_strip(
    left: Floats, factor: Floats, scales: Floats, groups: Integers, values: Floats, codes: Bytes,
    found: Floats, digits: Digits, seam: int,
) -> None:  # fmt: skip
    """Code the columns of one tile's rows in turn, each against what the columns before it left over.

    left [rows, columns] is changed in place; factor [columns, columns] is upper triangular; scales [rows,
    groups]; groups [columns]; values and seam as in `encode`. Fills codes [columns, rows] of k bits and found
    [columns, rows], the values that they stand for.
    """
    branches, inner = len(digits), values.shape[1] // len(digits)
    rows, columns = left.shape
    taken = np.empty((rows, branches, inner), np.uint8)
    targets, weights = np.empty(rows, np.float32), np.empty(rows, np.float32)
    states = np.empty(rows, np.int64)
    for first in range(0, columns, BLOCK):
        block = left[:, first : first + BLOCK].T.copy()
        errors = np.empty_like(block)
        for place in range(len(block)):
            c = first + place
            steps = scales[:, groups[c]].copy()
            for t in range(rows):
                targets[t] = block[place, t] / steps[t]
                weights[t] = steps[t] * steps[t]
            weights /= weights.mean()
            encode(targets, weights, values, taken, states, digits, seam)
            for t in range(rows):
                code = states[t] % branches
                value = steps[t] * values[code, states[t] // branches]
                codes[c, t], found[c, t] = code, value
                errors[place, t] = (block[place, t] - value) / factor[c, c]
            for behind in range(place + 1, len(block)):
                _subtract(block[behind], factor[c, first + behind], errors[place])
        _feed(left, errors, factor, first)
