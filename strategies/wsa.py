"""Weight scope alignment around any strategy. arXiv 2408.12237; see `fedwsa.scope` for the formulas."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Self

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor, stack

from fedwsa import messages
from fedwsa.arrays import unpack
from fedwsa.config import Config
from fedwsa.scope import VARIANCE_FUSIONS, WeightScope, measure
from fedwsa.simulation.folding import Fold, MakeFold
from strategies.aggregation import ScopeStatistics
from strategies.fedavg import FedAvg
from strategies.holdout import Holdout
from strategies.sampling import each


class WeightScopeAlignment(Strategy):
    """Any strategy, plus a target scope that goes out with the model and is fused from what comes back.

    strategy: ours or Flower's; it never sees a scope.
    strength: λ ≥ 0; 0 leaves the wrapped strategy as it is.
    mode: `loss` adds λ·R to the clients' loss, `proximal` (ours) moves the weights after each step.
    reduction: R is the `sum` or the `mean` of the layers' divergences.
    target: `fused`, the clients' scopes of the round before; `initial`, the scope of the first global model for ever
        (which is also where `fused` starts).
    variance: how variances are fused, see `fedwsa.scope.fuse`.
    Raises ValueError for other values of any of these.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        strength: float = 1.0,
        mode: str = "loss",
        reduction: str = "sum",
        target: str = "fused",
        variance: str = "mean",
    ) -> None:
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be >= 0 and finite, got {strength!r}")
        for name, value, allowed in (
            ("mode", mode, ("loss", "proximal")),
            ("reduction", reduction, ("sum", "mean")),
            ("target", target, ("fused", "initial")),
            ("variance", variance, VARIANCE_FUSIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        self.strategy = strategy
        self.strength = strength
        self.mode = mode
        self.reduction = reduction
        self.follows_clients = target == "fused"
        self.variance = variance
        self.target: WeightScope | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the wrapped strategy sends, and the target."""
        if self.target is None:
            self.target = _scope(arrays)
        if self.strength > 0:
            alignment = messages.Alignment(self.target, self.strength, self.mode, self.reduction)
            config = ConfigRecord({**config, **messages.pack_alignment(alignment)})
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the wrapped strategy makes of the replies; the fused scope and its distances join the metrics."""
        scopes = ScopeStatistics()
        arrays, metrics = self.strategy.aggregate_train(server_round, _stripped(replies, scopes))
        return self._follow(arrays, metrics, scopes)

    def folding(self) -> MakeFold | None:
        """Parts of what `conclude_train` takes, where the wrapped strategy has such."""
        inner = getattr(self.strategy, "folding", None)
        own = type(self).aggregate_train is WeightScopeAlignment.aggregate_train
        make = inner() if inner and own else None
        return partial(_ScopedFold, make) if make else None

    def conclude_train(self, server_round: int, folded: Fold | None) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What `aggregate_train` gives, from the fold of the replies."""
        if folded is None:
            return None, None
        assert isinstance(folded, _ScopedFold)
        arrays, metrics = self.strategy.conclude_train(server_round, folded.inner)  # type: ignore[attr-defined]
        return self._follow(arrays, metrics, folded.scopes)

    def _follow(
        self, arrays: ArrayRecord | None, metrics: MetricRecord | None, scopes: ScopeStatistics
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        merged = _scope(arrays) if arrays and self.variance == "merged" else None
        fused = scopes.fused(self.variance, merged) if arrays else None
        if fused is None:
            return arrays, metrics
        if self.follows_clients:
            self.target = fused
        return arrays, MetricRecord({**(metrics or {}), **scopes.metrics(fused)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the wrapped strategy does."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the wrapped strategy does."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """As the wrapped strategy does."""
        self.strategy.summary()

    def state(self) -> dict[str, Tensor]:
        """The target, [mean, variance] by layer, and the wrapped strategy's state (AttributeError if it has none)."""
        target = self.target
        own = (
            {}
            if target is None
            else {
                f"target/{i:06d}/{name}": stack([target.means[i], target.variances[i]])  # files sort by name
                for i, name in enumerate(target.names)
            }
        )
        return own | {f"wrapped/{key}": value for key, value in self.strategy.state().items()}  # type: ignore[attr-defined]

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        target = {key.split("/", 2)[2]: state[key] for key in sorted(state) if key.startswith("target/")}
        wrapped = {key.removeprefix("wrapped/"): value for key, value in state.items() if key.startswith("wrapped/")}
        if target:
            means, variances = stack(list(target.values())).unbind(1)
            self.target = WeightScope(tuple(target), means, variances)
        self.strategy.load_state(wrapped)  # type: ignore[attr-defined]


class FedAvgWSA(WeightScopeAlignment):
    """The common pair: FedAvg with weight scope alignment."""

    @classmethod
    def from_config(cls, config: Config, holdout: Holdout) -> "FedAvgWSA":
        """As a run's config says; the server's held-out samples are not used."""
        wsa = config.wsa
        return cls(
            FedAvg.from_config(config, holdout),
            strength=wsa.strength,
            mode=wsa.mode,
            reduction=wsa.reduction,
            target=wsa.target,
            variance=wsa.variance,
        )


class _ScopedFold:
    """The scopes, and the wrapped strategy's part of replies that have none."""

    def __init__(self, make: MakeFold) -> None:
        self.scopes, self.inner = ScopeStatistics(), make()

    def add(self, reply: Message) -> None:
        self.scopes.take(messages.arrays_of(reply), messages.metrics_of(reply))
        self.inner.add(reply)

    def merge(self, later: Self) -> None:
        self.scopes.merge(later.scopes)
        self.inner.merge(later.inner)


def _scope(arrays: ArrayRecord) -> WeightScope:
    layers = set(messages.layer_names(arrays))
    return measure(unpack({name: array for name, array in arrays.items() if name in layers}))


def _stripped(replies: Iterable[Message], scopes: ScopeStatistics) -> Iterator[Message]:
    """Replies without their scopes: Flower's strategies demand the same metrics of every client."""
    for reply in each(replies):
        if reply.has_content():
            scopes.take(messages.arrays_of(reply), messages.metrics_of(reply))
        yield reply
