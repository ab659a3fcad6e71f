"""The weights that a regulariser pulls, by granularity: they are measured, and get their affine update, in place.

`Terms` says what the update is: of a unit's mean, variance, target mean, target variance and n it makes (a, b), and the
update is a + b w. `held`: ids of the parameters that are to be written; None: all. Frozen parameters never are.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fedwsa.divergence import usable, usable_mask
from fedwsa.granularity import channel_name
from fedwsa.scope import CLOSE, WeightScope, channel_moments, moments

Terms = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]
Report = Callable[[list[str]], None]
Held = set[int] | None

PART = 1 << 18
"""Weights whose squares the CPU adds up in one go, in float32 to 1e-6 of their sum; ten times as many lose a digit."""


class Units(Protocol):
    """What `UNITS` holds: made of the target's parameters, the target, and whom to tell of degenerate units."""

    def __init__(self, parameters: Mapping[str, Tensor], target: WeightScope, report: Report) -> None: ...

    def add_gradient(self, terms: Terms, held: Held = None) -> None:
        """Add a + b w to `.grad`, which is made where there is none."""

    def move(self, terms: Terms, held: Held = None) -> None:
        """Replace w by a + b w."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's parameter and its target; `quick` if sums in the parameter's own dtype can be precise enough."""

    name: str
    parameter: Tensor
    size: float  # n, a float for the formulas
    target_mean: float
    target_variance: float
    largest: float  # of the parameter's dtype
    quick: bool
    anchor: Tensor  # a number's place, see `_move`


class LayerUnits:
    """Each layer a unit: two sums and one affine update."""

    def __init__(self, parameters: Mapping[str, Tensor], target: WeightScope, report: Report) -> None:
        self._report = report
        self._layers: list[_Layer] = []
        unusable = []
        numbers = zip(target.means.tolist(), target.variances.tolist(), strict=True)
        for (name, parameter), (mean, variance) in zip(parameters.items(), numbers, strict=True):
            if usable(mean, variance) and parameter.numel() > 1:
                size, largest = float(parameter.numel()), torch.finfo(parameter.dtype).max
                quick = parameter.dtype in (torch.float32, torch.float64)
                anchor = parameter.new_empty(())
                self._layers.append(_Layer(name, parameter, size, mean, variance, largest, quick, anchor))
            else:
                unusable.append(name)
        report(unusable)

    def add_gradient(self, terms: Terms, held: Held = None) -> None:
        """See `Units`."""
        for layer, total, square in self._sums(held):
            if update := self._update(layer, total, square, terms):
                _add_gradient(layer.parameter, *update)

    def move(self, terms: Terms, held: Held = None) -> None:
        """See `Units`."""
        for layer, total, square in self._sums(held):
            if update := self._update(layer, total, square, terms):
                _move(layer.parameter, *update, layer.anchor)

    def _sums(self, held: Held) -> Iterable[tuple[_Layer, float, float]]:
        """Each layer that is to be pulled, its Σ w and Σ w²."""
        layers = [layer for layer in self._layers if _is_written(layer.parameter, held)]
        sums = _power_sums([_flat(layer.parameter) for layer in layers])
        return ((layer, *pair) for layer, pair in zip(layers, sums, strict=True))

    def _update(self, layer: _Layer, total: float, square: float, terms: Terms) -> tuple[float, float, float] | None:
        """Constant, b and origin of the layer's affine update constant + b (w − origin), if it can be made.

        E[w²] − μ² in the weights' own dtype is quick, and precise while |μ| < σ; then the origin is 0. Other layers are
        measured in float64, and their origin is μ in their dtype, since a + b w would cancel.
        """
        size = layer.size
        mean, origin = total / size, 0.0
        variance = square / size - mean * mean
        if not (layer.quick and mean * mean < variance < math.inf):
            mean, variance = moments(layer.parameter)
            if not usable(mean, variance):
                self._report([layer.name])
                return None
            origin = _rounded(mean, layer.parameter)
        a, b = terms(mean, variance, layer.target_mean, layer.target_variance, size)
        if _fits(layer.largest, a, b, mean, variance, size):
            return a + b * origin, b, origin
        self._report([layer.name])
        return None


