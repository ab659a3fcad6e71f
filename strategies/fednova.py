"""FedNova. Wang, Liu, Liang, Joshi, Poor, arXiv 2007.07481, algorithm 1."""

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any, Self

from flwr.app import ArrayRecord, Message, MetricRecord

from fedwsa import messages
from fedwsa.arrays import record_of, view
from fedwsa.config import Config
from fedwsa.momentum import accumulated
from fedwsa.simulation.folding import Fold, MakeFold, fold
from strategies.aggregation import MeanFold, MeanModel, weight_of
from strategies.fedavg import cohorts
from strategies.holdout import Holdout
from strategies.sampling import each
from strategies.updates import OfUpdates


class FedNova(OfUpdates):
    """FedAvg of updates a step: who makes more steps does not count for more.

    x ← x − τ_eff Σ p_k d_k with d_k = (x − y_k)/‖a_k‖₁, τ_eff = Σ p_k ‖a_k‖₁ and p_k the clients' shares of the
    examples, over the usable replies of the round. ‖a_k‖₁ is how many gradients client k's way adds up to: its steps,
    more with momentum (`fedwsa.momentum`). Minimises Σ p_k f_k in the limit of small steps, however many each client
    makes, where FedAvg's fixed point leans to those that make more. With equal steps it is FedAvg, but for rounding.

    In one pass: with w_k = p_k/‖a_k‖₁ and ȳ the mean of the y_k weighted by w_k it is x + τ_eff Σ w_k (ȳ − x).
    Arrays that are no parameters are averaged as FedAvg does.

    momentum: ρ of the clients' SGD, begun anew each round, as in the authors' code. Weight decay is part of the
    gradient. Other optimisers have other a_k; the server's own momentum, an option there, is left out.
    A reply without its number of steps is left out by the gate.
    """

    def __init__(self, cohort: int, *, momentum: float = 0.0, **options: Any) -> None:
        super().__init__(cohort, **options)
        self.momentum = momentum
        self.weigh = partial(_per_gradient, momentum=momentum)

    @classmethod
    def from_config(cls, config: Config, holdout: Holdout) -> Self:
        """As a run's config says; the server's held-out samples are not used."""
        return cls(**cohorts(config), parameters=holdout.trainable, momentum=config.momentum)

    def asked(self) -> dict[str, bool | float | str]:
        """That steps are to be told."""
        return {messages.OBJECTIVE: "fednova"}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """x after the round; metrics as FedAvg gives them."""
        return self.conclude_train(server_round, fold(self._make(), each(replies)))

    def folding(self) -> MakeFold | None:
        """See FedAvg."""
        return self._make() if type(self).aggregate_train is FedNova.aggregate_train else None

    def conclude_train(self, server_round: int, folded: Fold | None) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What `aggregate_train` gives, from the fold of the replies."""
        mean, metrics = super().conclude_train(server_round, folded)
        if mean is None:
            return None, metrics
        assert isinstance(folded, _NovaFold)
        found = {**mean, **folded.others.record()}
        step = folded.model.weight * folded.gradients / folded.others.weight**2  # Σ w_k · τ_eff; at least 1
        return self.stepped(ArrayRecord({name: found[name] for name in self.sent}), step), metrics

    def _make(self) -> MakeFold:
        return partial(_NovaFold, self.momentum, tuple(self.origin()))


class _NovaFold(MeanFold):
    """The mean of the parameters weighted by n_k/‖a_k‖₁, that of all else by n_k, and Σ n_k ‖a_k‖₁."""

    def __init__(self, momentum: float, parameters: Collection[str]) -> None:
        super().__init__(partial(_per_gradient, momentum=momentum))
        self.momentum = momentum
        self.parameters = parameters
        self.others = MeanModel()
        self.gradients = 0.0

    def add(self, reply: Message) -> None:
        arrays, own = messages.arrays_of(reply), messages.metrics_of(reply)
        self.scopes.take(arrays, own)
        self.model.add(record_of({name: view(arrays[name]) for name in self.parameters}), self.weigh(own))
        others = {name: view(array) for name, array in arrays.items() if name not in self.parameters}
        self.others.add(record_of(others), weight_of(own))
        self.gradients += weight_of(own) * _gradients(own, self.momentum)
        del own[messages.LOCAL_STEPS]  # it is no metric of the round
        self.metrics.add(own, weight_of(own))

    def merge(self, later: Self) -> None:
        super().merge(later)
        self.others.merge(later.others)
        self.gradients += later.gradients


def _gradients(metrics: MetricRecord, momentum: float) -> float:
    """‖a_k‖₁."""
    return accumulated(metrics[messages.LOCAL_STEPS], momentum)  # type: ignore[arg-type]


def _per_gradient(metrics: MetricRecord, momentum: float) -> float:
    """n_k/‖a_k‖₁."""
    return weight_of(metrics) / _gradients(metrics, momentum)
