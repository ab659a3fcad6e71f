"""A strategy around another."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy


class Wrapper(Strategy):
    """Any strategy, ours or Flower's, with something added to its training; the rest is as the wrapped one does it."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the wrapped strategy does."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the wrapped strategy does."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def result(self, arrays: ArrayRecord) -> ArrayRecord:
        """The model to evaluate and to keep at the end, after a round that gave `arrays`, which are sent next.

        It is `arrays`, unless the wrapped strategy has a `result` and says otherwise.
        """
        inner = getattr(self.strategy, "result", None)
        result: ArrayRecord = inner(arrays) if inner else arrays
        return result

    def summary(self) -> None:
        """As the wrapped strategy does."""
        self.strategy.summary()
