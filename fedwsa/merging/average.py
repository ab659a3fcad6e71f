"""Weighted average of state dicts, summed in float64."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Weighted average Σ p_k θ_k of models that have the same tensors; p = weights / Σ weights.

    Sums run in float64 and in the order given; every tensor comes back in its own type and shares no memory with the
    models. Integer tensors are averaged in float64 and rounded to the nearest (halves to even); bool tensors are the
    first model's.

    states: one or more. weights: finite, ≥ 0, not all 0; None weighs all alike.
    Raises ValueError where names, shapes or types differ, and names the odd ones.
    """
    if not states:
        raise ValueError("average needs at least one model, got none")
    check_alike(states)
    shares = shares_of([1.0] * len(states) if weights is None else weights, len(states))
    return {name: _average([state[name] for state in states], shares) for name in states[0]}


def check_alike(states: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise ValueError unless all models have the first one's tensor names, shapes and types."""
    first = states[0]
    for index, state in enumerate(states[1:], start=1):
        if odd := first.keys() ^ state.keys():
            raise ValueError(
                f"model {index}: tensor names differ from model 0's: {sorted(odd)}; merge one architecture"
            )
        if unlike := [name for name in first if _kind(first[name]) != _kind(state[name])]:
            kinds = ", ".join(f"{name} {_kind(state[name])} instead of {_kind(first[name])}" for name in unlike)
            raise ValueError(f"model {index}: shapes or types differ from model 0's: {kinds}; merge one architecture")


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def shares_of(weights: Sequence[float], count: int) -> list[float]:
    """Weights divided by their sum; ValueError unless there are `count`, finite, ≥ 0 and not all 0."""
    if len(weights) != count:
        raise ValueError(f"weights must be one per model: got {len(weights)} for {count} models")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ValueError(f"weights must be finite, >= 0 and not all 0, got {list(weights)}")
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _average(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    first = tensors[0].detach()
    if first.dtype == torch.bool:
        return first.clone()
    total = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float64))
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.detach(), alpha=share)
    if not (first.is_floating_point() or first.is_complex()):
        total.round_()
    return total.to(first.dtype)
