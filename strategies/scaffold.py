"""SCAFFOLD. Karimireddy et al., arXiv 1910.06378, algorithm 1."""

from collections.abc import Iterable
from functools import partial
from typing import Any, Self

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import Tensor

from fedwsa import messages
from fedwsa.arrays import as_type, record_of, view
from fedwsa.config import Config
from fedwsa.simulation.folding import Fold, MakeFold, fold
from strategies.aggregation import MeanFold, MeanModel, Weigh, equal
from strategies.fedavg import cohorts
from strategies.holdout import Holdout
from strategies.sampling import each
from strategies.updates import OfUpdates, pack_kept, unpack_kept


class Scaffold(OfUpdates):
    """Clients' steps are corrected by c − c_i, the control variates of server and client (`clients.objectives`).

    x ← (1 − η_g) x + η_g · mean y_i, c ← c + |S|/N · mean (c_i⁺ − c_i), plain means over the clients S whose replies
    are usable. It minimises the plain mean of the clients' losses: at a fixed point Σ ∇f_i(x) = 0, also where clients
    make unlike numbers of steps. c = 0 at first, so that it is the mean of all N clients' c_i; no longer where a reply
    is lost, whose client has moved its own. c is kept in float64 and sent in the parameters' type.

    num_clients: N, of all clients, connected at the moment or not.
    option: what the c_i become, "I" or "II"; the paper's experiments use II.
    server_learning_rate: η_g > 0; the paper's experiments use 1.
    """

    def __init__(
        self, cohort: int, *, num_clients: int, option: str = "II", server_learning_rate: float = 1.0, **options: Any
    ) -> None:
        if option not in ("I", "II"):
            raise ValueError(f"option must be I or II, got {option!r}")
        super().__init__(cohort, **options)
        self.num_clients = num_clients
        self.option = option
        self.server_learning_rate = server_learning_rate
        self.control: dict[str, NDArray[np.float64]] = {}  # c; what is not there is 0

    weigh = staticmethod(equal)

    @classmethod
    def from_config(cls, config: Config, holdout: Holdout) -> Self:
        """As a run's config says; the server's held-out samples are not used."""
        return cls(
            **cohorts(config),
            parameters=holdout.trainable,
            num_clients=config.num_clients,
            option=config.scaffold.option,
            server_learning_rate=config.scaffold.server_learning_rate,
        )

    def asked(self) -> dict[str, bool | float | str]:
        """The objective, with its option."""
        return {messages.OBJECTIVE: "scaffold", messages.CONTROL_OPTION: self.option}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The model, c and the objective, to a cohort."""
        outgoing = list(super().configure_train(server_round, arrays, config, grid))
        control = record_of(
            {name: as_type(self.control.get(name, np.zeros(x.shape)), x.dtype) for name, x in self.origin().items()}
        )
        for message in outgoing:
            message.content[messages.CONTROL] = control
        return outgoing

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """x after the step of size η_g; metrics as FedAvg gives them."""
        return self.conclude_train(server_round, fold(self._make(), each(replies)))

    def folding(self) -> MakeFold | None:
        """See FedAvg."""
        return self._make() if type(self).aggregate_train is Scaffold.aggregate_train else None

    def conclude_train(self, server_round: int, folded: Fold | None) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What `aggregate_train` gives, from the fold of the replies."""
        means, metrics = super().conclude_train(server_round, folded)
        if means is None:
            return None, metrics
        assert isinstance(folded, _ControlFold)
        share = np.float64(folded.control.weight / self.num_clients)
        for name, change in folded.control.record().items():
            self.control[name] = self.control.get(name, 0.0) + share * view(change)
        return self.stepped(means, self.server_learning_rate), metrics

    def _make(self) -> MakeFold:
        return partial(_ControlFold, self.weigh)

    def state(self) -> dict[str, Tensor]:
        """c."""
        return pack_kept("control", self.control)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        self.control = unpack_kept("control", state)


class _ControlFold(MeanFold):
    """What FedAvg makes of replies, and the plain mean of the changes of the control variates."""

    def __init__(self, weigh: Weigh) -> None:
        super().__init__(weigh)
        self.control = MeanModel()

    def add(self, reply: Message) -> None:
        super().add(reply)
        control = reply.content[messages.CONTROL]
        assert isinstance(control, ArrayRecord)
        self.control.add(control, 1.0)

    def merge(self, later: Self) -> None:
        super().merge(later)
        self.control.merge(later.control)
