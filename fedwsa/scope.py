"""Weight scopes: measure them, compare them, fuse them, and pull weights towards them.

A layer has n weights of mean μ and population variance σ²; a subscript t marks the target. All maths is float64 on the
CPU. The idea is arXiv 2408.12237's; the closed forms of gradient and proximal map are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

LayerPredicate = Callable[[str, Tensor], bool]
VARIANCE_FUSIONS = ("mean", "mixture", "independent", "merged")
SMALLEST_VARIANCE = torch.finfo(torch.float64).tiny
"""A smaller variance counts as zero, because its reciprocal would overflow."""

CLOSE = 0.9
"""Share of the mean square that μ² may have where σ² is taken as the difference of the two: a digit is lost at most."""

_Number = TypeVar("_Number", float, Tensor)


def is_layer(name: str, tensor: Tensor) -> bool:
    """Tell whether a tensor has a weight scope: floating point, two or more dimensions. Any name will do."""
    return tensor.is_floating_point() and tensor.ndim >= 2


@dataclass(frozen=True, slots=True, eq=False)
class WeightScope:
    """Mean and variance of every layer's weights; unitless.

    names: the layers, unique, in a fixed order. means, variances: float64 CPU vectors [L]; variance divides by n, not
    n − 1. A layer that is not finite keeps its values and is degenerate. Scopes are equal if names and numbers are.

    Raises ValueError for other shapes or dtypes, a repeated name, or a negative variance.
    Source: weight scope of arXiv 2408.12237; which tensors count as layers is our choice (`is_layer`).
    """

    names: tuple[str, ...]
    means: Tensor
    variances: Tensor

    def __post_init__(self) -> None:
        for field, vector in (("means", self.means), ("variances", self.variances)):
            if vector.shape != (len(self.names),) or vector.dtype != torch.float64 or vector.device.type != "cpu":
                raise ValueError(
                    f"{field} must be a float64 CPU vector of length {len(self.names)}, one number per name, "
                    f"got {vector.dtype} {list(vector.shape)} on {vector.device}"
                )
        if len(set(self.names)) < len(self.names):
            repeated = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"layer names must be unique, repeated: {repeated}")
        if negative := [name for name, value in zip(self.names, self.variances.tolist(), strict=True) if value < 0]:
            raise ValueError(f"variances must be >= 0, negative in layers {negative}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightScope):
            return NotImplemented
        return (
            self.names == other.names
            and torch.equal(self.means, other.means)
            and torch.equal(self.variances, other.variances)
        )


def moments(tensor: Tensor) -> tuple[float, float]:
    """Mean and population variance of all elements, accumulated in float64; (0, 0) for an empty tensor.

    A constant tensor has variance 0 exactly. NaN or infinite if an element is.
    """
    values = tensor.detach().to("cpu", torch.float64).reshape(-1)
    n = values.numel()
    if n == 0:
        return 0.0, 0.0
    mean, square = values.sum().item() / n, torch.dot(values, values).item() / n
    if mean * mean < CLOSE * square < math.inf:  # else the difference would lose too many digits
        return mean, square - mean * mean
    # Counting from the first element, not from 0, keeps rounding from giving a constant layer a variance.
    deviations = values - values[0]
    shift = deviations.mean()
    deviations -= shift
    return (values[0] + shift).item(), (torch.dot(deviations, deviations) / n).item()


def measure(tensors: Mapping[str, Tensor], is_layer: LayerPredicate = is_layer) -> WeightScope:
    """Scope of the tensors that are layers, in the order of the mapping.

    Give `dict(model.named_parameters())` for a model: a state dict also has buffers, and tied weights twice.
    """
    layers = {name: moments(tensor) for name, tensor in tensors.items() if is_layer(name, tensor)}
    table = torch.tensor(list(layers.values()), dtype=torch.float64).reshape(-1, 2)
    return WeightScope(tuple(layers), table[:, 0].clone(), table[:, 1].clone())


def check_same_layers(scope: WeightScope | Scopes, target: WeightScope | Scopes) -> None:
    """Raise ValueError unless both scopes describe the same layers in the same order."""
    if scope.names == target.names:
        return
    if odd := sorted(set(scope.names) ^ set(target.names)):
        raise ValueError(f"both scopes must describe the same layers, only one of them has {odd}")
    first = next(pair for pair in zip(scope.names, target.names, strict=True) if pair[0] != pair[1])
    raise ValueError(f"both scopes must list their layers in one order, {first[0]!r} stands where {first[1]!r} does")


def degenerate(scope: WeightScope, target: WeightScope) -> Tensor:
    """Layers without a usable Gaussian on either side: σ = 0, as a single weight has, or not finite. Bool [L]."""
    check_same_layers(scope, target)
    return ~(_usable(scope.means, scope.variances) & _usable(target.means, target.variances))


def _usable(means: Tensor, variances: Tensor) -> Tensor:
    return means.isfinite() & variances.isfinite() & (variances >= SMALLEST_VARIANCE)


def kl_divergence(scope: WeightScope, target: WeightScope) -> Tensor:
    """KL(N(μ, σ²) ‖ N(μ_t, σ_t²)) per layer, in nats; zero iff equal; not symmetric; 0 if degenerate. Shape [L].

    ln(σ_t/σ) + (σ² + (μ − μ_t)²)/(2σ_t²) − 1/2
    """
    check_same_layers(scope, target)
    return _kl(scope.means, scope.variances, target)


def _kl(means: Tensor, variances: Tensor, target: WeightScope) -> Tensor:
    """`kl_divergence` for scopes [L] or several at once, [K, L]."""
    usable = _usable(means, variances) & _usable(target.means, target.variances)
    ratio = variances / target.variances
    shift = (means - target.means).square() / target.variances
    return (0.5 * (ratio - 1 - ratio.log() + shift)).masked_fill(~usable, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Scopes:
    """Scopes of K clients that describe the same layers: float64 CPU tensors, means and variances [K, L]."""

    names: tuple[str, ...]
    means: Tensor
    variances: Tensor

    @classmethod
    def of(cls, scopes: Sequence[WeightScope]) -> Scopes:
        """Put them together. Raises ValueError for none, or for unlike layers."""
        if not scopes:
            raise ValueError("at least one scope is needed, got 0 scopes")
        for scope in scopes[1:]:
            check_same_layers(scope, scopes[0])
        means, variances = (
            torch.stack([getattr(scope, field) for scope in scopes]) for field in ("means", "variances")
        )
        return cls(scopes[0].names, means, variances)

    def __len__(self) -> int:
        return len(self.means)


def fuse(
    scopes: Sequence[WeightScope] | Scopes,
    weights: Sequence[float],
    variance: str = "mean",
    merged: WeightScope | None = None,
) -> WeightScope:
    """Fuse K clients' scopes into one: μ̄ = Σ p_k μ_k, with p the weights divided by their sum, and σ̄² by `variance`.

    "mean": Σ p_k σ_k². "mixture": Σ p_k (σ_k² + (μ_k − μ̄)²), the variance of all clients' weights pooled.
    "independent": Σ p_k² σ_k², the variance of the average of independent Gaussians; shrinks about K-fold a round.
    "merged": the scope of the merged model, given as `merged`, is the result; `merged` is not looked at otherwise.

    A layer that is not finite in one scope is not finite in the result, and so degenerate as a target.
    Raises ValueError for no scopes, unlike layers, weights that are not positive and finite, or an unknown `variance`.
    """
    if variance not in VARIANCE_FUSIONS:
        raise ValueError(f"variance must be one of {', '.join(VARIANCE_FUSIONS)}, got {variance!r}")
    shares = _shares(scopes, weights)
    every = scopes if isinstance(scopes, Scopes) else Scopes.of(scopes)
    if variance == "merged":
        if merged is None:
            raise ValueError("variance='merged' needs the scope of the merged model, pass it as merged=")
        check_same_layers(merged, every)
        return merged
    means, variances = (shares * every.means).sum(0), every.variances
    if variance == "mixture":
        variances = variances + (every.means - means).square()
    elif variance == "independent":
        shares = shares.square()
    return WeightScope(every.names, means, (shares * variances).sum(0))


def scope_distance(scopes: Sequence[WeightScope] | Scopes, weights: Sequence[float], fused: WeightScope) -> Tensor:
    """How far the clients are from the fused scope: Σ_k p_k KL(client k ‖ fused) per layer, in nats. Shape [L].

    Weights as for `fuse`, with the same errors.
    """
    shares = _shares(scopes, weights)
    every = scopes if isinstance(scopes, Scopes) else Scopes.of(scopes)
    check_same_layers(every, fused)
    return (shares * _kl(every.means, every.variances, fused)).sum(0)


def _shares(scopes: Sequence[WeightScope] | Scopes, weights: Sequence[float]) -> Tensor:
    """Weights divided by their sum, [K, 1]."""
    if not 0 < len(scopes) == len(weights):
        raise ValueError(
            f"one weight per scope is needed, at least one, got {len(scopes)} scopes, {len(weights)} weights"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights must be positive and finite, got {list(weights)}")
    # Divided by the largest first, so that the sum can't overflow.
    shares = torch.tensor(weights, dtype=torch.float64) / max(weights)
    return (shares / shares.sum()).unsqueeze(1)


def gradient_coefficients(scope: WeightScope, target: WeightScope, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Coefficients (a, b), each [L], of the gradient of the divergence: ∂KL/∂w_i = a + b w_i; (0, 0) if degenerate.

    b = (1/σ_t² − 1/σ²)/n, a = (μ − μ_t)/(n σ_t²) − μ b. sizes: n per layer.
    """
    left_out = degenerate(scope, target)
    a, b = gradient_terms(scope.means, scope.variances, target.means, target.variances, _sizes(scope, sizes))
    return a.masked_fill(left_out, 0), b.masked_fill(left_out, 0)


