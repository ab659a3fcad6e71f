"""Each layer a unit, or the whole model the one unit: their means and variances, and their updates, in place."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedwsa.aligned.units import LEAST, Held, Report, Terms, gradient_of, in_memory_order, is_written, single
from fedwsa.divergence import usable
from fedwsa.scope import WeightScope, moments

Update = tuple[Tensor, float, float, float, Tensor]
"""Weights, constant, b and origin of constant + b (w − origin), and a number's place for `_move`.

The origin is 0 while |μ| < σ; beyond that it is μ in the weights' dtype, since a + b w would cancel.
"""


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's parameter and its target."""

    name: str
    parameter: Tensor
    size: float  # n, a float for the formulas
    target_mean: float
    target_variance: float
    largest: float  # of the parameter's dtype
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
                self._layers.append(_Layer(name, parameter, size, mean, variance, largest, parameter.new_empty(())))
            else:
                unusable.append(name)
        report(unusable)

    def add_gradient(self, terms: Terms, held: Held = None) -> None:
        """See `Units`."""
        _add_gradients(self._updates(terms, held))

    def move(self, terms: Terms, held: Held = None) -> None:
        """See `Units`."""
        _move(self._updates(terms, held))

    def _updates(self, terms: Terms, held: Held) -> Iterator[Update]:
        """Of each layer that is to be written, if its update can be made."""
        layers = [layer for layer in self._layers if is_written(layer.parameter, held)]
        for layer, (mean, variance) in zip(layers, _moments([each.parameter for each in layers]), strict=True):
            if not usable(mean, variance):
                self._report([layer.name])
                continue
            a, b = terms(mean, variance, layer.target_mean, layer.target_variance, layer.size)
            if not _fits(layer.largest, a, b, mean, variance, layer.size):
                self._report([layer.name])
                continue
            origin = _origin(mean, variance, layer.parameter)
            yield layer.parameter, a + b * origin, b, origin, layer.anchor


class ModelUnit:
    """All weights that train are one unit; frozen ones do not count."""

    def __init__(self, parameters: Mapping[str, Tensor], target: WeightScope, report: Report) -> None:
        self._report, self._names = report, list(target.names)
        self._parameters = [(weights, weights.new_empty(())) for weights in parameters.values() if weights.numel()]
        self._target = (target.means.item(), target.variances.item()) if parameters else (0.0, 0.0)
        if not usable(*self._target):
            report(self._names)

    def add_gradient(self, terms: Terms, held: Held = None) -> None:
        """See `Units`."""
        updates, _ = self._updates(terms, held)
        _add_gradients(updates)

    def move(self, terms: Terms, held: Held = None) -> None:
        """See `Units`."""
        updates, mean = self._updates(terms, held)
        _move((weights, mean + constant, b, origin, anchor) for weights, constant, b, origin, anchor in updates)

    def _updates(self, terms: Terms, held: Held) -> tuple[list[Update], float]:
        """Of each tensor to be written the update a + b (w − μ), which of a move is w′ − μ; and μ."""
        training = [pair for pair in self._parameters if pair[0].requires_grad]
        if not training or not usable(*self._target):
            return [], 0.0
        mean, variance, size = _pooled([weights for weights, _ in training])
        if not usable(mean, variance):
            self._report(self._names)
            return [], 0.0
        a, b = terms(0.0, variance, self._target[0] - mean, self._target[1], size)  # of w − μ, so that nothing cancels
        largest = min(torch.finfo(weights.dtype).max for weights, _ in training)
        if not _fits(largest, abs(a) + abs(mean), b, 0.0, variance, size):
            self._report(self._names)
            return [], 0.0
        updates = []
        for weights, anchor in training:
            if is_written(weights, held):
                origin = _origin(mean, variance, weights)
                updates.append((weights, a + b * (origin - mean), b, origin, anchor))
        return updates, mean


