"""FedLWS. Shi, Li, Zhao, Guo, Chang, ICLR 2025, arXiv 2503.15111, algorithm 1."""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Self

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from numpy.typing import NDArray

from fedwsa import messages
from fedwsa.arrays import NumpyArray, as_type, view
from fedwsa.config import Config
from fedwsa.simulation.folding import Fold, fold
from strategies.aggregation import MeanModel, Weigh
from strategies.fedavg import cohorts
from strategies.holdout import Holdout
from strategies.sampling import each
from strategies.updates import OfUpdates, UpdateFold, square, squares


class FedLWS(OfUpdates):
    """FedAvg, and then each layer is shrunk, the more the less the clients' updates of it agree.

    x_l ← γ_l ŵ_l with ŵ the weighted mean of the clients' models, γ_l = ‖x_l‖ / (‖x_l‖ + τ_l ‖ŵ_l − x_l‖) and
    τ_l = β · s_l, held between its limits; s_l says how far the updates of the layer lie from their plain mean. It acts
    as weight decay by the server, layer by layer, the stronger the longer the updates are, so that no fixed objective
    is minimised; without it that is FedAvg's, Σ p_k f_k with p_k the clients' shares of the examples.

    beta, min_tau, max_tau: β and the limits, 0.03, 0.01 and 0.2 in the authors' code (ChanglongShi/FedLWS), which is
    our source for all of this; max_tau = 0 is FedAvg, bit for bit.

    As there a layer is the parameters up to and with the next bias, so that a convolution without one goes with its
    normalisation. Ours: s_l = √(mean_k ‖Δ_k − Δ̄‖²) where the authors take mean_k ‖Δ_k − Δ̄‖, for which all updates
    have to be there at once (never smaller, and equal for two clients); parameters after the last bias are a layer too;
    BatchNorm's statistics belong to no layer and are not shrunk, nor are arrays that no client moved, such as those
    that stay with the clients (`batch-norm = "local"`); a layer that is zero is left to the mean; a weight under
    several names belongs to the layer of the first.

    tied: of parameters under several names, the first one by each of the others.
    """

    def __init__(
        self,
        cohort: int,
        *,
        beta: float = 0.03,
        min_tau: float = 0.01,
        max_tau: float = 0.2,
        tied: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(cohort, **options)
        self.tied = tied or {}
        self.beta = beta
        self.min_tau = min_tau
        self.max_tau = max_tau

    @classmethod
    def from_config(cls, config: Config, holdout: Holdout) -> Self:
        """As a run's config says; the server's held-out samples are not used."""
        return cls(
            **cohorts(config),
            parameters=holdout.trainable - holdout.second_names.keys(),
            tied=holdout.second_names,
            beta=config.fedlws.beta,
            min_tau=config.fedlws.min_tau,
            max_tau=config.fedlws.max_tau,
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The shrunk mean; metrics as FedAvg gives them."""
        return self.conclude_train(server_round, fold(partial(_SpreadFold, self.weigh, self.origin()), each(replies)))

    def conclude_train(self, server_round: int, folded: Fold | None) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What `aggregate_train` gives, from the fold of the replies."""
        mean, metrics = super().conclude_train(server_round, folded)
        if mean is None:
            return None, metrics
        assert isinstance(folded, _SpreadFold)
        start, spread = self.origin(), folded.spread()
        moved = squares(mean, start)
        for whole in layers(start):
            layer = [name for name in whole if folded.squares[name] > 0]
            way = math.sqrt(sum(moved[name] for name in layer))
            size = math.sqrt(sum(square(start[name].reshape(-1)) for name in layer))
            tau = min(max(self.beta * math.sqrt(sum(spread[name] for name in layer)), self.min_tau), self.max_tau)
            gamma = size / (size + tau * way) if size else 1.0
            for name in layer:
                values = view(mean[name])
                mean[name] = NumpyArray(as_type(gamma * values.astype(np.float64), values.dtype))
        for name, first in self.tied.items():
            mean[name] = mean[first]
        return mean, metrics


class _SpreadFold(UpdateFold):
    """And the plain mean of the models, for the spread of the updates."""

    def __init__(self, weigh: Weigh, start: Mapping[str, NDArray[Any]]) -> None:
        super().__init__(weigh, start)
        self.plain = MeanModel()

    def add(self, reply: Message) -> None:
        super().add(reply)
        self.plain.add(messages.arrays_of(reply), 1.0)

    def merge(self, later: Self) -> None:
        super().merge(later)
        self.plain.merge(later.plain)

    def spread(self) -> dict[str, float]:
        """mean_k ‖Δ_k − Δ̄‖² of each parameter, as mean_k ‖Δ_k‖² − ‖Δ̄‖²."""
        of_mean = squares(self.plain.record(), self.start)
        return {name: max(0.0, total / self.plain.weight - of_mean[name]) for name, total in self.squares.items()}


def layers(names: Iterable[str]) -> list[list[str]]:
    """Parameters cut after each bias, see `FedLWS`."""
    cut: list[list[str]] = [[]]
    for name in names:
        cut[-1].append(name)
        if "bias" in name.rpartition(".")[2]:
            cut.append([])
    return [layer for layer in cut if layer]
