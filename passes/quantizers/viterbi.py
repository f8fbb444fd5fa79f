"""The encoder of trellis codes, compiled by numba: Viterbi's search (1967) in each tile, feedback behind it.

A strip of rows is worked on from its first column to its last by one thread: what comes out does not depend
on how many threads there are. `digits` is (0, …, 2ᵏ − 1): numba compiles a kernel for each length of a tuple,
so the number of branches is a constant and the loops over states become vector instructions.
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
_FORBIDDEN: Final = np.float32(1e30)
# products and sums may be contracted; nothing here depends on NaN or on signed zeros
_FAST: Final = {"contract", "nsz", "arcp"}


def _compiled(function: Any) -> Any:
    return numba.njit(fastmath=_FAST, cache=True)(function)


def _compiled_in_parallel(function: Any) -> Any:
    return numba.njit(parallel=True, fastmath=_FAST, cache=True)(function)


@_compiled
def _lowest(costs: Floats, low: Floats, taken: Bytes, digits: Digits) -> None:
    """The cheapest of the states that lead to the same successors: those with equal last L − k bits.

    costs [b, d, i] is that of the state whose first k bits are d and last k bits are b, i between them.
    low [b, i] is the least over d, and taken [b, i] that d.
    """
    for b in range(len(digits)):
        for i in range(costs.shape[2]):
            best, digit = costs[b, 0, i], np.int32(0)
            for d in range(1, len(digits)):
                cost = costs[b, d, i]
                digit = np.int32(d) if cost < best else digit
                best = cost if cost < best else best
            low[b, i] = best
            taken[b, i] = np.uint8(digit)


@_compiled
def _in_order(low: Floats, ordered: Floats, digits: Digits) -> None:
    """[b, i] to [i, b]."""
    for i in range(ordered.shape[0]):
        for b in range(len(digits)):
            ordered[i, b] = low[b, i]


@_compiled
def _reach(
    costs: Floats, before: Floats, values: Floats, target: float, weight: float, digits: Digits
) -> None:
    """costs [b, j] of the states j·2ᵏ + b: the least before them, before [j], and their own error."""
    for b in range(len(digits)):
        for j in range(costs.shape[1]):
            error = target - values[b, j]
            costs[b, j] = before[j] + weight * error * error


@_compiled
def encode(
    targets: Floats, weights: Floats, values: Floats, taken: Bytes, states: Integers, digits: Digits
) -> None:
    """Fill states [T] with the path that loses least, Σ weight·(target − value)², and bites its tail.

    values [2ᵏ, 2ᴸ⁻ᵏ]: that of state j·2ᵏ + b at [b, j]; taken [T, 2ᵏ, 2ᴸ⁻²ᵏ] is scratch. The L − k bits that
    the first state shares with the last are those of the best path that is free there; among paths that have
    them at both ends the best is found exactly (QTIP's approximation for tail-biting trellises).
    """
    length, branches, inner = taken.shape
    before = np.zeros(branches * inner, np.float32)
    in_rows = before.reshape(inner, branches)
    low = np.empty((branches, inner), np.float32)
    costs = np.empty((branches, branches * inner), np.float32)
    by_digit = costs.reshape(branches, branches, inner)

    span = min(SEAM, length // 2)
    for u in range(-span, span):
        if u > -span:
            _lowest(by_digit, low, taken[u % length], digits)
            _in_order(low, in_rows, digits)
        _reach(costs, before, values, targets[u % length], weights[u % length], digits)
    at = np.argmin(costs)
    state = at % (branches * inner) * branches + at // (branches * inner)
    for t in range(span - 1, 0, -1):
        j = state // branches
        state = taken[t, j % branches, j // branches] * (branches * inner) + j
    seam = state // branches

    before[:] = _FORBIDDEN
    before[seam] = 0
    for t in range(length):
        if t > 0:
            _lowest(by_digit, low, taken[t], digits)
            _in_order(low, in_rows, digits)
        _reach(costs, before, values, targets[t], weights[t], digits)
    _lowest(by_digit, low, taken[0], digits)
    j = seam
    for t in range(length - 1, -1, -1):
        states[t] = taken[(t + 1) % length, j % branches, j // branches] * (branches * inner) + j
        j = states[t] // branches


@_compiled_in_parallel
def sweep_strips(
    left: Floats, factor: Floats, scales: Floats, groups: Integers, values: Floats, bounds: Integers,
    codes: Bytes, found: Floats, digits: Digits,
) -> None:  # fmt: skip
    """Code the columns in turn, each tile against what the columns before it left over.

    left [rows, columns] is changed in place; factor [columns, columns] is upper triangular; scales [rows,
    groups]; groups [columns]; values as in `encode`; bounds [tiles + 1] of the rows. Fills codes [columns,
    rows] of k bits and found [columns, rows], the values that they stand for.
    """
    branches, inner = len(digits), values.shape[1] // len(digits)
    for strip in numba.prange(len(bounds) - 1):
        first, last = bounds[strip], bounds[strip + 1]
        length = last - first
        taken = np.empty((length, branches, inner), np.uint8)
        targets, weights = np.empty(length, np.float32), np.empty(length, np.float32)
        states = np.empty(length, np.int64)
        for c in range(left.shape[1]):
            steps = scales[first:last, groups[c]]
            for t in range(length):
                targets[t] = left[first + t, c] / steps[t]
                weights[t] = steps[t] * steps[t]
            weights /= weights.mean()
            encode(targets, weights, values, taken, states, digits)
            for t in range(length):
                code = states[t] % branches
                value = steps[t] * values[code, states[t] // branches]
                codes[c, first + t], found[c, first + t] = code, value
                error = (left[first + t, c] - value) / factor[c, c]
                for j in range(c + 1, left.shape[1]):
                    left[first + t, j] -= error * factor[c, j]