def proximal_coefficients(
    scope: WeightScope, target: WeightScope, sizes: Sequence[int], c: float
) -> tuple[Tensor, Tensor]:
    """Coefficients (a, b), each [L], of the proximal map: w′ = a + b w minimises ½‖w′ − w‖² + c KL(w′ ‖ target).

    w′ = μ′ + (w − μ) σ′/σ with μ′ = (μ + r μ_t)/(1 + r), r = c/(n σ_t²), and σ′ the positive root of
    (n + c/σ_t²) σ′² − n σ σ′ − c = 0. (0, 1) if degenerate. sizes: n per layer. Raises ValueError unless 0 <= c < ∞.
    """
    if not 0 <= c < math.inf:
        raise ValueError(f"c must be >= 0 and finite, got {c!r}")
    left_out = degenerate(scope, target)
    a, b = proximal_terms(scope.means, scope.variances, target.means, target.variances, _sizes(scope, sizes), c)
    return a.masked_fill(left_out, 0), b.masked_fill(left_out, 1)


def _sizes(scope: WeightScope, sizes: Sequence[int]) -> Tensor:
    if len(sizes) != len(scope.names):
        raise ValueError(f"one size per layer is needed, got {len(sizes)} for {len(scope.names)} layers")
    return torch.tensor(sizes, dtype=torch.float64)


def gradient_terms(
    mean: _Number, variance: _Number, target_mean: _Number, target_variance: _Number, size: _Number
) -> tuple[_Number, _Number]:
    """`gradient_coefficients` without its checks, for numbers or for vectors."""
    b = (1 / target_variance - 1 / variance) / size
    a = (mean - target_mean) / (size * target_variance) - mean * b
    return a, b


def proximal_terms(
    mean: _Number, variance: _Number, target_mean: _Number, target_variance: _Number, size: _Number, c: float
) -> tuple[_Number, _Number]:
    """`proximal_coefficients` without its checks, for numbers or for vectors."""
    # In shares keep + pull = 1 nothing cancels or overflows, however large c is:
    # μ′ = μ + pull (μ_t − μ) and σ′² − keep σ σ′ − pull σ_t² = 0.
    total = size * target_variance + c
    keep, pull = size * target_variance / total, c / total
    std = variance**0.5
    half = 0.5 * keep * std
    b = (half + (half * half + pull * target_variance) ** 0.5) / std
    a = mean + pull * (target_mean - mean) - mean * b
    return a, b
