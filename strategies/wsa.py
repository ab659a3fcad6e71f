"""Weight scope alignment around any strategy. arXiv 2408.12237; see `fedwsa.scope` for the formulas."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from logging import WARNING
from typing import Self

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from torch import Tensor, nn, stack

from fedwsa import messages, targets
from fedwsa.arrays import unpack
from fedwsa.config import Config
from fedwsa.divergence import divergence_of
from fedwsa.granularity import GRANULARITIES
from fedwsa.scope import VARIANCE_FUSIONS, WeightScope, measure, moving_average
from fedwsa.simulation.folding import Fold, MakeFold
from fedwsa.simulation.sending import Replies
from fedwsa.stability import Descent, warning
from strategies.aggregation import ScopeStatistics, Weigh, weight_of
from strategies.fedavg import FedAvg
from strategies.holdout import Holdout
from strategies.sampling import each
from strategies.wrapper import Wrapper

SCHEDULES = ("constant", "first-k-rounds", "linear-decay", "relative")


class WeightScopeAlignment(Wrapper):
    """Any strategy, plus a target scope that goes out with the model and is fused from what comes back.

    strategy: ours or Flower's; it never sees a scope.
    strength: λ ≥ 0; 0 leaves the wrapped strategy as it is.
    mode: `loss` adds λ·R to the clients' loss, `proximal` (ours) moves the weights after each step.
    reduction: R is the `sum` or the `mean` of the layers' divergences.
    divergence: `forward-kl`, `reverse-kl` (loss mode only) or `wasserstein`, see `fedwsa.divergence`.
    granularity: whose weights share a scope: a `layer`'s, a `channel`'s or the `model`'s, see `fedwsa.granularity`.
        What is recorded of a round is by layer whatever it is.
    schedule: `constant`; `first-k-rounds`, λ up to round `schedule_rounds` and 0 from then on; `linear-decay`,
        λ(1 − (r − 1)/`schedule_rounds`) in round r, never below 0; `relative`, λ is found by each client once a round
        such that the term's gradient norm is `share` of the task's at its first step (`strength` then only turns the
        term off, at 0), see `WeightScopeRegularizer.fix_strength`. The schedules are ours.
    target: `fused`, the clients' scopes of the round before; `initial`, the scope of the first global model for ever
        (which is also where `fused` starts); or a scope that stays, see `fedwsa.targets`.
    target_momentum: 0 ≤ m < 1; a fused target is m · the one before + (1 − m) · the fusion, of means and variances;
        ours.
    variance: how variances are fused, see `fedwsa.scope.fuse`.
    descent: the clients' step, if it is SGD's: then Flower's log is told, before any training and whenever the target
        crosses it, that loss mode is beyond its bound (`fedwsa.stability`).
    Raises ValueError for other values of any of these.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        strength: float = 1.0,
        mode: str = "loss",
        reduction: str = "sum",
        divergence: str = "forward-kl",
        granularity: str = "layer",
        schedule: str = "constant",
        schedule_rounds: int = 0,
        share: float = 0.0,
        target: str | WeightScope = "fused",
        target_momentum: float = 0.0,
        variance: str = "mean",
        descent: Descent | None = None,
    ) -> None:
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be >= 0 and finite, got {strength!r}")
        for name, value, allowed in (
            ("mode", mode, ("loss", "proximal")),
            ("reduction", reduction, ("sum", "mean")),
            ("granularity", granularity, GRANULARITIES),
            ("schedule", schedule, SCHEDULES),
            ("target", "initial" if isinstance(target, WeightScope) else target, ("fused", "initial")),
            ("variance", variance, VARIANCE_FUSIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        divergence_of(divergence, mode)
        if schedule in ("first-k-rounds", "linear-decay") and schedule_rounds < 1:
            raise ValueError(f"schedule_rounds must be >= 1 with schedule {schedule!r}, got {schedule_rounds!r}")
        if schedule == "relative" and not 0 < share < math.inf:
            raise ValueError(f"share must be > 0 and finite with schedule 'relative', got {share!r}")
        if not 0 <= target_momentum < 1:
            raise ValueError(f"target_momentum must be in [0, 1), got {target_momentum!r}")
        super().__init__(strategy)
        self.strength = strength
        self.mode = mode
        self.reduction = reduction
        self.divergence = divergence
        self.granularity = granularity
        self.schedule = schedule
        self.schedule_rounds = schedule_rounds
        self.share = share if schedule == "relative" else 0.0
        self.follows_clients = target == "fused"
        self.target_momentum = target_momentum
        self.variance = variance
        self.descent = descent
        self.target = target if isinstance(target, WeightScope) else None
        self._beyond = False  # the bound, in the round before

    @classmethod
    def around(cls, strategy: Strategy, config: Config, model: nn.Module) -> Self:
        """Any strategy, with what a run's config says of WSA; model: of the architecture, its weights are not read."""
        wsa = config.wsa
        target: str | WeightScope = wsa.target
        if wsa.target == "gaussian":
            parameters = dict(model.named_parameters())
            target = targets.gaussian(parameters, wsa.target_mean, wsa.target_std, granularity=wsa.granularity)
        elif wsa.target == "init-scheme":
            target = targets.init_scheme(model, config.init, wsa.granularity)
        return cls(
            strategy,
            strength=wsa.strength,
            mode=wsa.mode,
            reduction=wsa.reduction,
            divergence=wsa.divergence,
            granularity=wsa.granularity,
            schedule=wsa.schedule,
            schedule_rounds=wsa.schedule_rounds,
            share=wsa.share,
            target=target,
            target_momentum=wsa.target_momentum,
            variance=wsa.variance,
            descent=Descent(config.learning_rate, config.momentum) if config.optimizer == "sgd" else None,
        )

    def strength_of(self, server_round: int) -> float:
        """λ in a round, counted from 1; what `relative` sends is not used, but for 0."""
        if self.schedule == "first-k-rounds":
            return self.strength if server_round <= self.schedule_rounds else 0.0
        if self.schedule == "linear-decay":
            return self.strength * max(0.0, 1 - (server_round - 1) / self.schedule_rounds)
        return self.strength

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the wrapped strategy sends, and the target."""
        if self.target is None:
            self.target = _scope(arrays, self.granularity)
        strength = self.strength_of(server_round)
        if strength > 0:
            self._check(self.target, strength, messages.unit_sizes(arrays, self.granularity))
            alignment = messages.Alignment(
                self.target, strength, self.mode, self.reduction, self.divergence, self.granularity, self.share
            )
            config = ConfigRecord({**config, **messages.pack_alignment(alignment)})
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def _check(self, target: WeightScope, strength: float, sizes: dict[str, int]) -> None:
        """ValueError for a target of other layers; a warning where loss mode gets beyond its bound."""
        if odd := [name for name in target.names if name not in sizes]:
            raise ValueError(f"the target must name layers of the model, got {odd[:5]}")
        if self.descent is None or self.mode != "loss" or self.schedule == "relative":
            return
        line = warning(
            target, sizes, self.descent, strength=strength, reduction=self.reduction, divergence=self.divergence
        )
        if line and not self._beyond:
            log(WARNING, line)
        self._beyond = line is not None

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the wrapped strategy makes of the replies; the fused scope and its distances join the metrics."""
        scopes = _Scopes(self.granularity, self.weigh)
        arrays, metrics = self.strategy.aggregate_train(server_round, Replies(_stripped(replies, scopes)))
        return self._follow(server_round, arrays, metrics, scopes)

    def folding(self) -> MakeFold | None:
        """Parts of what `conclude_train` takes, where the wrapped strategy has such."""
        inner = getattr(self.strategy, "folding", None)
        own = type(self).aggregate_train is WeightScopeAlignment.aggregate_train
        make = inner() if inner and own else None
        return partial(_ScopedFold, make, self.granularity, self.weigh) if make else None

    def conclude_train(self, server_round: int, folded: Fold | None) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What `aggregate_train` gives, from the fold of the replies."""
        if folded is None:
            return None, None
        assert isinstance(folded, _ScopedFold)
        arrays, metrics = self.strategy.conclude_train(server_round, folded.inner)  # type: ignore[attr-defined]
        return self._follow(server_round, arrays, metrics, folded.scopes)

    @property
    def weigh(self) -> Weigh:
        """Scopes are fused with the weights with which the wrapped strategy takes its mean, where it says them."""
        weigh: Weigh = getattr(self.strategy, "weigh", weight_of)
        return weigh

    def _follow(
        self, server_round: int, arrays: ArrayRecord | None, metrics: MetricRecord | None, scopes: "_Scopes"
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        if not arrays:
            return arrays, metrics
        sent = self.target if self.strength_of(server_round) > 0 else None
        by_layer = self._fused(arrays, scopes.layers)
        fused = by_layer if scopes.units is scopes.layers else self._fused(arrays, scopes.units)
        if fused and self.follows_clients:
            before = self.target if self.target and self.target_momentum else fused
            self.target = moving_average(before, fused, self.target_momentum)
        if by_layer is None:
            return arrays, metrics
        to_target = scopes.units.target_metrics(sent) if sent else {}
        return arrays, MetricRecord({**(metrics or {}), **scopes.layers.metrics(by_layer), **to_target})

    def _fused(self, arrays: ArrayRecord, scopes: ScopeStatistics) -> WeightScope | None:
        merged = _scope(arrays, scopes.granularity) if self.variance == "merged" else None
        return scopes.fused(self.variance, merged)

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
        return cls.around(FedAvg.from_config(config, holdout), config, holdout.model)


class _Scopes:
    """The clients' scopes by layer, which are recorded, and by unit, which make the target; often the same."""

    def __init__(self, granularity: str, weigh: Weigh) -> None:
        self.layers = ScopeStatistics(weigh=weigh)
        self.units = self.layers if granularity == "layer" else ScopeStatistics(granularity, weigh)

    def take(self, reply: Message) -> None:
        """Out of the reply's metrics."""
        for scopes in self._kinds():
            scopes.take(messages.arrays_of(reply), messages.metrics_of(reply))

    def merge(self, later: "_Scopes") -> None:
        """Take over another's."""
        for own, other in zip(self._kinds(), later._kinds(), strict=True):
            own.merge(other)

    def _kinds(self) -> list[ScopeStatistics]:
        return [self.layers] if self.units is self.layers else [self.layers, self.units]


class _ScopedFold:
    """The scopes, and the wrapped strategy's part of replies that have none."""

    def __init__(self, make: MakeFold, granularity: str, weigh: Weigh) -> None:
        self.scopes, self.inner = _Scopes(granularity, weigh), make()

    def add(self, reply: Message) -> None:
        self.scopes.take(reply)
        self.inner.add(reply)

    def merge(self, later: Self) -> None:
        self.scopes.merge(later.scopes)
        self.inner.merge(later.inner)


def _scope(arrays: ArrayRecord, granularity: str) -> WeightScope:
    layers = set(messages.layer_names(arrays))
    kept = {name: array for name, array in arrays.items() if name in layers}
    return measure(unpack(kept), granularity=granularity)


def _stripped(replies: Iterable[Message], scopes: _Scopes) -> Iterator[Message]:
    """Replies without their scopes: Flower's strategies demand the same metrics of every client."""
    for reply in each(replies):
        if reply.has_content():
            scopes.take(reply)
        yield reply
