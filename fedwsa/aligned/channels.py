"""Each channel of a layer a unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedwsa.aligned.rows import Rows
from fedwsa.aligned.units import (
    Held,
    Kind,
    Report,
    gradient_of,
    in_memory_order,
    is_written,
    lies_channels_last,
    terms_of,
)
from fedwsa.divergence import usable_mask
from fedwsa.granularity import channel_name
from fedwsa.scope import WeightScope

NOTHING = -0.0
"""What is added where nothing may change: x + (−0.0) is x, the sign of a zero included."""


@dataclass(slots=True)
class _Layer:
    """A layer's parameter, and the targets of its channels, [C]."""

    name: str
    parameter: Tensor
    rows: Rows
    target: tuple[Tensor, Tensor]
    goals: Tensor | None = None
    place: tuple[torch.device, torch.dtype] | None = None

    def goals_here(self) -> Tensor:
        """Of each channel μ_t, σ_t², n and the dtype's largest number, [C, 4], where the parameter is now."""
        weights = self.parameter
        if self.goals is None or self.place != (weights.device, weights.dtype):
            means, variances = self.target
            size, largest = weights.numel() / len(weights), torch.finfo(weights.dtype).max
            columns = means, variances, torch.full_like(means, size), torch.full_like(means, largest)
            self.goals, self.place = torch.stack(columns, 1).to(weights.device), (weights.device, weights.dtype)
        return self.goals

    def values(self) -> Tensor:
        """The weights as they lie, in double precision, [C, n]."""
        return in_memory_order(self.parameter).reshape(len(self.parameter), -1).to(torch.float64)


class ChannelUnits:
    """A layer's channels all at once: as rows; or by PyTorch, in double precision, which takes a layer's memory."""

    def __init__(self, parameters: Mapping[str, Tensor], target: WeightScope, kind: Kind, report: Report) -> None:
        self._kind, self._report = kind, report
        self._layers: list[_Layer] = []
        counts = [len(weights) for weights in parameters.values()]
        goals = (torch.split(each.detach().clone(), counts) for each in (target.means, target.variances))
        for (name, weights), means, variances in zip(parameters.items(), *goals, strict=True):
            if weights.numel():
                rows = Rows(weights, means.tolist(), variances.tolist(), kind)
                self._layers.append(_Layer(name, weights, rows, (means, variances)))

    def pull(self, s: float, held: Held, into_gradient: bool) -> None:
        """See `Units`."""
        others: dict[torch.device, list[_Layer]] = {}
        for layer in self._layers:
            if is_written(layer.parameter, held):
                number = layer.rows.pull(s, into_gradient)
                if number is None:
                    others.setdefault(layer.parameter.device, []).append(layer)
                elif number:
                    self._report_of(layer, layer.rows.left)
        for layers in others.values():
            self._pull_by_torch(layers, s, into_gradient)

    @torch.no_grad()
    def _pull_by_torch(self, layers: Sequence[_Layer], s: float, into_gradient: bool) -> None:
        """All that is of a channel is computed for the layers together, since a card is quicker than Python."""
        moments = [torch.var_mean(each.values(), 1, correction=0) for each in layers]
        variances, means = (torch.cat([pair[part] for pair in moments]) for part in (0, 1))
        target_means, target_variances, sizes, largest = torch.cat([each.goals_here() for each in layers]).unbind(1)
        a, b = terms_of(self._kind)(variances, target_means - means, target_variances, sizes, s)
        reach = (sizes * variances).sqrt()  # see `units.fits`
        most = a.abs() + b.abs() * reach.clamp(min=1.0) + (0 if into_gradient else means.abs() + reach)
        left = ~(usable_mask(means, variances) & usable_mask(target_means, target_variances) & (most <= largest))
        counts = [len(each.parameter) for each in layers]
        parts = zip(*(torch.split(each.unsqueeze(1), counts) for each in (means, a, b, left)), strict=True)
        numbers = []
        for layer, (mean, constant, slope, left_here) in zip(layers, parts, strict=True):
            numbers.append(left_here.sum())
            weights = layer.parameter
            if into_gradient and weights.grad is None and left_here.all():
                continue
            change = torch.addcmul(constant, layer.values() - mean, slope).masked_fill_(left_here, NOTHING)
            change = change.reshape(in_memory_order(weights).shape)
            change = change.permute(0, 3, 1, 2) if lies_channels_last(weights) else change
            (gradient_of(weights) if into_gradient else weights).add_(change)
        found = torch.stack(numbers).tolist()  # Python waits for the card here alone
        for layer, number, left_here in zip(layers, found, torch.split(left, counts), strict=True):
            if number:
                self._report_of(layer, left_here)

    def _report_of(self, layer: _Layer, left: Tensor) -> None:
        self._report([channel_name(layer.name, i) for i in left.nonzero()[:, 0].tolist()])
