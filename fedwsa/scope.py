"""Weight scopes: measure them, compare them, fuse them, and pull weights towards them.

A layer has n weights of mean μ and population variance σ²; a subscript t marks the target. All maths is float64 on the
CPU. The idea is arXiv 2408.12237's; the closed forms of gradient and proximal map (`fedwsa.divergence`) are ours. What
is said of layers holds for channels or the whole model alike, where these are the units (`fedwsa.granularity`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedwsa.divergence import divergence_of, usable_mask
from fedwsa.granularity import units
from fedwsa.warmup import loops_for

LayerPredicate = Callable[[str, Tensor], bool]
T = TypeVar("T")
LANES = 1024  # sums that `moments` makes side by side, a power of two
VARIANCE_FUSIONS = ("mean", "mixture", "independent", "merged")

CLOSE = 0.9
"""Share of the mean square that μ² may have where σ² is taken as the difference of the two: a digit is lost at most."""


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

    def only(self, names: Sequence[str]) -> WeightScope:
        """That of some of the layers, in this order. Raises KeyError for a layer that is not there."""
        kept = _positions(self.names, names)
        return WeightScope(tuple(names), self.means[kept], self.variances[kept])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightScope):
            return NotImplemented
        return (
            self.names == other.names
            and torch.equal(self.means, other.means)
            and torch.equal(self.variances, other.variances)
        )


def _positions(names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    position = {name: i for i, name in enumerate(names)}
    return [position[name] for name in wanted]


def moments(tensor: Tensor) -> tuple[float, float]:
    """Mean and population variance of all elements, accumulated in float64; (0, 0) for an empty tensor.

    A constant tensor has variance 0 exactly. NaN or infinite if an element is.
    """
    n = tensor.numel()
    if n == 0:
        return 0.0, 0.0
    values = tensor.detach().cpu()
    if values.dtype != torch.float32:
        values = values.to(torch.float64)
    if type(values) is not Tensor:  # a subclass shows no numbers
        variance_of, mean_of = torch.var_mean(values.to(torch.float64), correction=0)
        return mean_of.item(), variance_of.item()
    row = np.ascontiguousarray(values.numpy(force=True)).reshape(-1)
    total, squares = _sums(row)
    mean, square = total / n, squares / n
    if mean * mean < CLOSE * square < math.inf:  # else the difference would lose too many digits
        return mean, square - mean * mean
    # Counting from the first element, not from 0, keeps rounding from giving a constant layer a variance.
    first = float(row[0])
    with np.errstate(all="ignore"):  # of what is not finite
        deviations = row.astype(np.float64) - first
        shift = float(deviations.mean())
        deviations -= shift
        return first + shift, float(np.square(deviations).mean())


def _sums(row: NDArray[Any]) -> tuple[float, float]:
    """Σ w and Σ w² in float64: each the sum of LANES sums, in one order whoever makes these."""
    if loops := loops_for(row):
        total, squares = loops.sums(row, LANES)
        return float(total), float(squares)
    values = np.zeros(-(-row.size // LANES) * LANES)
    with np.errstate(all="ignore"):  # of what is not finite
        values[: row.size] = row
        lanes = values.reshape(-1, LANES)
        return _in_halves(lanes), _in_halves(np.multiply(lanes, lanes, out=lanes))


def _in_halves(lanes: NDArray[np.float64]) -> float:
    total = np.add.reduce(lanes, 0, initial=0.0)
    while len(total) > 1:
        total = total[: len(total) // 2] + total[len(total) // 2 :]
    return float(total[0])


def channel_moments(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance for each index of the first dimension, float64 [C] on the tensor's device.

    As `moments`: a constant channel has variance 0 exactly, an empty one (0, 0).
    """
    if not tensor.numel():
        return tuple(torch.zeros(2, len(tensor), dtype=torch.float64, device=tensor.device))
    rows = tensor.detach().to(torch.float64).reshape(len(tensor), -1)
    deviations = rows - rows[:, :1]
    shift = deviations.mean(1, keepdim=True)
    return (rows[:, :1] + shift).squeeze(1), (deviations - shift).square().mean(1)


