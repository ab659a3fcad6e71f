"""What the units of every granularity share."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fedwsa.scope import WeightScope

Terms = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]
"""Of a unit's mean, variance, target mean, target variance and n it makes (a, b), and the update is a + b w."""

Report = Callable[[list[str]], None]

Held = set[int] | None
"""Ids of the parameters that are to be written; None: all. Frozen parameters never are."""

LEAST = {dtype: torch.finfo(dtype).tiny / torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
"""Variances below which the squares of some weights lose digits to underflow, by the dtype that they are made in."""


class Units(Protocol):
    """What `UNITS` holds: made of the target's parameters, the target, and whom to tell of degenerate units."""

    def __init__(self, parameters: Mapping[str, Tensor], target: WeightScope, report: Report) -> None: ...

    def add_gradient(self, terms: Terms, held: Held = None) -> None:
        """Add a + b w to `.grad`, which is made where there is none."""

    def move(self, terms: Terms, held: Held = None) -> None:
        """Replace w by a + b w."""


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
