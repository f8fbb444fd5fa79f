"""The inner loops of quantizing, compiled by numba: rows don't interact, so they run in parallel.

Each row is worked on from end to end while it is in the cache; its result does not depend on how many
threads there are or which rows are quantized with it.
"""

from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

# sums may be reordered (they vectorize); nothing here depends on NaN or on signed zeros
_FAST: Final = {"reassoc", "contract", "nsz", "arcp"}


def _compiled(function: Any) -> Any:
    return numba.njit(parallel=True, fastmath=_FAST, cache=True)(function)


@_compiled
def best_grids(weight: Floats, importance: Floats, scales: Floats, zeros: Floats, levels: float) -> Integers:
    """Which of the offered grids loses least for each group.

    weight [n, size] are groups; importance [groups, size] repeats over them; scales and zeros
    [n, offers]. Returns indices [n]; of equals the first.
    """
    n, size = weight.shape
    best = np.zeros(n, np.int64)
    for r in numba.prange(n):
        shares = importance[r % importance.shape[0]]
        least = np.float32(np.inf)
        for offer in range(scales.shape[1]):
            scale, zero = scales[r, offer], zeros[r, offer]
            inverse = np.float32(1.0) / scale
            low, high = -zero, np.float32(levels) - zero
            error = np.float32(0.0)
            for j in range(size):
                code = np.rint(weight[r, j] * inverse)
                code = min(max(code, low), high)
                lost = code * scale - weight[r, j]
                error += lost * lost * shares[j]
            if error < least:
                least, best[r] = error, offer
    return best


@_compiled
def sweep_block(
    left: Floats, codes: Floats, errors: Floats, factor: Floats, scales: Floats, zeros: Floats,
    dither: Floats, groups: Integers, levels: float, start: int, end: int,
) -> None:  # fmt: skip
    """Round columns start … end of each row in turn, each making up for those before it.

    left, codes [rows, columns] are changed in place, errors [rows, end - start] is filled;
    factor [columns, columns] is upper triangular; scales and zeros [rows, groups]; groups [columns];
    dither, in steps, is added before rounding: [rows, columns], or [1, columns] for all rows.
    """
    for r in numba.prange(left.shape[0]):
        for i in range(start, end):
            scale, zero = scales[r, groups[i]], zeros[r, groups[i]]
            steps = left[r, i] / scale + dither[r % dither.shape[0], i]
            code = min(max(np.rint(steps) + zero, np.float32(0.0)), np.float32(levels))
            error = (left[r, i] - (code - zero) * scale) / factor[i, i]
            codes[r, i] = code
            errors[r, i - start] = error
            for j in range(i + 1, end):
                left[r, j] -= error * factor[i, j]


@_compiled
def descend(
    codes: Floats, slopes: Doubles, gram: Doubles, scales: Floats, groups: Integers, order: Integers,
    levels: float, passes: int,
) -> None:  # fmt: skip
    """Move each code in turn to where the whole error is least, the others as they are.

    codes [rows, columns] and slopes = Δ G [rows, columns] are changed in place; gram [columns, columns];
    scales [rows, groups]; groups [columns]; order: the columns, as they are visited.
    """
    for r in numba.prange(codes.shape[0]):
        for _ in range(passes):
            moved = False
            for i in order:
                if gram[i, i] <= 0.0:
                    continue
                scale = scales[r, groups[i]]
                code = np.rint(codes[r, i] - slopes[r, i] / (gram[i, i] * scale))
                step = (min(max(code, 0.0), levels) - codes[r, i]) * scale
                if step != 0.0:
                    moved = True
                    codes[r, i] += np.rint(step / scale)
                    for j in range(slopes.shape[1]):
                        slopes[r, j] += step * gram[i, j]
            if not moved:
                break


@_compiled
def sweep_levels(
    left: Floats, codes: Floats, errors: Floats, factor: Floats, levels: Floats, groups: Integers,
    start: int, end: int,
) -> None:  # fmt: skip
    """`sweep_block` for levels that are no grid: levels [rows, groups, n], of equals the first."""
    for r in numba.prange(left.shape[0]):
        for i in range(start, end):
            offered = levels[r, groups[i]]
            nearest, least = 0, np.float32(np.inf)
            for n in range(offered.shape[0]):
                distance = abs(left[r, i] - offered[n])
                if distance < least:
                    nearest, least = n, distance
            error = (left[r, i] - offered[nearest]) / factor[i, i]
            codes[r, i] = nearest
            errors[r, i - start] = error
            for j in range(i + 1, end):
                left[r, j] -= error * factor[i, j]


@_compiled
def sweep_masked(
    left: Floats, became: Floats, keep: Booleans, errors: Floats, factor: Floats, importance: Floats,
    scales: Floats, groups: Integers, levels: int, choose: Booleans, start: int, end: int,
) -> None:  # fmt: skip
    """`sweep_block` for weights of which some are kept and the others become zero.

    left [rows, columns] is changed in place, became [rows, columns] is what weights become. Where choose
    [rows], keep [rows, columns] is filled: of each four the two largest |left| · importance [columns], of
    equals the first; start and end are multiples of 4 then. Codes are symmetric, from -(levels + 1) / 2 on;
    with levels 0 nothing is rounded.
    """
    half = (levels + 1) // 2
    for r in numba.prange(left.shape[0]):
        for i in range(start, end):
            if choose[r] and i % 4 == 0:
                for j in range(i, i + 4):
                    score, above = abs(left[r, j]) * importance[j], 0
                    for k in range(i, i + 4):
                        other = abs(left[r, k]) * importance[k]
                        above += other > score or (other == score and k < j)
                    keep[r, j] = above < 2
            value = np.float32(0.0)
            if keep[r, i]:
                value = left[r, i]
                if levels > 0:
                    scale = scales[r, groups[i]]
                    code = min(max(np.rint(value / scale), np.float32(-half)), np.float32(half - 1))
                    value = code * scale
            became[r, i] = value
            error = (left[r, i] - value) / factor[i, i]
            errors[r, i - start] = error
            for j in range(i + 1, end):
                left[r, j] -= error * factor[i, j]
