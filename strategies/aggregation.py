"""Sums over replies. What is summed can be done in parts and put together, by `fedwsa.simulation.folding`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from numpy.typing import NDArray

from fedwsa import messages
from fedwsa.arrays import as_type, record_of, view
from fedwsa.granularity import layer_of
from fedwsa.scope import Scopes, WeightScope, fuse, scope_distance, scope_spread
from fedwsa.warmup import loops_for

SCOPE_DISTANCE, TARGET_DISTANCE = "scope-distance", "target-distance"
SCOPE_MEAN_SPREAD, SCOPE_STD_SPREAD = "scope-mean-spread", "scope-std-spread"
AT_ONCE = 8  # replies that are summed in one pass, a power of two
STRETCH = 1 << 14  # numbers that NumPy sums at a time: 128 KiB


def weight_of(metrics: MetricRecord) -> float:
    """Number of examples behind a reply."""
    return float(metrics[messages.NUM_EXAMPLES])  # type: ignore[arg-type]


def equal(metrics: MetricRecord) -> float:
    """1 for every reply."""
    return 1.0


Weigh = Callable[[MetricRecord], float]  # a reply's weight in the mean of models and the fusion of scopes


@dataclass(frozen=True, slots=True)
class _Reply:
    """One client's arrays, flat, and its weight."""

    values: list[NDArray[Any]]
    weight: float


