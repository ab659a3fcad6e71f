"""FedDyn. Acar et al., arXiv 2111.04263, algorithm 1."""

import math
from typing import Any, Self

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from numpy.typing import NDArray
from torch import Tensor

from fedwsa import messages
from fedwsa.arrays import NumpyArray, as_type, view
from fedwsa.config import Config
from fedwsa.simulation.folding import Fold
from strategies.aggregation import equal
from strategies.fedavg import cohorts
from strategies.holdout import Holdout
from strategies.updates import OfUpdates, pack_kept, unpack_kept


class FedDyn(OfUpdates):
    """Clients' losses get a linear and a proximal term that move from round to round (`clients.objectives`).

    h ← h − α |P|/N · (mean w_k − x), x ← mean w_k − h/α, plain means over the clients P whose replies are usable. It
    minimises the plain mean of the clients' losses: at a fixed point all w_k = x, g_i = ∇f_i(x) and h = 0, whatever α
    and however many steps a client makes. h = 0 at first, so that it is the mean of all N clients' g_i; no longer where
    a reply is lost, whose client has moved its own. h is kept in float64.

    The authors' code differs from their algorithm, which this is: client i has α divided by n_i/mean n, whereby the
    losses are weighted by their samples, and the model that is tested is mean w_k, not x.

    num_clients: N, of all clients, connected at the moment or not.
    alpha: α > 0; the paper takes the best of 0.1, 0.01 and 0.001 for each data set; 0.01 is our default.
    """

    def __init__(self, cohort: int, *, num_clients: int, alpha: float = 0.01, **options: Any) -> None:
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be > 0 and finite, got {alpha!r}")
        super().__init__(cohort, **options)
        self.num_clients = num_clients
        self.alpha = alpha
        self.h: dict[str, NDArray[np.float64]] = {}  # what is not there is 0

    weigh = staticmethod(equal)

    @classmethod
    def from_config(cls, config: Config, holdout: Holdout) -> Self:
        """As a run's config says; the server's held-out samples are not used."""
        return cls(
            **cohorts(config),
            parameters=holdout.trainable,
            num_clients=config.num_clients,
            alpha=config.feddyn.alpha,
        )

    def asked(self) -> dict[str, bool | float | str]:
        """The objective, with α."""
        return {messages.OBJECTIVE: "feddyn", messages.DYNAMIC_ALPHA: self.alpha}

    def conclude_train(self, server_round: int, folded: Fold | None) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """x, from the fold of the replies; metrics as FedAvg gives them."""
        means, metrics = super().conclude_train(server_round, folded)
        if means is None:
            return None, metrics
        share = folded.model.weight / self.num_clients  # type: ignore[union-attr]
        for name, x in self.origin().items():
            mean = view(means[name])
            self.h[name] = self.h.get(name, 0.0) - self.alpha * share * (mean.astype(np.float64) - x)
            means[name] = NumpyArray(as_type(mean - self.h[name] / self.alpha, mean.dtype))
        return means, metrics

    def state(self) -> dict[str, Tensor]:
        """h."""
        return pack_kept("h", self.h)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        self.h = unpack_kept("h", state)
