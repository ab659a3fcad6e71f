"""How far a layer's Gaussian N(μ, σ²) is from the target's N(μ_t, σ_t²): three divergences, each with closed forms.

Every one is zero iff both are equal, does not change when all means are shifted alike, and has a gradient that is
affine in the layer's n weights. To add one: its functions and a line in `DIVERGENCES`. Forward KL is that of arXiv
2408.12237; the other two, the closed forms and the proximal maps are ours.
"""

import math
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


class Value(Protocol):
    """Type of a divergence's value."""

    def __call__(self, mean: Tensor, variance: Tensor, target_mean: Tensor, target_variance: Tensor) -> Tensor:
        """Divergence of layers; vectors [L], or one side [K, L]."""


class Gradient(Protocol):
    """Type of a divergence's gradient, for numbers or vectors."""

    def __call__(
        self, mean: Number, variance: Number, target_mean: Number, target_variance: Number, size: Number
    ) -> tuple[Number, Number]:
        """(a, b) with ∂D/∂w_i = a + b w_i; size: n."""


class Proximal(Protocol):
    """Type of a divergence's proximal map, for numbers or vectors."""

    def __call__(
        self, mean: Number, variance: Number, target_mean: Number, target_variance: Number, size: Number, c: float
    ) -> tuple[Number, Number]:
        """(a, b) with w′ = a + b w the minimiser of ½‖w′ − w‖² + c D(w′); size: n, 0 <= c < ∞."""


class Curvature(Protocol):
    """Type of a divergence's curvature."""

    def __call__(self, target_variance: float, size: float) -> float:
        """Half the largest eigenvalue of ∂²D/∂w² at the target, which bounds the step of gradient descent."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """A row of `DIVERGENCES`. proximal: None where it has no closed form. name: in the config."""

    name: str
    value: Value
    gradient: Gradient
    proximal: Proximal | None
    curvature: Curvature
    curved: str  # the formula of the curvature's reciprocal, for messages


def kl_value(mean: Tensor, variance: Tensor, target_mean: Tensor, target_variance: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(μ_t, σ_t²)) = ln(σ_t/σ) + (σ² + (μ − μ_t)²)/(2σ_t²) − 1/2, in nats."""
    ratio = variance / target_variance
    shift = (mean - target_mean).square() / target_variance
    return 0.5 * (ratio - 1 - ratio.log() + shift)


def kl_gradient(
    mean: Number, variance: Number, target_mean: Number, target_variance: Number, size: Number
) -> tuple[Number, Number]:
    """b = (1/σ_t² − 1/σ²)/n, a = (μ − μ_t)/(n σ_t²) − μ b."""
    b = (1 / target_variance - 1 / variance) / size
    a = (mean - target_mean) / (size * target_variance) - mean * b
    return a, b


def kl_proximal(
    mean: Number, variance: Number, target_mean: Number, target_variance: Number, size: Number, c: float
) -> tuple[Number, Number]:
    """w′ = μ′ + (w − μ) σ′/σ, μ′ = (μ + r μ_t)/(1 + r), r = c/(n σ_t²), and σ′ > 0 of (n + c/σ_t²)σ′² − nσσ′ = c."""
    # In shares keep + pull = 1 nothing cancels or overflows, however large c is:
    # μ′ = μ + pull (μ_t − μ) and σ′² − keep σ σ′ − pull σ_t² = 0.
    total = size * target_variance + c
    keep, pull = size * target_variance / total, c / total
    std = variance**0.5
    half = 0.5 * keep * std
    b = (half + (half * half + pull * target_variance) ** 0.5) / std
    a = mean + pull * (target_mean - mean) - mean * b
    return a, b


def reverse_kl_value(mean: Tensor, variance: Tensor, target_mean: Tensor, target_variance: Tensor) -> Tensor:
    """KL(N(μ_t, σ_t²) ‖ N(μ, σ²)) = ln(σ/σ_t) + (σ_t² + (μ − μ_t)²)/(2σ²) − 1/2, in nats."""
    return kl_value(target_mean, target_variance, mean, variance)


