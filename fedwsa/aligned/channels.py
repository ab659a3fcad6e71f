"""Each channel of a layer a unit."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedwsa.aligned.units import (
    LEAST,
    Held,
    Report,
    Terms,
    gradient_of,
    in_memory_order,
    is_written,
    lies_channels_last,
    single,
)
from fedwsa.divergence import usable_mask
from fedwsa.granularity import channel_name
from fedwsa.scope import WeightScope, centred

NOTHING = -0.0
"""What a factor or summand is where nothing may change: x + (−0.0) is x, the sign of a zero included."""


class _Layer(NamedTuple):
    """A layer's parameter, and its channels' targets, float64 [C, 1]."""

    name: str
    parameter: Tensor
    target_means: Tensor
    target_variances: Tensor


class _Update(NamedTuple):
    """a + b (w − μ) of a layer: whether it may be made for all channels, and for which [C, 1]; float64 coefficients."""

    whole: bool
    ready: Tensor
    means: Tensor
    a: Tensor
    b: Tensor
    deviations: Tensor  # w − μ, [C, n]

    def values(self, constants: Tensor, factors: Tensor) -> Tensor:
        """Constants + factors · deviations, in place of these; nothing for channels that are not ready."""
        if not self.whole:
            self.deviations.masked_fill_(~self.ready, 0)
            constants, factors = (each.masked_fill(~self.ready, NOTHING) for each in (constants, factors))
        constants, factors = (each.to(self.deviations.dtype) for each in (constants, factors))
        return torch.addcmul(constants, self.deviations, factors, out=self.deviations)


class ChannelUnits:
    """A layer's channels all at once, in single precision, or in double where that is not enough.

    What is computed is of w − μ, so that nothing cancels however far μ is from 0; it takes the memory of one layer.
    """

    def __init__(self, parameters: Mapping[str, Tensor], target: WeightScope, report: Report) -> None:
        self._report = report
        counts = [len(weights) for weights in parameters.values()]
        goals = (torch.split(each.unsqueeze(1), counts) for each in (target.means, target.variances))
        rows = zip(parameters.items(), *goals, strict=True)
        self._layers = [_Layer(name, weights, *goal) for (name, weights), *goal in rows if weights.numel()]

    def add_gradient(self, terms: Terms, held: Held = None) -> None:
        """See `Units`."""
        for weights, update in self._updates(terms, held):
            _add(gradient_of(weights), update.values(update.a, update.b), weights)

    def move(self, terms: Terms, held: Held = None) -> None:
        """See `Units`."""
        for weights, update in self._updates(terms, held):
            t = update.b - 1
            near = t.abs() < 0.5  # then b is rounded as 1 + t, of which t would lose its digits
            if near.all():
                _add(weights, update.values(update.a, t), weights)
                continue
            constants = torch.where(near, update.a, update.a + update.means)
            values = update.values(constants, torch.where(near, t, update.b))
            far = (update.ready & ~near).reshape(-1, *[1] * (weights.ndim - 1))
            weights.masked_fill_(far, NOTHING)
            _add(weights, values, weights)

    def _updates(self, terms: Terms, held: Held) -> Iterator[tuple[Tensor, _Update]]:
        """Each layer that is to be written, with its update, if that can be made for any channel."""
        for layer in self._layers:
            weights = layer.parameter
            if not is_written(weights, held):
                continue
            update = self._update(layer, terms, single(weights.dtype))
            if update is None:
                update = self._update(layer, terms, torch.float64)
            assert update is not None
            if not update.whole:
                self._report([channel_name(layer.name, i) for i in (~update.ready).nonzero()[:, 0].tolist()])
            if update.whole or update.ready.any():
                yield weights, update

    def _update(self, layer: _Layer, terms: Terms, dtype: torch.dtype) -> _Update | None:
        """None where this dtype is not enough: the squares of some channel overflow, or lose digits to underflow."""
        weights = layer.parameter
        means, variances, deviations = centred(in_memory_order(weights).reshape(len(weights), -1).to(dtype))
        if dtype != torch.float64:
            enough = (variances > LEAST[dtype]) & variances.isfinite()
            if not (enough.all() or (enough | (deviations == 0).all(1, keepdim=True)).all()):
                return None
        target_means, target_variances = (
            layer.target_means.to(weights.device),
            layer.target_variances.to(weights.device),
        )
        size = float(deviations.shape[1])
        a, b = terms(torch.zeros_like(means), variances, target_means - means, target_variances, size)
        furthest = (size * variances).sqrt().clamp(min=1.0)  # no weight is further from the mean; and b has to fit too
        fits = a.abs() + means.abs() + b.abs() * furthest <= torch.finfo(weights.dtype).max
        ready = usable_mask(means, variances) & usable_mask(target_means, target_variances) & fits
        return _Update(bool(ready.all()), ready, means, a, b, deviations)


def _add(target: Tensor, values: Tensor, weights: Tensor) -> None:
    """Add values [C, n], in the order in which the weights lie, to a tensor of the weights' shape."""
    values = values.reshape(in_memory_order(weights).shape)
    target.add_(values.permute(0, 3, 1, 2) if lies_channels_last(weights) else values)
