"""Each layer a unit, or the whole model the one unit: measured, and written in place."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fedwsa.aligned import rows
from fedwsa.aligned.units import LEAST, Held, Kind, Report, fits, gradient_of, is_written, single, terms_of
from fedwsa.divergence import usable
from fedwsa.scope import WeightScope, moments


class _Update(NamedTuple):
    """a + b (w − mean) is to be added to weights, or to their gradient; std: their σ."""

    weights: Tensor
    mean: float
    std: float
    a: float
    b: float


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's parameter and its target."""

    name: str
    parameter: Tensor
    target_mean: float
    target_variance: float
    rows: rows.Rows


class LayerUnits:
    """Each layer a unit."""

    def __init__(self, parameters: Mapping[str, Tensor], target: WeightScope, kind: Kind, report: Report) -> None:
        self._kind, self._report = kind, report
        self._layers: list[_Layer] = []
        unusable = []
        goals = zip(parameters.items(), target.means.tolist(), target.variances.tolist(), strict=True)
        for (name, parameter), mean, variance in goals:
            if usable(mean, variance) and parameter.numel() > 1:
                unit = rows.Rows(parameter, [mean], [variance], kind)
                self._layers.append(_Layer(name, parameter, mean, variance, unit))
            else:
                unusable.append(name)
        report(unusable)

    def pull(self, s: float, held: Held, into_gradient: bool) -> None:
        """See `Units`."""
        others = []
        for layer in self._layers:
            if is_written(layer.parameter, held):
                left = layer.rows.pull(s, into_gradient)
                if left is None:
                    others.append(layer)
                elif left:
                    self._report([layer.name])
        if others:
            _write(self._updates(others, s, into_gradient), into_gradient)

    def _updates(self, layers: Sequence[_Layer], s: float, into_gradient: bool) -> Iterator[_Update]:
        """Of each layer whose update can be made."""
        for layer, (mean, variance) in zip(layers, _moments([each.parameter for each in layers]), strict=True):
            weights, size = layer.parameter, float(layer.parameter.numel())
            if usable(mean, variance):
                a, b = terms_of(self._kind)(variance, layer.target_mean - mean, layer.target_variance, size, s)
                if fits(torch.finfo(weights.dtype).max, mean, variance, size, a, b, moves=not into_gradient):
                    yield _Update(weights, mean, math.sqrt(variance), a, b)
                    continue
            self._report([layer.name])


class ModelUnit:
    """All weights that train are one unit; frozen ones do not count."""

    def __init__(self, parameters: Mapping[str, Tensor], target: WeightScope, kind: Kind, report: Report) -> None:
        self._kind, self._report, self._names = kind, report, list(target.names)
        self._parameters = [weights for weights in parameters.values() if weights.numel()]
        self._target = (target.means.item(), target.variances.item()) if parameters else (0.0, 0.0)
        if not usable(*self._target):
            report(self._names)

    def pull(self, s: float, held: Held, into_gradient: bool) -> None:
        """See `Units`."""
        _write(self._updates(s, held, into_gradient), into_gradient)

    @torch.no_grad()
    def _updates(self, s: float, held: Held, into_gradient: bool) -> list[_Update]:
        """Of each tensor to be written."""
        training = [weights for weights in self._parameters if weights.requires_grad]
        if not training or not usable(*self._target):
            return []
        mean, variance, size = _pooled(training)
        if usable(mean, variance):
            a, b = terms_of(self._kind)(variance, self._target[0] - mean, self._target[1], size, s)
            largest = min(torch.finfo(weights.dtype).max for weights in training)
            if fits(largest, mean, variance, size, a, b, moves=not into_gradient):
                std = math.sqrt(variance)
                return [_Update(weights, mean, std, a, b) for weights in training if is_written(weights, held)]
        self._report(self._names)
        return []


def _moments(parameters: Sequence[Tensor]) -> Iterator[tuple[float, float]]:
    """Mean and variance of each.

    On a card by `var_mean` in single precision at least, and in one transfer, for each of which Python would wait; in
    float64 of those for which that is not enough.
    """
    if not parameters or parameters[0].is_cpu:
        for weights in parameters:
            values = rows.rows_of(weights, 1)
            yield moments(weights) if values is None else rows.moments(values[0])
        return
    place, numbers = parameters[0].device, []
    for weights in parameters:
        variance_of, mean_of = torch.var_mean(weights.to(single(weights.dtype)), correction=0)
        numbers += [mean_of.to(place), variance_of.to(place)]
    found = torch.stack(numbers).tolist()
    for weights, mean, variance in zip(parameters, found[::2], found[1::2], strict=True):
        precise = mean * mean < variance < math.inf and variance > LEAST[single(weights.dtype)]
        yield (mean, variance) if precise else moments(weights)


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


@torch.no_grad()
def _write(updates: Iterable[_Update], into_gradient: bool) -> None:
    """Add a + b (w − μ) to each tensor, or to its gradient; on a card mostly in three calls."""
    together = []
    for weights, mean, std, a, b in updates:
        target = gradient_of(weights) if into_gradient else weights
        if not weights.is_cpu and weights.dtype in LEAST and abs(mean) < std:  # else a − b μ + b w would cancel
            together.append((target, weights, a - b * mean, b))
            continue
        values = rows.rows_of(weights, 1)
        beside = rows.rows_beside(target, weights, 1) if into_gradient else values
        if values is None or beside is None:
            # In double precision and rounded once: half precision would be rounded at each call.
            target.add_(weights.to(torch.float64, copy=True).sub_(mean).mul_(b).add_(a))
        else:
            if into_gradient:
                rows.add(beside[0], values[0], mean, a, b)
            else:
                rows.move(values[0], mean, std, a, b)
            increment_version(target)
    if together:
        targets, all_weights, constants, slopes = zip(*together, strict=True)
        terms = torch._foreach_mul(all_weights, slopes)
        torch._foreach_add_(terms, constants)
        torch._foreach_add_(targets, terms)
