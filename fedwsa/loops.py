"""Loops over a model's numbers that every client and every reply goes through, compiled by Numba; see `fedwsa.warmup`.

One pass each, with nothing written that the processor's cache would have to make room for: NumPy's several passes take
a fifth of the time of a client that takes a millisecond. The machine code is kept on disk where Numba finds a folder
for it (`__pycache__`, or one of the user's), and made anew when this file changes: what stands in another file must not
be called from here.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
types: Any = numba.types
Rows = tuple[NDArray[np.float32], ...]

SINGLE = types.Array(types.float32, 1, "C", readonly=True)  # only read
DOUBLE = types.float64[::1]


def _compiled(signature: Any, **options: Any) -> Callable[[Function], Function]:
    """The types are named here, so that processes that compile at the same time write the same files."""

    def compile_(function: Function) -> Function:
        options.update(nogil=True, error_model="numpy")
        try:
            made = numba.njit(signature, cache=True, **options)(function)
        except Exception:  # no folder, one that takes no file, or a damaged file
            made = numba.njit(signature, **options)(function)
        return cast("Function", made)

    return compile_


@_compiled(types.UniTuple(types.float64, 2)(SINGLE, types.int64))
def sums(row: NDArray[np.float32], lanes: int) -> tuple[float, float]:
    """Σ w and Σ w² in float64: the i-th number goes to sum i mod `lanes`, a power of two; halves of these are added."""
    totals, squares = np.zeros(lanes), np.zeros(lanes)
    for start in range(0, len(row), lanes):
        some = row[start : start + lanes]
        for i in range(len(some)):
            w = np.float64(some[i])
            totals[i] += w
            squares[i] += w * w
    half = lanes // 2
    while half:
        for i in range(half):
            totals[i] += totals[half + i]
            squares[i] += squares[half + i]
        half //= 2
    return totals[0], squares[0]


@_compiled(types.void(DOUBLE, types.UniTuple(SINGLE, 2), DOUBLE))
def sum_of_2(total: NDArray[np.float64], rows: Rows, weights: NDArray[np.float64]) -> None:
    """total = Σ_k weights_k · rows_k in float64, added in pairs, each product and each sum rounded."""
    a, b = rows
    for i in range(len(total)):
        total[i] = a[i] * weights[0] + b[i] * weights[1]


@_compiled(types.void(DOUBLE, types.UniTuple(SINGLE, 4), DOUBLE))
def sum_of_4(total: NDArray[np.float64], rows: Rows, weights: NDArray[np.float64]) -> None:
    """As `sum_of_2`."""
    a, b, c, d = rows
    for i in range(len(total)):
        total[i] = (a[i] * weights[0] + b[i] * weights[1]) + (c[i] * weights[2] + d[i] * weights[3])


@_compiled(types.void(DOUBLE, types.UniTuple(SINGLE, 8), DOUBLE))
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
