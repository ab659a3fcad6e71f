"""Each channel of a layer a unit."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedwsa.aligned.rows import Rows
from fedwsa.aligned.units import (
    LEAST,
    Held,
    Kind,
    Report,
    gradient_of,
    in_memory_order,
    is_written,
    lies_channels_last,
    single,
    terms_of,
)
from fedwsa.divergence import usable_mask
from fedwsa.granularity import channel_name
from fedwsa.scope import WeightScope, centred

NOTHING = -0.0
"""What is added where nothing may change: x + (−0.0) is x, the sign of a zero included."""


class _Layer(NamedTuple):
    """A layer's parameter, and its channels' targets, float64 [C, 1]."""

    name: str
    parameter: Tensor
    target_means: Tensor
    target_variances: Tensor
    rows: Rows


class ChannelUnits:
    """A layer's channels all at once: as rows, or by PyTorch in single precision, or in double.

    What is computed is of w − μ, so that nothing cancels however far μ is from 0; there it takes a layer's memory.
    """

    def __init__(self, parameters: Mapping[str, Tensor], target: WeightScope, kind: Kind, report: Report) -> None:
        self._terms, self._report = terms_of(kind), report
        counts = [len(weights) for weights in parameters.values()]
        goals = (torch.split(each.unsqueeze(1), counts) for each in (target.means, target.variances))
        self._layers = [
            _Layer(name, weights, means, variances, Rows(weights, means[:, 0].numpy(), variances[:, 0].numpy(), kind))
            for (name, weights), means, variances in zip(parameters.items(), *goals, strict=True)
            if weights.numel()
        ]

    def add_gradient(self, s: float, held: Held = None) -> None:
        """See `Units`."""
        self._pull(s, held, into_gradient=True)

    def move(self, s: float, held: Held = None) -> None:
        """See `Units`."""
        self._pull(s, held, into_gradient=False)

    def _pull(self, s: float, held: Held, *, into_gradient: bool) -> None:
        for layer in self._layers:
            if not is_written(layer.parameter, held):
                continue
            left = layer.rows.pull(s, into_gradient=into_gradient)
            if left is None:
                self._pull_by_torch(layer, s, into_gradient=into_gradient)
            elif left:
                self._report_of(layer, torch.from_numpy(layer.rows.left))

    @torch.no_grad()
    def _pull_by_torch(self, layer: _Layer, s: float, *, into_gradient: bool) -> None:
        weights = layer.parameter
        found = self._change(layer, s, single(weights.dtype)) or self._change(layer, s, torch.float64)
        assert found is not None
        change, left = found
        if left.any():
            self._report_of(layer, left)
            change.masked_fill_(left.unsqueeze(1), NOTHING)
        if not left.all():
            change = change.reshape(in_memory_order(weights).shape)
            change = change.permute(0, 3, 1, 2) if lies_channels_last(weights) else change
            (gradient_of(weights) if into_gradient else weights).add_(change)

    def _change(self, layer: _Layer, s: float, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """What is to be added, [C, n] as the weights lie, and which channels are left alone, [C].

        None where this dtype is not enough: the squares of some channel overflow, or lose digits to underflow.
        """
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
        a, b = self._terms(variances, target_means - means, target_variances, size, s)
        furthest = (size * variances).sqrt().clamp(min=1.0)  # no weight is further from the mean; and b has to fit too
        fits = a.abs() + means.abs() + (1 + b.abs()) * furthest <= torch.finfo(weights.dtype).max
        ready = usable_mask(means, variances) & usable_mask(target_means, target_variances) & fits
        change = torch.addcmul(a.to(dtype), deviations, b.to(dtype), out=deviations)
        return change, ~ready[:, 0]

    def _report_of(self, layer: _Layer, left: Tensor) -> None:
        self._report([channel_name(layer.name, i) for i in left.nonzero()[:, 0].tolist()])