def _moments(parameters: list[Tensor]) -> Iterator[tuple[float, float]]:
    """Mean and variance of each: in its own dtype, single precision at least, while |μ| < σ, else in float64.

    On the CPU by E[w²] − μ², which would cancel, of each when it is its turn, so that its update finds it in the cache,
    and half precision in float64. On a card by `var_mean` and in one transfer, for each of which Python would wait.
    """
    if not parameters or parameters[0].is_cpu:
        for weights in parameters:
            if least := LEAST.get(weights.dtype):
                mean, variance = _by_sums(weights)
                if _is_precise(mean, variance, least):
                    yield mean, variance
                    continue
            yield moments(weights)
        return
    place, numbers = parameters[0].device, []
    for weights in parameters:
        variance_of, mean_of = torch.var_mean(weights.to(single(weights.dtype)), correction=0)
        numbers += [mean_of.to(place), variance_of.to(place)]
    found = torch.stack(numbers).tolist()
    for weights, mean, variance in zip(parameters, found[::2], found[1::2], strict=True):
        precise = _is_precise(mean, variance, LEAST[single(weights.dtype)])
        yield (mean, variance) if precise else moments(weights)


def _is_precise(mean: float, variance: float, least: float) -> bool:
    return mean * mean < variance < math.inf and variance > least


PART = 1 << 18
"""Weights whose squares `_by_sums` adds up in one go.

In float32 that is to 1e-6 of the sum for weights at random; for a layer of ±c alone it may be 1e-4.
"""


def _by_sums(weights: Tensor) -> tuple[float, float]:
    """Mean and variance from Σ w and Σ w²."""
    w = in_memory_order(weights).reshape(-1)
    size = len(w)
    parts = [w] if size <= PART else torch.split(w, PART)
    mean = w.sum().item() / size
    return mean, sum([torch.dot(part, part).item() for part in parts]) / size - mean * mean


def _pooled(parameters: list[Tensor]) -> tuple[float, float, float]:
    """Mean, variance and number of all weights, as precise as those of its layers in float32, if there are any.

    Counted from the first mean, so that constant ones have variance 0.
    """
    sizes, found = [float(weights.numel()) for weights in parameters], list(_moments(parameters))
    total, first = sum(sizes), found[0][0]
    shift = sum(size * (mean - first) for size, (mean, _) in zip(sizes, found, strict=True)) / total
    apart = [mean - first - shift for mean, _ in found]
    squares = sum(n * (variance + d * d) for n, (_, variance), d in zip(sizes, found, apart, strict=True))
    return first + shift, squares / total, total


def _origin(mean: float, variance: float, weights: Tensor) -> float:
    """See `Update`."""
    return 0.0 if mean * mean < variance else torch.tensor(mean, dtype=weights.dtype).item()


def _fits(largest: float, a: float, b: float, mean: float, variance: float, size: float) -> bool:
    """Tell whether a + b w stays below `largest`: no weight is further from the mean than √(n σ²)."""
    return abs(a) + abs(b) * max(1.0, abs(mean) + math.sqrt(size * variance)) <= largest


def _goes_together(weights: Tensor, origin: float) -> bool:
    """On a card, with others in one call; not in half precision, which would be rounded at each."""
    return not (weights.is_cpu or origin) and weights.dtype in LEAST


def _add_gradients(updates: Iterable[Update]) -> None:
    """Add constant + b (w − origin) to each gradient; on a card to all of them in three calls."""
    together = []
    for weights, constant, b, origin, _ in updates:
        if _goes_together(weights, origin):
            together.append((weights, constant, b))
        else:
            gradient_of(weights).add_(weights - origin if origin else weights, alpha=b).add_(constant)
    if together:
        all_weights, constants, slopes = zip(*together, strict=True)
        terms = torch._foreach_mul(all_weights, slopes)
        torch._foreach_add_(terms, constants)
        torch._foreach_add_([gradient_of(weights) for weights in all_weights], terms)


def _move(updates: Iterable[Update]) -> None:
    """Replace w by constant + b (w − origin); on a card all of them in two calls.

    On the CPU mostly in one pass, w + t (c − w) with t = 1 − b and c = constant/t, which goes to the update's place for
    a number: a new one takes as long as a small layer.
    """
    together = []
    for weights, constant, b, origin, anchor in updates:
        t = 1 - b
        if _goes_together(weights, origin):
            together.append((weights, constant, b))
        elif not origin and 0 < abs(t) < 0.5 and abs(constant / t) <= torch.finfo(weights.dtype).max:
            alike = anchor.device == weights.device and anchor.dtype == weights.dtype
            place = anchor if alike else weights.new_empty(())
            weights.lerp_(place.fill_(constant / t), t)
        else:
            if origin:
                weights.sub_(origin)
            weights.mul_(b).add_(constant)
    if together:
        all_weights, constants, slopes = zip(*together, strict=True)
        torch._foreach_mul_(all_weights, slopes)
        torch._foreach_add_(all_weights, constants)