def measure(
    tensors: Mapping[str, Tensor], is_layer: LayerPredicate = is_layer, granularity: str = "layer"
) -> WeightScope:
    """Scope of the tensors that are layers, in the order of the mapping; of their channels, or of all of them as one.

    Give `dict(model.named_parameters())` for a model: a state dict also has buffers, and tied weights twice.
    Raises ValueError for an unknown granularity, see `fedwsa.granularity`.
    """
    layers = {name: tensor for name, tensor in tensors.items() if is_layer(name, tensor)}
    names = tuple(layers)  # of the units too, unless there are others
    if granularity != "layer":
        names = tuple(units({name: tensor.shape for name, tensor in layers.items()}, granularity))
    if granularity == "channel":
        pairs = [channel_moments(tensor) for tensor in layers.values()]
        empty = torch.empty(0, dtype=torch.float64)
        return WeightScope(names, *(torch.cat([empty, *(each.cpu() for each in part)]) for part in _unzipped(pairs)))
    parts = _unzipped([moments(tensor) for tensor in layers.values()])
    means, variances = (torch.tensor(part, dtype=torch.float64) for part in parts)
    if granularity == "model" and layers:
        sizes = torch.tensor([tensor.numel() for tensor in layers.values()], dtype=torch.float64)
        means, variances = pooled(means, variances, sizes)
    return WeightScope(names, means, variances)


def _unzipped(pairs: Sequence[tuple[T, T]]) -> tuple[list[T], list[T]]:
    return [one for one, _ in pairs], [other for _, other in pairs]


