"""Local-only training: the lower end of the scale, what a client reaches by itself."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedwsa import messages
from fedwsa.errors import RunError
from fedwsa.simulation.folding import Fold
from strategies.aggregation import MeanMetrics, equal, weight_of
from strategies.fedavg import FedAvg
from strategies.sampling import TooFewClientsError, each

TEST_METRICS = (messages.TEST_EXAMPLES, messages.TEST_LOSS, messages.TEST_ACCURACY)


class LocalOnly(FedAvg):
    """Every client goes on with its own model for ever, from the common start; nothing is combined.

    A client trains in the rounds in which FedAvg would draw it, so that both have had as many steps. Its model stays
    with it (`clients.memory`); the server's, and `final.safetensors`, is the start for good.
    What is recorded as the server's evaluation is the plain mean, over the clients that evaluate, of the loss and
    accuracy of each one's own model on the whole test split; the clients' own evaluation is by their validation
    samples. Clients that never trained have the start. The scopes are those of the clients' models, so that `-wsa`
    aligns models of which nothing but scopes is shared. Each client minimises its own loss.
    """

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg, and keep in mind what is sent."""
        self._start = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def asked(self) -> dict[str, bool | float | str]:
        """That clients keep what they train."""
        return {messages.LOCAL: "model"}

    def conclude_train(self, server_round: int, folded: Fold | None) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The model that was sent; metrics as FedAvg gives them."""
        mean, metrics = super().conclude_train(server_round, folded)
        return (None if mean is None else self._start), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg; clients take their own models, and the test split too."""
        config = ConfigRecord({**config, messages.LOCAL: "model", messages.TEST_TOO: True})
        try:
            return super().configure_evaluate(server_round, arrays, config, grid)
        except TooFewClientsError as error:  # others can do without
            raise RunError(f"round {server_round}: {error}; local-only has no other evaluation") from error

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Means of the clients' metrics, weighted by their validation samples; plain ones of those on the test split.

        Raises RunError where no client has such: the server has no model to evaluate instead.
        """
        metrics, test = MeanMetrics(), MeanMetrics()
        for reply in each(replies):
            own = messages.metrics_of(reply)
            test.add(MetricRecord({key: own.pop(key) for key in TEST_METRICS if key in own}), equal(own))
            metrics.add(own, weight_of(own))
        if test.sums.keys() < set(TEST_METRICS):
            raise RunError(f"round {server_round}: no client evaluated its own model, and local-only has no other")
        return MetricRecord({**metrics.record(), **test.record()})
