"""Running sums over replies, in the order in which they are added."""

from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
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
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.types: dict[str, np.dtype[Any]] = {}
        self.weight = 0.0

    def add(self, arrays: ArrayRecord, weight: float) -> None:
        """Raises ValueError naming what differs, where names or shapes do."""
        if self.sums and (unlike := self.sums.keys() ^ arrays.keys()):
            raise ValueError(f"array names differ: {sorted(unlike)}")
        for name, array in arrays.items():
            values = view(array)
            if name not in self.sums:
                self.sums[name] = np.zeros(values.shape)
                self.types[name] = values.dtype
            if values.shape != self.sums[name].shape:
                raise ValueError(f"{name}: shape {values.shape}, others have {self.sums[name].shape}")
            self.sums[name] += np.multiply(values, weight, dtype=np.float64)
        self.weight += weight

    def record(self) -> ArrayRecord:
        """The mean of what was added."""
        record = ArrayRecord()
        for name, total in self.sums.items():
            record[name] = NumpyArray(as_type(total / self.weight, self.types[name]))
        return record


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

    def record(self) -> MetricRecord:
        """The means of what was added."""
        return MetricRecord({key: total / self.weights[key] for key, total in self.sums.items()})


class ScopeStatistics:
    """The weight scopes of a round's clients: fused, and how far the clients lie from the fusion."""

    def __init__(self) -> None:
        self.scopes: list[WeightScope] = []
        self.weights: list[float] = []

    def take(self, arrays: ArrayRecord, metrics: MetricRecord) -> None:
        """Take a reply's scope out of its metrics; a reply without one counts for nothing here."""
        scope = messages.take_scope(metrics, messages.layer_names(arrays))
        if scope is not None:
            self.scopes.append(scope)
            self.weights.append(weight_of(metrics))

    def fused(self, variance: str = "mean", merged: WeightScope | None = None) -> WeightScope | None:
        """See `fedwsa.scope.fuse`; None if no client sent a scope."""
        return fuse(self.scopes, self.weights, variance, merged) if self.scopes else None

    def metrics(self, fused: WeightScope | None) -> dict[str, list[float]]:
        """The fused scope, and the distance Σ_k p_k KL(client k ‖ fused) in nats; one number a layer each."""
        if fused is None:
            return {}
        distance = scope_distance(self.scopes, self.weights, fused)
        return {**messages.pack_scope(fused), SCOPE_DISTANCE: distance.tolist()}