def reverse_kl_gradient(
    mean: Number, variance: Number, target_mean: Number, target_variance: Number, size: Number
) -> tuple[Number, Number]:
    """b = (1 − (σ_t² + (μ − μ_t)²)/σ²)/(n σ²), a = (μ − μ_t)/(n σ²) − μ b."""
    shift = mean - target_mean
    b = (1 - (target_variance + shift * shift) / variance) / (size * variance)
    a = shift / (size * variance) - mean * b
    return a, b


def wasserstein_value(mean: Tensor, variance: Tensor, target_mean: Tensor, target_variance: Tensor) -> Tensor:
    """W2² = (μ − μ_t)² + (σ − σ_t)², the squared 2-Wasserstein distance of the Gaussians, in squared weights."""
    return (mean - target_mean).square() + (variance.sqrt() - target_variance.sqrt()).square()


def wasserstein_gradient(
    mean: Number, variance: Number, target_mean: Number, target_variance: Number, size: Number
) -> tuple[Number, Number]:
    """b = 2 (1 − σ_t/σ)/n, a = 2 (μ − μ_t)/n − μ b."""
    b = 2 * (1 - (target_variance / variance) ** 0.5) / size
    a = 2 * (mean - target_mean) / size - mean * b
    return a, b


def wasserstein_proximal(
    mean: Number, variance: Number, target_mean: Number, target_variance: Number, size: Number, c: float
) -> tuple[Number, Number]:
    """μ′ = (n μ + 2c μ_t)/(n + 2c) and σ′ = (n σ + 2c σ_t)/(n + 2c)."""
    # As shares, so that 2c cannot overflow.
    total = 0.5 * size + c
    keep, pull = 0.5 * size / total, c / total
    b = keep + pull * (target_variance / variance) ** 0.5
    a = mean + pull * (target_mean - mean) - mean * b
    return a, b


def _kl_curvature(target_variance: float, size: float) -> float:
    return 1 / (size * target_variance)  # ∂²/∂σ² = 2/σ_t² at σ = σ_t either way round, and σ moves by 1/√n


def _wasserstein_curvature(target_variance: float, size: float) -> float:
    return 1 / size


DIVERGENCES = {
    row.name: row
    for row in (
        Divergence("forward-kl", kl_value, kl_gradient, kl_proximal, _kl_curvature, "nσ_t²"),
        Divergence("reverse-kl", reverse_kl_value, reverse_kl_gradient, None, _kl_curvature, "nσ_t²"),
        Divergence(
            "wasserstein", wasserstein_value, wasserstein_gradient, wasserstein_proximal, _wasserstein_curvature, "n"
        ),
    )
}


def divergence_of(name: str, mode: str = "loss") -> Divergence:
    """The row of that name. Raises ValueError if there is none, or none that the mode (`loss`, `proximal`) can use."""
    if name not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {name!r}")
    row = DIVERGENCES[name]
    if mode == "proximal" and row.proximal is None:
        able = ", ".join(each.name for each in DIVERGENCES.values() if each.proximal)
        raise ValueError(f"divergence {name!r} has no proximal map in closed form; allowed is mode 'loss', or {able}")
    return row


SMALLEST_VARIANCE = torch.finfo(torch.float64).tiny
"""A smaller variance counts as zero, because its reciprocal would overflow."""


def usable(mean: float, variance: float) -> bool:
    """Tell whether there is a Gaussian: σ > 0, both finite."""
    return math.isfinite(mean) and SMALLEST_VARIANCE <= variance < math.inf


def usable_mask(means: Tensor, variances: Tensor) -> Tensor:
    """`usable` for vectors."""
    return means.isfinite() & variances.isfinite() & (variances >= SMALLEST_VARIANCE)
