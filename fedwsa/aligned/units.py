"""What the units of every granularity share."""

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from fedwsa.divergence import divergence_of
from fedwsa.scope import WeightScope

Terms = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]
"""Of a unit's σ², μ_t − μ, σ_t², n and a strength it makes (a, b): what is added to w, or its gradient: a + b (w − μ).

Counted from μ nothing cancels, however far μ is from 0.
"""

Kind = tuple[str, str]
"""Names of a divergence and a mode."""

Report = Callable[[list[str]], None]

Held = set[int] | None
"""Ids of the parameters that are to be written; None: all. Frozen parameters are never written."""

LEAST = {dtype: torch.finfo(dtype).tiny / torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
"""Variances below which the squares of some weights lose digits to underflow, by the dtype that they are made in."""


class Units(Protocol):
    """What `UNITS` holds: made of the target's parameters, the target, the kind, and whom to tell of degenerate units.

    What they are told to add is what the terms make of s, which is negative to descend.
    """

    def __init__(self, parameters: Mapping[str, Tensor], target: WeightScope, kind: Kind, report: Report) -> None: ...

    def pull(self, s: float, held: Held, into_gradient: bool) -> None:
        """Add to the weights, or to `.grad`, which is made where there is none."""


@cache
def terms_of(kind: Kind, made: Callable[[Any], Any] = lambda formula: formula) -> Terms:
    """Loss mode: s times the gradient. Proximal mode: what the proximal map changes, c = s.

    made: what each formula goes through; they are plain enough to be compiled.
    """
    divergence, mode = kind
    row = divergence_of(divergence, mode)
    formula: Any = made(row.gradient if mode == "loss" else row.proximal)

    def loss(variance: Any, apart: Any, target_variance: Any, size: Any, s: Any) -> tuple[Any, Any]:
        a, b = formula(0.0, variance, apart, target_variance, size)
        return s * a, s * b

    def step(variance: Any, apart: Any, target_variance: Any, size: Any, s: Any) -> tuple[Any, Any]:
        a, b = formula(0.0, variance, apart, target_variance, size, s)
        return a, b - 1

    terms: Terms = made(loss if mode == "loss" else step)
    return terms


def fits(largest: float, mean: float, variance: float, size: float, a: float, b: float, moves: bool) -> bool:
    """Tell whether b and a + b (w − μ) are finite in a dtype, and w moved by it: no |w − μ| is more than √(n σ²)."""
    reach = math.sqrt(size * variance)
    return abs(a) + abs(b) * max(1.0, reach) + (abs(mean) + reach if moves else 0.0) <= largest


def is_written(weights: Tensor, held: Held) -> bool:
    """Tell whether a parameter trains and is held."""
    return weights.requires_grad and (held is None or id(weights) in held)


def gradient_of(weights: Tensor) -> Tensor:
    """`.grad`, made where there is none. Raises ValueError if it is sparse."""
    if weights.grad is None:
        weights.grad = torch.zeros_like(weights)
    elif weights.grad.is_sparse:
        raise ValueError("mode='loss' cannot join a sparse gradient, since the term's is dense; use mode='proximal'")
    return weights.grad


def lies_channels_last(weights: Tensor) -> bool:
    """Tell whether they are, or may be, in the order [out, height, width, in]."""
    return weights.ndim == 4 and not weights.is_contiguous()


def in_memory_order(weights: Tensor) -> Tensor:
    """The weights with the dimensions in the order in which they lie: only then does flattening copy nothing."""
    return weights.permute(0, 2, 3, 1) if lies_channels_last(weights) else weights


def single(dtype: torch.dtype) -> torch.dtype:
    """The dtype to add up in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
