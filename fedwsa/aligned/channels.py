"""Each channel of a layer a unit."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedwsa.aligned.units import PART, Held, Report, Terms, gradient_of, in_memory_order, is_written, single
from fedwsa.divergence import usable_mask
from fedwsa.granularity import channel_name
from fedwsa.scope import WeightScope, channel_moments


class _Layer(NamedTuple):
    """A layer's parameter and, float64 [C] on its device, its channels' targets, n, and whether a target is usable."""

    name: str
    parameter: Tensor
    target_means: Tensor
    target_variances: Tensor
    sizes: Tensor
    usable: Tensor


class ChannelUnits:
    """Two sums a channel and one affine update a layer; the formulas once, for the channels of all layers."""

    def __init__(self, parameters: Mapping[str, Tensor], target: WeightScope, report: Report) -> None:
        self._report = report
        counts = [len(weights) for weights in parameters.values()]
        goals = zip(torch.split(target.means, counts), torch.split(target.variances, counts), strict=True)
        self._layers = []
        for (name, weights), goal in zip(parameters.items(), goals, strict=True):
            if weights.numel():
                means, variances = (each.to(weights.device) for each in goal)
                sizes = torch.full_like(means, weights[0].numel())
                self._layers.append(_Layer(name, weights, means, variances, sizes, usable_mask(means, variances)))

    def add_gradient(self, terms: Terms, held: Held = None) -> None:
        """See `Units`."""
        for layer, update in self._updates(terms, held):
            weights = layer.parameter
            if update:
                constants, b = update
                gradient_of(weights).addcmul_(weights, b).add_(constants)
                continue
            _, gradient, ready = _in_double(layer, terms)
            ready &= self._fitting(layer, gradient, ready)
            gradient_of(weights).add_(gradient.masked_fill(~ready, 0).to(weights.dtype).reshape(weights.shape))

    def move(self, terms: Terms, held: Held = None) -> None:
        """See `Units`."""
        for layer, update in self._updates(terms, held):
            weights = layer.parameter
            if update:
                constants, b = update
                torch.addcmul(constants, weights, b, out=weights)
                continue
            means, deviations, ready = _in_double(layer, terms)
            moved = means + deviations
            ready &= self._fitting(layer, moved, ready)
            rows = weights.reshape(len(weights), -1)
            weights.copy_(torch.where(ready, moved.to(weights.dtype), rows).reshape(weights.shape))

    def _updates(self, terms: Terms, held: Held) -> Iterator[tuple[_Layer, tuple[Tensor, Tensor] | None]]:
        """Each layer that is to be written, with constant and b of its channels where its own precision will do.

        It does while |μ| < σ in every channel; else a + b w would cancel.
        """
        layers = [layer for layer in self._layers if is_written(layer.parameter, held)]
        if not layers:
            return
        parts = [_sums(layer.parameter) for layer in layers]
        totals, norms = (torch.cat(part).to(torch.float64) for part in zip(*parts, strict=True))
        _, weights, *numbers = zip(*layers, strict=True)
        target_means, target_variances, sizes, usable = map(torch.cat, numbers)
        means = totals / sizes
        squares = means.square()
        variances = norms.square() / sizes - squares
        a, b = terms(means, variances, target_means, target_variances, sizes)
        largest = min(torch.finfo(each.dtype).max for each in weights)
        furthest = (means.abs() + (sizes * variances).sqrt()).clamp(min=1.0)  # no weight is further from 0
        fine = usable & (squares < variances) & (a.abs() + b.abs() * furthest <= largest)
        alike, counts = bool(fine.all()), [len(each) for each in weights]
        for layer, *pair, ready in zip(layers, *(each.split(counts) for each in (a, b, fine)), strict=True):
            long = layer.parameter.is_cpu and layer.parameter[0].numel() > PART
            if long or not (alike or ready.all()):
                yield layer, None
            else:
                shape = (-1, *[1] * (layer.parameter.ndim - 1))
                constants, b = (each.to(layer.parameter.dtype).view(shape) for each in pair)
                yield layer, (constants, b)

    def _fitting(self, layer: _Layer, values: Tensor, ready: Tensor) -> Tensor:
        """Tell which channels [C, 1] may be written, and report the others."""
        ready = ready & (values.abs().amax(1, keepdim=True) <= torch.finfo(layer.parameter.dtype).max)
        if not ready.all():
            self._report([channel_name(layer.name, index) for index in (~ready).nonzero()[:, 0].tolist()])
        return ready


def _sums(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w and √(Σ w²) of each channel, [C], in single precision at least."""
    rows, dtype = in_memory_order(weights).reshape(len(weights), -1), single(weights.dtype)
    return rows.sum(1, dtype=dtype), torch.linalg.vector_norm(rows, dim=1, dtype=dtype)


def _in_double(layer: _Layer, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Means [C, 1], a + b (w − μ) [C, n], and which channels are usable [C, 1]; in float64."""
    weights = layer.parameter
    means, variances = (each.unsqueeze(1) for each in channel_moments(weights))
    target_means, target_variances = layer.target_means.unsqueeze(1), layer.target_variances.unsqueeze(1)
    deviations = weights.to(torch.float64).reshape(len(weights), -1) - means
    shifted = torch.zeros_like(means), variances, target_means - means, target_variances  # nothing cancels
    a, b = terms(*shifted, float(deviations.shape[1]))
    return means, a + b * deviations, usable_mask(means, variances) & layer.usable.unsqueeze(1)
