"""Loops over a model's numbers that every client and every reply goes through, compiled by Numba.

One pass, with nothing written that the processor's cache would have to make room for: of a client of a millisecond
NumPy's and PyTorch's several passes take a third. The machine code is kept on disk where Numba finds a folder for it
(`__pycache__`, or one of the user's), and made anew when this file changes: what stands in another file must not be
called from here.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
types: Any = numba.types
Rows = tuple[NDArray[np.float32], ...]

SINGLE, DOUBLE = (types.Array(kind, 1, "C", readonly=True) for kind in (types.float32, types.float64))  # only read
SUMS = types.float64[::1]


def _compiled(*signatures: Any, **options: Any) -> Callable[[Function], Function]:
    """All types are named here, so that processes that compile at the same time write the same files."""

    def compile_(function: Function) -> Function:
        options.update(nogil=True, error_model="numpy")
        try:
            made = numba.njit(list(signatures), cache=True, **options)(function)
        except (RuntimeError, OSError):  # no folder, or one that takes no file
            made = numba.njit(list(signatures), **options)(function)
        return cast("Function", made)

    return compile_


@_compiled(
    types.UniTuple(types.float64, 2)(SINGLE),
    types.UniTuple(types.float64, 2)(DOUBLE),
    fastmath={"reassoc", "contract"},  # NaN and ∞ stay what they are
)
def moments(row: NDArray[np.float32] | NDArray[np.float64]) -> tuple[float, float]:
    """Mean and population variance of one element or more, see `fedwsa.scope.moments`."""
    n = len(row)
    total, squares = 0.0, 0.0
    for i in range(n):
        w = np.float64(row[i])
        total += w
        squares += w * w
    mean, square = total / n, squares / n
    if mean * mean < 0.9 * square < np.inf:  # else the difference would lose more than a digit
        return mean, square - mean * mean
    # Counting from the first element, not from 0, keeps rounding from giving a constant layer a variance.
    first = np.float64(row[0])
    total, squares = 0.0, 0.0
    for i in range(n):
        total += row[i] - first
    shift = total / n
    for i in range(n):
        deviation = (row[i] - first) - shift
        squares += deviation * deviation
    return first + shift, squares / n


@_compiled(types.void(SUMS, types.UniTuple(SINGLE, 2), SUMS))
def sum_of_2(total: NDArray[np.float64], rows: Rows, weights: NDArray[np.float64]) -> None:
    """total = Σ_k weights_k · rows_k in float64, added in pairs, each product and each sum rounded."""
    a, b = rows
    for i in range(len(total)):
        total[i] = a[i] * weights[0] + b[i] * weights[1]


@_compiled(types.void(SUMS, types.UniTuple(SINGLE, 8), SUMS))
def sum_of_8(total: NDArray[np.float64], rows: Rows, weights: NDArray[np.float64]) -> None:
    """As `sum_of_2`."""
    a, b, c, d, e, f, g, h = rows
    for i in range(len(total)):
        one = (a[i] * weights[0] + b[i] * weights[1]) + (c[i] * weights[2] + d[i] * weights[3])
        other = (e[i] * weights[4] + f[i] * weights[5]) + (g[i] * weights[6] + h[i] * weights[7])
        total[i] = one + other


@_compiled(types.boolean(SINGLE), fastmath={"reassoc"})
def all_finite(row: NDArray[np.float32]) -> bool:
    """Whether no element is NaN or infinite."""
    zeros = np.float32(0.0)
    for i in range(len(row)):
        zeros += row[i] * np.float32(0.0)  # NaN for those
    return bool(zeros == 0.0)
