"""FedAvg, streaming. McMahan et al., arXiv 1602.05629, algorithm 1."""

from collections.abc import Iterable
from functools import partial
from typing import Any, Self

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedwsa import messages
from fedwsa.config import Config
from fedwsa.simulation.folding import Fold, MakeFold, fold
from strategies.aggregation import MeanFold, MeanMetrics, Weigh, weight_of
from strategies.holdout import Holdout
from strategies.sampling import broadcast, draw, each


def cohorts(config: Config) -> dict[str, Any]:
    """What every strategy of ours takes from a run's config."""
    return {
        "cohort": config.cohort,
        "evaluation_cohort": config.evaluation_cohort,
        "seed": config.seed[0],
        "timeout": config.timeout,
    }


class FedAvg(Strategy):
    """Mean of the cohort's models, weighted by their numbers of examples.

    Unlike Flower's own, it draws cohorts from an explicit seed, keeps one sum instead of all replies, and records the
    clients' weight scopes.

    cohort, evaluation_cohort: clients that train and that evaluate in a round; 0 evaluates nowhere.
    timeout: seconds to wait for that many clients to be connected.
    """

    def __init__(self, cohort: int, *, seed: int, evaluation_cohort: int = 0, timeout: float = 600.0) -> None:
        self.cohort = cohort
        self.evaluation_cohort = evaluation_cohort
        self.seed = seed
        self.timeout = timeout

    weigh: Weigh = staticmethod(weight_of)
    """A reply's weight in the means of models and of scopes; `equal` in subclasses whose source has a plain mean."""

    @classmethod
    def from_config(cls, config: Config, holdout: Holdout) -> Self:
        """As a run's config says; the server's held-out samples are not used."""
        return cls(**cohorts(config))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The model, and what is asked besides, to a cohort drawn from (seed, round)."""
        config = ConfigRecord({**config, **self.asked()})
        nodes = self._draw(grid, self.cohort, "cohort", server_round)
        return broadcast(nodes, MessageType.TRAIN, server_round, arrays, config)

    def asked(self) -> dict[str, bool | float | str]:
        """Entries of the train messages' config by which a subclass asks for more than FedAvg's training."""
        return {}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Weighted means of models and metrics, and the scopes' fusion and distance where clients sent scopes."""
        return self.conclude_train(server_round, fold(partial(MeanFold, self.weigh), each(replies)))

    def folding(self) -> MakeFold | None:
        """Makes parts of what `conclude_train` takes, so that workers can aggregate too; None for subclasses that
        aggregate in another way.
        """
        return partial(MeanFold, self.weigh) if type(self).aggregate_train is FedAvg.aggregate_train else None

    def conclude_train(self, server_round: int, folded: Fold | None) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What `aggregate_train` gives, from the fold of the replies."""
        if folded is None:
            return None, None
        assert isinstance(folded, MeanFold)
        if not folded.model.weight:
            return None, None
        scopes = folded.scopes
        return folded.model.record(), MetricRecord({**folded.metrics.record(), **scopes.metrics(scopes.fused())})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The model to a cohort of its own."""
        if not self.evaluation_cohort:
            return []
        nodes = self._draw(grid, self.evaluation_cohort, "evaluation-cohort", server_round)
        return broadcast(nodes, MessageType.EVALUATE, server_round, arrays, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Weighted means of the clients' metrics."""
        metrics = MeanMetrics()
        for reply in each(replies):
            own = messages.metrics_of(reply)
            metrics.add(own, weight_of(own))
        return metrics.record() if metrics.sums else None

    def summary(self) -> None:
        """Flower's log; the run folder has it all."""

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to go on from here: nothing."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""

    def _draw(self, grid: Grid, size: int, purpose: str, server_round: int) -> list[int]:
        return draw(grid, size, seed=self.seed, purpose=purpose, server_round=server_round, timeout=self.timeout)
