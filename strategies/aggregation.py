"""Sums over replies. What is summed can be done in parts and put together, by `fedwsa.simulation.folding`."""

from typing import Any, Self

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from numpy.typing import NDArray

from fedwsa import messages
from fedwsa.arrays import NumpyArray, as_type, view
from fedwsa.scope import WeightScope, fuse, scope_distance

SCOPE_DISTANCE = "scope-distance"


def weight_of(metrics: MetricRecord) -> float:
    """Number of examples behind a reply."""
    return float(metrics[messages.NUM_EXAMPLES])  # type: ignore[arg-type]


class MeanModel:
    """Σ w_k θ_k / Σ w_k, one model's memory whatever the cohort: float64 sums, the arrays' own types at the end.

    Integer arrays (counters) are averaged in float64 too and rounded to the nearest.
    """

    def __init__(self) -> None:
        self.layout: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}  # shape and type by name
        self.sums: NDArray[np.float64] = np.empty(0)  # all arrays after each other
        self.weight = 0.0

    def add(self, arrays: ArrayRecord, weight: float) -> None:
        """Raises ValueError naming what differs, where names or shapes do."""
        values = {name: view(array) for name, array in arrays.items()}
        one = MeanModel()
        one.layout = {name: (value.shape, value.dtype) for name, value in values.items()}
        one.sums = np.empty(sum(value.size for value in values.values()))
        one.weight = weight
        start = 0
        for value in values.values():
            part = one.sums[start : start + value.size].reshape(value.shape)
            np.multiply(value, weight, out=part, dtype=np.float64)
            start += value.size
        self.merge(one)

    def merge(self, later: Self) -> None:
        """Take over what another has summed; it is not used again. Raises ValueError as `add`."""
        if not later.layout:
            return
        if not self.layout:
            self.layout, self.sums, self.weight = later.layout, later.sums, later.weight
            return
        if unlike := self.layout.keys() ^ later.layout.keys():
            raise ValueError(f"array names differ: {sorted(unlike)}")
        for name, (shape, _) in later.layout.items():
            if shape != self.layout[name][0]:
                raise ValueError(f"{name}: shape {shape}, others have {self.layout[name][0]}")
        self.sums += later.sums if list(self.layout) == list(later.layout) else later.ordered(list(self.layout))
        self.weight += later.weight

    def ordered(self, names: list[str]) -> NDArray[np.float64]:
        """The sums with the arrays in another order."""
        parts = self._parts()
        return np.concatenate([parts[name].ravel() for name in names])

    def record(self) -> ArrayRecord:
        """The mean of what was added."""
        mean = ArrayRecord()
        for name, total in self._parts().items():
            mean[name] = NumpyArray(as_type(total / self.weight, self.layout[name][1]))
        return mean

    def _parts(self) -> dict[str, NDArray[np.float64]]:
        parts, start = {}, 0
        for name, (shape, _) in self.layout.items():
            size = int(np.prod(shape))
            parts[name] = self.sums[start : start + size].reshape(shape)
            start += size
        return parts


class MeanMetrics:
    """Weighted mean of each scalar metric over the clients that report it."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def add(self, metrics: MetricRecord, weight: float) -> None:
        """Lists and the weight itself are left out."""
        for key, value in metrics.items():
            if key != messages.NUM_EXAMPLES and not isinstance(value, list):
                self.sums[key] = self.sums.get(key, 0.0) + weight * value
                self.weights[key] = self.weights.get(key, 0.0) + weight

    def merge(self, later: Self) -> None:
        """Add what another has summed."""
        for key, total in later.sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + total
            self.weights[key] = self.weights.get(key, 0.0) + later.weights[key]

    def record(self) -> MetricRecord:
        """The means of what was added."""
        return MetricRecord({key: total / self.weights[key] for key, total in self.sums.items()})


class ScopeStatistics:
    """The weight scopes of a round's clients: fused, and how far the clients lie from the fusion."""

    def __init__(self) -> None:
        self.layers: list[tuple[str, ...]] = []  # of each client, like the other two
        self.numbers: list[tuple[list[float], list[float]]] = []  # means and variances
        self.weights: list[float] = []

    def take(self, arrays: ArrayRecord, metrics: MetricRecord) -> None:
        """Take a reply's scope out of its metrics; a reply without one counts for nothing here."""
        layers = messages.layer_names(arrays)
        if numbers := messages.take_scope(metrics, len(layers)):
            self.layers.append(layers)
            self.numbers.append(numbers)
            self.weights.append(weight_of(metrics))

    def merge(self, later: Self) -> None:
        """Take over another's."""
        self.layers += later.layers
        self.numbers += later.numbers
        self.weights += later.weights

    def fused(self, variance: str = "mean", merged: WeightScope | None = None) -> WeightScope | None:
        """See `fedwsa.scope.fuse`; None if no client sent a scope."""
        return fuse(self._scopes(), self.weights, variance, merged) if self.numbers else None

    def metrics(self, fused: WeightScope | None) -> dict[str, list[float]]:
        """The fused scope, and the distance Σ_k p_k KL(client k ‖ fused) in nats; one number a layer each."""
        if fused is None:
            return {}
        distance = scope_distance(self._scopes(), self.weights, fused)
        return {**messages.pack_scope(fused), SCOPE_DISTANCE: distance.tolist()}

    def _scopes(self) -> list[WeightScope]:
        table = torch.tensor(self.numbers, dtype=torch.float64)
        return [WeightScope(names, *rows) for names, rows in zip(self.layers, table, strict=True)]


class MeanFold:
    """Weighted means of models and metrics, and the scopes: what FedAvg makes of replies, as a `Fold`."""

    def __init__(self) -> None:
        self.model, self.metrics, self.scopes = MeanModel(), MeanMetrics(), ScopeStatistics()

    def add(self, reply: Message) -> None:
        """A reply that passed the gate."""
        arrays, own = messages.arrays_of(reply), messages.metrics_of(reply)
        self.scopes.take(arrays, own)
        self.model.add(arrays, weight_of(own))
        self.metrics.add(own, weight_of(own))

    def merge(self, later: Self) -> None:
        """See `Fold`."""
        self.model.merge(later.model)
        self.metrics.merge(later.metrics)
        self.scopes.merge(later.scopes)
