"""What an aligned round gathers of weight scopes, beside what the wrapped strategy makes of the replies."""

from collections.abc import Iterable, Iterator
from typing import Self

from flwr.app import Message

from fedwsa import messages
from fedwsa.simulation.folding import MakeFold
from strategies.aggregation import ScopeStatistics, Weigh
from strategies.sampling import each


class ClientScopes:
    """The clients' scopes by layer, which are recorded, and by unit, which make the target; often the same."""

    def __init__(self, granularity: str, weigh: Weigh) -> None:
        self.layers = ScopeStatistics(weigh=weigh)
        self.units = self.layers if granularity == "layer" else ScopeStatistics(granularity, weigh)

    def take(self, reply: Message) -> None:
        """Out of the reply's metrics."""
        for scopes in self._kinds():
            scopes.take(messages.arrays_of(reply), messages.metrics_of(reply))

    def merge(self, later: "ClientScopes") -> None:
        """Take over another's."""
        for own, other in zip(self._kinds(), later._kinds(), strict=True):
            own.merge(other)

    def _kinds(self) -> list[ScopeStatistics]:
        return [self.layers] if self.units is self.layers else [self.layers, self.units]


class ScopedFold:
    """The scopes, and the wrapped strategy's part of replies that have none."""

    def __init__(self, make: MakeFold, granularity: str, weigh: Weigh) -> None:
        self.scopes, self.inner = ClientScopes(granularity, weigh), make()

    def add(self, reply: Message) -> None:
        """See `Fold`."""
        self.scopes.take(reply)
        self.inner.add(reply)

    def merge(self, later: Self) -> None:
        """See `Fold`."""
        self.scopes.merge(later.scopes)
        self.inner.merge(later.inner)


def stripped(replies: Iterable[Message], scopes: ClientScopes) -> Iterator[Message]:
    """Replies without their scopes: Flower's strategies demand the same metrics of every client."""
    for reply in each(replies):
        if reply.has_content():
            scopes.take(reply)
        yield reply