class MeanModel:
    """Σ w_k θ_k / Σ w_k, one model's memory whatever the cohort: float64 sums, the arrays' own types at the end.

    Integer arrays (counters) are averaged in float64 too and rounded to the nearest. Replies are not copied when they
    are added but summed some at a time: models do not fit the processor's cache, and each pass over one counts.
    """

    def __init__(self) -> None:
        self.layout: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}  # shape and type by name
        self.weight = 0.0
        self._replies: list[_Reply] = []  # that are not summed yet: a power of two, to be added in pairs
        self._sums: NDArray[np.float64] | None = None  # flat, array by array; None while there are replies

    def add(self, arrays: ArrayRecord, weight: float) -> None:
        """Raises ValueError naming what differs, where names or shapes do."""
        values = {name: view(array) for name, array in arrays.items()}
        one = MeanModel()
        one.layout = {name: (value.shape, value.dtype) for name, value in values.items()}
        one.weight = weight
        one._replies = [_Reply([value.reshape(-1) for value in values.values()], weight)]
        self.merge(one)

    def merge(self, later: "MeanModel") -> None:
        """Take over what another has summed; it is not used again. Raises ValueError as `add`."""
        if not later._replies and later._sums is None:
            return
        if not self._replies and self._sums is None:
            self.__dict__.update(later.__dict__)
            return
        if list(self.layout) != list(later.layout):
            later._put_in_order(list(self.layout))
        for name, (shape, _) in self.layout.items():
            if shape != later.layout[name][0]:
                raise ValueError(f"{name}: shape {later.layout[name][0]}, others have {shape}")
        self.weight += later.weight
        if len(self._replies) == len(later._replies) > 0:
            self._replies = self._replies + later._replies
            if len(self._replies) == AT_ONCE:
                self._settle()
            return
        sums = self._settle()
        self._sums = sums = sums if sums.flags.writeable else sums.copy()
        if later._sums is not None:
            sums += later._sums
            return
        weights = later._weights()
        for total, values in later._unsummed(sums):  # an array after the other: a model's sums are large
            total += _weighted_sum(values, weights, np.empty(len(total)))

    def record(self) -> ArrayRecord:
        """The mean of what was added."""
        sums = self._by_array(self._settle())
        return record_of(
            {
                name: as_type((sums[name] / self.weight).reshape(shape), kind)
                for name, (shape, kind) in self.layout.items()
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        """What travels is the sums, or the one reply as it came, which is half as large."""
        if len(self._replies) > 1:
            self._settle()
        return self.__dict__

    def _settle(self) -> NDArray[np.float64]:
        """The sums, in place of replies; empty where nothing was added."""
        if self._sums is None:
            self._sums = np.empty(sum(prod(shape) for shape, _ in self.layout.values()))
            weights = self._weights()
            for total, values in self._unsummed(self._sums):
                _weighted_sum(values, weights, total)
            self._replies = []
        return self._sums

    def _weights(self) -> NDArray[np.float64]:
        return np.array([reply.weight for reply in self._replies], np.float64)

    def _unsummed(self, sums: NDArray[np.float64]) -> Iterator[tuple[NDArray[np.float64], Sequence[NDArray[Any]]]]:
        """Each array's part of the sums, and the replies' vectors for it."""
        vectors = zip(*(reply.values for reply in self._replies), strict=True)
        return zip(self._by_array(sums).values(), vectors, strict=True)

    def _by_array(self, sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Each array's part of the sums, flat."""
        parts, start = {}, 0
        for name, (shape, _) in self.layout.items():
            end = start + prod(shape)
            parts[name], start = sums[start:end], end
        return parts

    def _put_in_order(self, names: list[str]) -> None:
        if unlike := set(names) ^ self.layout.keys():
            raise ValueError(f"array names differ: {sorted(unlike)}")
        sums = self._by_array(self._settle())
        self.layout = {name: self.layout[name] for name in names}
        self._sums = np.concatenate([sums[name] for name in names])


def _weighted_sum(
    values: Sequence[NDArray[Any]], weights: NDArray[np.float64], total: NDArray[np.float64]
) -> NDArray[np.float64]:
    """total = Σ weights_k · values_k, of a power of two of vectors, in pairs; the same bits whichever way."""
    if len(values) in (2, 4, 8) and (loops := loops_for(*values)):
        add = {2: loops.sum_of_2, 4: loops.sum_of_4, 8: loops.sum_of_8}[len(values)]
        add(total, tuple(values), weights)
        return total
    for start in range(0, len(total), STRETCH):
        stretch = slice(start, start + STRETCH)
        total[stretch] = _in_pairs([each[stretch] for each in values], weights)
    return total


def _in_pairs(values: Sequence[NDArray[Any]], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(values) == 1:
        product: NDArray[np.float64] = values[0].astype(np.float64, casting="same_kind") * weights[0]
        return product
    half = len(values) // 2
    return _in_pairs(values[:half], weights[:half]) + _in_pairs(values[half:], weights[half:])


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
    """The weight scopes of a round's clients: fused, and how far the clients lie from the fusion.

    By layer, or by the units of another granularity, of which replies have a scope besides.
    """

    def __init__(self, granularity: str = "layer", weigh: Weigh = weight_of) -> None:
        self.granularity = granularity
        self.weigh = weigh
        self.layers: list[tuple[str, ...]] = []  # of each client, like the other two
        self.numbers: list[tuple[list[float], list[float]]] = []  # means and variances
        self.weights: list[float] = []

    def take(self, arrays: ArrayRecord, metrics: MetricRecord) -> None:
        """Take a reply's scope out of its metrics; a reply without one counts for nothing here."""
        layers = tuple(messages.unit_sizes(arrays, self.granularity))
        if numbers := messages.take_scope(metrics, len(layers), self.granularity):
            self.layers.append(layers)
            self.numbers.append(numbers)
            self.weights.append(self.weigh(metrics))

    def merge(self, later: Self) -> None:
        """Take over another's."""
        self.layers += later.layers
        self.numbers += later.numbers
        self.weights += later.weights

    def fused(self, variance: str = "mean", merged: WeightScope | None = None) -> WeightScope | None:
        """See `fedwsa.scope.fuse`; None if no client sent a scope."""
        return fuse(self.scopes(), self.weights, variance, merged) if self.numbers else None

    def metrics(self, fused: WeightScope | None) -> dict[str, list[float]]:
        """The fused scope, the distance Σ_k p_k KL(client k ‖ fused) in nats, and the spread of the clients' μ and σ.

        One number a layer each.
        """
        if fused is None:
            return {}
        scopes = self.scopes()
        mean_spread, std_spread = scope_spread(scopes, self.weights)
        return {
            **messages.pack_scope(fused),
            SCOPE_DISTANCE: scope_distance(scopes, self.weights, fused).tolist(),
            SCOPE_MEAN_SPREAD: mean_spread.tolist(),
            SCOPE_STD_SPREAD: std_spread.tolist(),
        }

    def target_metrics(self, target: WeightScope) -> dict[str, list[float]]:
        """The distance Σ_k p_k KL(client k ‖ target) in nats; nothing where no client sent a scope.

        One number a layer, the sum over its units (0 if the target names none of them); a single one where the unit is
        the whole model.
        """
        if not self.numbers:
            return {}
        distances = scope_distance(self.scopes().only(target.names), self.weights, target).tolist()
        totals = dict.fromkeys((layer_of(unit, self.granularity) for unit in self.layers[0]), 0.0)
        for unit, distance in zip(target.names, distances, strict=True):
            totals[layer_of(unit, self.granularity)] += distance
        return {TARGET_DISTANCE: list(totals.values())}

    def scopes(self) -> Scopes:
        """All of them. Raises ValueError if the clients' layers differ."""
        table = torch.tensor(self.numbers, dtype=torch.float64)  # [K, 2, L]
        if unlike := next((layers for layers in self.layers if layers != self.layers[0]), None):
            raise ValueError(f"clients' layers differ: {sorted(set(unlike) ^ set(self.layers[0]))}")
        return Scopes(self.layers[0], table[:, 0], table[:, 1])


class MeanFold:
    """Weighted means of models and metrics, and the scopes: what FedAvg makes of replies, as a `Fold`.

    Metrics are weighted by examples however models and scopes are.
    """

    def __init__(self, weigh: Weigh = weight_of) -> None:
        self.model, self.metrics, self.scopes = MeanModel(), MeanMetrics(), ScopeStatistics(weigh=weigh)
        self.weigh = weigh

    def add(self, reply: Message) -> None:
        """A reply that passed the gate."""
        arrays, own = messages.arrays_of(reply), messages.metrics_of(reply)
        self.scopes.take(arrays, own)
        self.model.add(arrays, self.weigh(own))
        self.metrics.add(own, weight_of(own))

    def merge(self, later: Self) -> None:
        """See `Fold`."""
        self.model.merge(later.model)
        self.metrics.merge(later.metrics)
        self.scopes.merge(later.scopes)