class ChannelUnits:
    """Each channel a unit; all of a layer's at once, in float64 on the weights' device."""

    def __init__(self, parameters: Mapping[str, Tensor], target: WeightScope, report: Report) -> None:
        self._report = report
        counts = [len(weights) for weights in parameters.values()]
        goals = zip(torch.split(target.means, counts), torch.split(target.variances, counts), strict=True)
        self._layers = [(name, weights, *goal) for (name, weights), goal in zip(parameters.items(), goals, strict=True)]

    def add_gradient(self, terms: Terms, held: Held = None) -> None:
        """See `Units`."""
        for name, weights, _, a, b, deviations, ready in self._maps(terms, held):
            gradient = a + b * deviations
            ready &= self._fitting(gradient, weights)
            self._tell(name, ready)
            _gradient_of(weights).add_(gradient.masked_fill(~ready, 0).to(weights.dtype).reshape(weights.shape))

    def move(self, terms: Terms, held: Held = None) -> None:
        """See `Units`."""
        for name, weights, means, a, b, deviations, ready in self._maps(terms, held):
            moved = means + (a + b * deviations)
            ready &= self._fitting(moved, weights)
            self._tell(name, ready)
            rows = weights.reshape(len(weights), -1)
            weights.copy_(torch.where(ready, moved.to(weights.dtype), rows).reshape(weights.shape))

    def _maps(self, terms: Terms, held: Held) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """For each layer its means [C, 1], a and b, which are of the deviations [C, n], and who is usable."""
        for name, weights, *goal in self._layers:
            if not _is_written(weights, held) or not weights.numel():
                continue
            means, variances = (each.unsqueeze(1) for each in channel_moments(weights))
            target_means, target_variances = (each.to(weights.device).unsqueeze(1) for each in goal)
            ready = usable_mask(means, variances) & usable_mask(target_means, target_variances)
            deviations = weights.to(torch.float64).reshape(len(weights), -1) - means
            shifted = torch.zeros_like(means), variances, target_means - means, target_variances  # nothing cancels
            yield name, weights, means, *terms(*shifted, float(deviations.shape[1])), deviations, ready

    def _fitting(self, values: Tensor, weights: Tensor) -> Tensor:
        return values.abs().amax(1, keepdim=True) <= torch.finfo(weights.dtype).max

    def _tell(self, name: str, ready: Tensor) -> None:
        if not ready.all():
            self._report([channel_name(name, index) for index in (~ready).nonzero()[:, 0].tolist()])


class ModelUnit:
    """All weights that train are one unit; frozen ones do not count."""

    def __init__(self, parameters: Mapping[str, Tensor], target: WeightScope, report: Report) -> None:
        self._report, self._names = report, list(target.names)
        self._parameters = list(parameters.values())
        self._target = (target.means.item(), target.variances.item()) if parameters else (0.0, 0.0)
        if not usable(*self._target):
            report(self._names)

    def add_gradient(self, terms: Terms, held: Held = None) -> None:
        """See `Units`."""
        for weights, constant, b, origin, _ in self._maps(terms, held):
            _add_gradient(weights, constant, b, origin)

    def move(self, terms: Terms, held: Held = None) -> None:
        """See `Units`."""
        for weights, constant, b, origin, mean in self._maps(terms, held):
            _move(weights, mean + constant, b, origin)

    def _maps(self, terms: Terms, held: Held) -> list[tuple[Tensor, float, float, float, float]]:
        """For each tensor to be written constant, b, origin and μ, of a + b (w − μ) = constant + b (w − origin).

        By the proximal map that is w′ − μ.
        """
        training = [weights for weights in self._parameters if weights.requires_grad and weights.numel()]
        if not training or not usable(*self._target):
            return []
        mean, variance, size = self._moments(training)
        if not usable(mean, variance):
            self._report(self._names)
            return []
        a, b = terms(0.0, variance, self._target[0] - mean, self._target[1], size)  # of w − μ, so that nothing cancels
        largest = min(torch.finfo(weights.dtype).max for weights in training)
        if not _fits(largest, abs(a) + abs(mean), b, 0.0, variance, size):
            self._report(self._names)
            return []
        written = [weights for weights in training if _is_written(weights, held)]
        origins = [0.0 if mean * mean < variance else _rounded(mean, weights) for weights in written]
        return [(w, a + b * (origin - mean), b, origin, mean) for w, origin in zip(written, origins, strict=True)]

    def _moments(self, training: list[Tensor]) -> tuple[float, float, float]:
        """Mean, variance and number of all weights, in float64 where they are; the first weight is counted from."""
        wide = [weights.to(torch.float64).reshape(-1) for weights in training]
        first, size = wide[0][0].item(), float(sum(len(w) for w in wide))
        sums = torch.stack([w.sum() for w in wide] + [torch.dot(w, w) for w in wide])
        total, squares = sums.reshape(2, -1).sum(1).tolist()
        mean, square = total / size, squares / size
        if mean * mean < CLOSE * square < math.inf:
            return mean, square - mean * mean, size
        shift = sum((w - first).sum().item() for w in wide) / size
        return first + shift, sum((w - first - shift).square().sum().item() for w in wide) / size, size


