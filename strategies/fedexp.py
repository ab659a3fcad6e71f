"""FedExP. Jhunjhunwala, Wang, Joshi, arXiv 2301.09604, algorithm 1."""

from collections.abc import Iterable
from functools import partial
from typing import Any, Self

from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from fedwsa.arrays import pack, unpack
from fedwsa.config import Config
from fedwsa.simulation.folding import Fold, fold
from strategies.aggregation import equal
from strategies.fedavg import cohorts
from strategies.holdout import Holdout
from strategies.sampling import each
from strategies.updates import OfUpdates, UpdateFold, squares

SERVER_STEP = "server-step"


class FedExP(OfUpdates):
    """The server goes further along the mean update the less the clients' updates agree.

    x ← x − η_g Δ̄ with Δ_k = x − y_k, Δ̄ their plain mean over the M usable replies of the round, and
    η_g = max(1, Σ_k ‖Δ_k‖² / (2M (‖Δ̄‖² + ε))), over all parameters together. It minimises the plain mean of the
    clients' losses, as far as FedAvg with equal weights would, whose fixed points are its own. It need not settle there
    if the clients' minima differ: Δ̄ vanishes and the Δ_k do not, so that η_g grows to Σ ‖Δ_k‖² / (2Mε).

    epsilon: ε > 0; the authors take the best for each data set, 0.001 on CIFAR and CINIC-10 (our default), 0.1 on
    EMNIST. Their code (Divyansh03/FedExP) differs from their algorithm, which this is: there ε is multiplied by the
    cohort's size and falls with the square of the learning rate's decay, and clients count by their examples.

    Long steps make x swing, so that, as in the paper, the mean of the last two is evaluated and kept at the end;
    clients go on from the last. η_g is among the metrics of the training, `server-step`.
    """

    weigh = staticmethod(equal)

    def __init__(self, cohort: int, *, epsilon: float = 0.001, **options: Any) -> None:
        super().__init__(cohort, **options)
        self.epsilon = epsilon

    @classmethod
    def from_config(cls, config: Config, holdout: Holdout) -> Self:
        """As a run's config says; the server's held-out samples are not used."""
        return cls(**cohorts(config), parameters=holdout.trainable, epsilon=config.fedexp.epsilon)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """x after the server's step; metrics as FedAvg gives them, and η_g."""
        return self.conclude_train(server_round, fold(partial(UpdateFold, self.weigh, self.origin()), each(replies)))

    def conclude_train(self, server_round: int, folded: Fold | None) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What `aggregate_train` gives, from the fold of the replies."""
        mean, metrics = super().conclude_train(server_round, folded)
        if mean is None:
            return None, metrics
        assert isinstance(folded, UpdateFold)
        of_mean = sum(squares(mean, self.origin()).values())
        clients = folded.model.weight
        step = max(1.0, sum(folded.squares.values()) / (2 * clients * (of_mean + self.epsilon)))
        return self.stepped(mean, step), MetricRecord({**(metrics or {}), SERVER_STEP: step})

    def result(self, arrays: ArrayRecord) -> ArrayRecord:
        """The parameters' mean of the last two models, in their types; what is no parameter is the last one's.

        arrays: the model after the last round.
        """
        return self.stepped(arrays.copy(), 0.5)

    def state(self) -> dict[str, Tensor]:
        """The model before the last."""
        return unpack(self.sent)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        self.sent = pack(state)
