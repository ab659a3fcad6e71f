"""Units that lie in memory as rows: on the CPU each is measured and written by code that is compiled at its first use.

A call takes two passes where PyTorch takes five and a dozen calls; on one thread. Beside it in this package stands what
does the same elsewhere: on a card, in half precision, or where weights do not lie densely.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fedwsa.aligned.units import Kind, fits, gradient_of, in_memory_order, terms_of
from fedwsa.divergence import usable
from fedwsa.scope import CLOSE

Values = NDArray[np.float32] | NDArray[np.float64]
Numbers = NDArray[np.float64]

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """What is compiled for the types that it is called with; NaN and ∞ stay what they are."""
    make = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
    return cast("Function", make(function))


class Rows:
    """A layer's units, float32 or float64 [C, n], and their targets."""

    def __init__(self, weights: Tensor, means: Sequence[float], variances: Sequence[float], kind: Kind) -> None:
        self._weights, self._kind = weights, kind
        # Of each unit μ_t, σ_t², and whether the last pull has left it alone.
        self._goals = np.array([means, variances, [0.0] * len(means)])
        self._find()

    @property
    def left(self) -> Tensor:
        """Those that the last pull has left alone, bool [C]."""
        return torch.from_numpy(self._goals[2] > 0)

    def _find(self) -> None:
        weights = self._weights
        self._place = weights.data_ptr(), weights.shape, weights.stride(), weights.dtype
        self._values, self._largest = rows_of(weights, self._goals.shape[1]), torch.finfo(weights.dtype).max
        self._pull = _pulling(self._kind)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process and these weights' memory."""
        return {key: self.__dict__[key] for key in ("_weights", "_kind", "_goals")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._find()

    def pull(self, s: float, into_gradient: bool) -> int | None:
        """Add what the terms say to each row, or to its gradient; how many were left alone.

        None, and nothing is done, where weights or gradient are not what there is compiled code for.
        """
        weights = self._weights
        if self._place != (weights.data_ptr(), weights.shape, weights.stride(), weights.dtype):
            self._find()
        if self._values is None:
            return None
        if not into_gradient:
            number = self._pull(None, self._values, self._goals, s, self._largest)
            if number < len(self._values):
                increment_version(weights)
            return number
        fresh = weights.grad is None
        gradient = gradient_of(weights)
        target = rows_beside(gradient, weights, len(self._values))
        if target is None:
            return None
        number = self._pull(target, self._values, self._goals, s, self._largest)
        if number < len(target):
            increment_version(gradient)
        elif fresh:
            weights.grad = None
        return number


def rows_of(tensor: Tensor, count: int) -> Values | None:
    """The elements in the order in which they lie, [count, n], shared; None if there is no compiled code for such."""
    if tensor.dtype not in (torch.float32, torch.float64) or type(tensor) not in (Tensor, nn.Parameter):
        return None
    ordered = in_memory_order(tensor.detach())
    if not (ordered.is_cpu and ordered.is_contiguous() and ordered.numel()) or ordered.is_neg():
        return None
    rows: Values = ordered.view(count, -1).numpy()
    return rows


def rows_beside(gradient: Tensor, weights: Tensor, count: int) -> Values | None:
    """As `rows_of`, of a tensor whose elements lie as the weights do; None too if they do not."""
    alike = gradient.stride() == weights.stride() and gradient.dtype == weights.dtype
    return rows_of(gradient, count) if alike else None


@compiled
def moments(row: Values) -> tuple[float, float]:
    """As `fedwsa.scope.moments`, of one element at least."""
    n = len(row)
    total, squares = 0.0, 0.0
    for i in range(n):
        w = np.float64(row[i])
        total += w
        squares += w * w
    mean, square = total / n, squares / n
    if mean * mean < CLOSE * square < np.inf:
        return mean, square - mean * mean
    first = np.float64(row[0])
    total, squares = 0.0, 0.0
    for i in range(n):
        total += row[i] - first
    shift = total / n
    for i in range(n):
        deviation = (row[i] - first) - shift
        squares += deviation * deviation
    return first + shift, squares / n


@compiled
def in_dtype(row: Values, mean: float, a: float, b: float) -> tuple[Any, Any, Any]:
    """The same a + b (w − mean) with numbers of the row's dtype; a takes what the mean is rounded by."""
    dtype = row.dtype.type
    origin = dtype(mean)
    return origin, dtype(a + b * (np.float64(origin) - mean)), dtype(b)


@compiled
def move(row: Values, mean: float, std: float, a: float, b: float) -> None:
    """Add a + b (w − mean) to the weights; std: their σ.

    A long way goes in double precision, in single it would cancel.
    """
    if abs(a) > std or abs(b) > 0.5:
        for i in range(len(row)):
            row[i] += a + b * (row[i] - mean)
        return
    origin, constant, slope = in_dtype(row, mean, a, b)
    for i in range(len(row)):
        row[i] += constant + slope * (row[i] - origin)


@compiled
def add(row: Values, weights: Values, mean: float, a: float, b: float) -> None:
    """Add a + b (w − mean) to other numbers, whose memory is not a part of the weights'."""
    origin, constant, slope = in_dtype(weights, mean, a, b)
    for i in range(len(row)):
        row[i] += constant + slope * (weights[i] - origin)


@cache
def _pulling(kind: Kind) -> Callable[..., int]:
    terms, there_is, fit = terms_of(kind, compiled), compiled(usable), compiled(fits)

    @compiled
    def pull(gradient: Values | None, values: Values, goals: Numbers, s: float, largest: float) -> int:
        number, (count, n) = 0, values.shape
        for c in range(count):
            mean, variance = moments(values[c])
            target_mean, target_variance = goals[0, c], goals[1, c]
            a, b = terms(variance, target_mean - mean, target_variance, float(n), s)
            ready = there_is(mean, variance) and there_is(target_mean, target_variance)
            left = not (ready and fit(largest, mean, variance, float(n), a, b, gradient is None))
            goals[2, c] = left
            number += left
            if left:
                continue
            if gradient is None:
                move(values[c], mean, math.sqrt(variance), a, b)
            else:
                add(gradient[c], values[c], mean, a, b)
        return number

    return pull