UNITS: dict[str, type[Units]] = {"layer": LayerUnits, "channel": ChannelUnits, "model": ModelUnit}


def _is_written(weights: Tensor, held: Held) -> bool:
    return weights.requires_grad and (held is None or id(weights) in held)


def _rounded(mean: float, weights: Tensor) -> float:
    return torch.tensor(mean, dtype=weights.dtype).item()


def _fits(largest: float, a: float, b: float, mean: float, variance: float, size: float) -> bool:
    """Tell whether a + b w stays below `largest`: no weight is further from the mean than √(n σ²)."""
    return abs(a) + abs(b) * max(1.0, abs(mean) + math.sqrt(size * variance)) <= largest


def _add_gradient(weights: Tensor, constant: float, b: float, origin: float) -> None:
    """Add constant + b (w − origin) to the gradient."""
    centred = weights - origin if origin else weights
    _gradient_of(weights).add_(centred, alpha=b).add_(constant)


def _gradient_of(weights: Tensor) -> Tensor:
    """`.grad`, made where there is none."""
    if weights.grad is None:
        weights.grad = torch.zeros_like(weights)
    elif weights.grad.is_sparse:
        raise ValueError("mode='loss' cannot join a sparse gradient, since the term's is dense; use mode='proximal'")
    return weights.grad


def _move(weights: Tensor, constant: float, b: float, origin: float, anchor: Tensor | None = None) -> None:
    """Replace w by constant + b (w − origin): mostly in one pass, w + t (c − w) with t = 1 − b and c = constant/t.

    anchor: where to put c, if there is such a place; a new one takes as long as a small layer.
    """
    t = 1 - b
    if not origin and 0 < abs(t) < 0.5 and abs(constant / t) <= torch.finfo(weights.dtype).max:
        if anchor is None or anchor.device != weights.device:
            anchor = weights.new_empty(())
        weights.lerp_(anchor.fill_(constant / t), t)
        return
    if origin:
        weights.sub_(origin)
    weights.mul_(b).add_(constant)


def _flat(weights: Tensor) -> Tensor:
    """All weights in the order in which they lie in memory: only then is there nothing to copy."""
    if weights.ndim == 4 and not weights.is_contiguous():
        weights = weights.permute(0, 2, 3, 1)  # back from channels last
    return weights.reshape(-1)


def _power_sums(layers: list[Tensor]) -> Iterator[tuple[float, float]]:
    """Σ w and Σ w² of each; on the CPU when it is its turn, so that its update finds it in the cache."""
    if not layers or layers[0].is_cpu:
        for w in layers:
            parts = [w] if len(w) <= PART else torch.split(w, PART)
            yield w.sum().item(), sum([torch.dot(part, part).item() for part in parts])
        return
    numbers = torch.stack([number for w in layers for number in (w.sum(), torch.dot(w, w))]).tolist()
    yield from zip(numbers[::2], numbers[1::2], strict=True)  # in one transfer, for each of which Python would wait