def pooled(means: Tensor, variances: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, each [1], of the weights of L layers with so many weights each, put together."""
    shares = sizes / sizes.sum().clamp(min=1)
    mean = (shares * means).sum(0, keepdim=True)
    return mean, (shares * (variances + (means - mean).square())).sum(0, keepdim=True)


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
    return ~(usable_mask(scope.means, scope.variances) & usable_mask(target.means, target.variances))


def divergence(scope: WeightScope, target: WeightScope, kind: str = "forward-kl") -> Tensor:
    """Divergence per layer, zero iff equal, 0 if degenerate. Shape [L].

    kind: forward-kl, reverse-kl (nats) or wasserstein (squared weights), see `fedwsa.divergence`; else ValueError.
    """
    check_same_layers(scope, target)
    return _divergence(scope.means, scope.variances, target, kind)


def kl_divergence(scope: WeightScope, target: WeightScope) -> Tensor:
    """KL(N(μ, σ²) ‖ N(μ_t, σ_t²)) per layer, in nats; zero iff equal; not symmetric; 0 if degenerate. Shape [L].

    ln(σ_t/σ) + (σ² + (μ − μ_t)²)/(2σ_t²) − 1/2
    """
    return divergence(scope, target)


def _divergence(means: Tensor, variances: Tensor, target: WeightScope, kind: str = "forward-kl") -> Tensor:
    """`divergence` for scopes [L] or several at once, [K, L]."""
    usable = usable_mask(means, variances) & usable_mask(target.means, target.variances)
    return divergence_of(kind).value(means, variances, target.means, target.variances).masked_fill(~usable, 0)


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

    def only(self, names: Sequence[str]) -> Scopes:
        """Those of some of the layers, in this order. Raises KeyError for a layer that is not there."""
        columns = _positions(self.names, names)
        return Scopes(tuple(names), self.means[:, columns], self.variances[:, columns])


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


def scope_spread(scopes: Sequence[WeightScope] | Scopes, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """How far the clients' scopes lie apart: weighted standard deviations over k of μ_k and of σ_k, each [L]. Ours.

    √(Σ_k p_k (x_k − x̄)²) with x̄ = Σ_k p_k x_k; exactly 0 where all agree. Weights as for `fuse`, with the same errors.
    """
    shares = _shares(scopes, weights)
    every = scopes if isinstance(scopes, Scopes) else Scopes.of(scopes)
    return _deviation(every.means, shares), _deviation(every.variances.sqrt(), shares)


def _deviation(values: Tensor, shares: Tensor) -> Tensor:
    values = values - values[0]  # so that rounding gives equal ones no deviation
    return (shares * (values - (shares * values).sum(0)).square()).sum(0).sqrt()


def scope_distance(scopes: Sequence[WeightScope] | Scopes, weights: Sequence[float], fused: WeightScope) -> Tensor:
    """How far the clients are from the fused scope: Σ_k p_k KL(client k ‖ fused) per layer, in nats. Shape [L].

    Weights as for `fuse`, with the same errors.
    """
    shares = _shares(scopes, weights)
    every = scopes if isinstance(scopes, Scopes) else Scopes.of(scopes)
    check_same_layers(every, fused)
    return (shares * _divergence(every.means, every.variances, fused)).sum(0)


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


def moving_average(old: WeightScope, new: WeightScope, momentum: float) -> WeightScope:
    """m old + (1 − m) new, of means and of variances; a layer that is not finite in `old` is taken from `new`. Ours.

    momentum: 0 <= m < 1; 0 gives `new` itself. Raises ValueError for another m, or unlike layers.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum of the target must be in [0, 1), got {momentum!r}")
    check_same_layers(old, new)
    if momentum == 0:
        return new
    kept = old.means.isfinite() & old.variances.isfinite()
    means, variances = (
        torch.where(kept, momentum * before + (1 - momentum) * after, after)
        for before, after in ((old.means, new.means), (old.variances, new.variances))
    )
    return WeightScope(new.names, means, variances)


def gradient_coefficients(
    scope: WeightScope, target: WeightScope, sizes: Sequence[int], kind: str = "forward-kl"
) -> tuple[Tensor, Tensor]:
    """Coefficients (a, b), each [L], of the gradient of the divergence: ∂D/∂w_i = a + b w_i; (0, 0) if degenerate.

    Forward KL: b = (1/σ_t² − 1/σ²)/n, a = (μ − μ_t)/(n σ_t²) − μ b. sizes: n per layer. kind: as for `divergence`.
    """
    left_out = degenerate(scope, target)
    gradient = divergence_of(kind).gradient
    a, b = gradient(scope.means, scope.variances, target.means, target.variances, _sizes(scope, sizes))
    return a.masked_fill(left_out, 0), b.masked_fill(left_out, 0)


def proximal_coefficients(
    scope: WeightScope, target: WeightScope, sizes: Sequence[int], c: float, kind: str = "forward-kl"
) -> tuple[Tensor, Tensor]:
    """Coefficients (a, b), each [L], of the proximal map: w′ = a + b w minimises ½‖w′ − w‖² + c D(w′ ‖ target).

    (0, 1) if degenerate. sizes: n per layer. kind: as for `divergence`; reverse-kl has no such map.
    Raises ValueError unless 0 <= c < ∞, or for such a kind.
    """
    if not 0 <= c < math.inf:
        raise ValueError(f"c must be >= 0 and finite, got {c!r}")
    left_out = degenerate(scope, target)
    proximal = divergence_of(kind, "proximal").proximal
    assert proximal is not None
    a, b = proximal(scope.means, scope.variances, target.means, target.variances, _sizes(scope, sizes), c)
    return a.masked_fill(left_out, 0), b.masked_fill(left_out, 1)


def _sizes(scope: WeightScope, sizes: Sequence[int]) -> Tensor:
    if len(sizes) != len(scope.names):
        raise ValueError(f"one size per layer is needed, got {len(sizes)} for {len(scope.names)} layers")
    return torch.tensor(sizes, dtype=torch.float64)
