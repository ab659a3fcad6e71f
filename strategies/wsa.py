"""Weight scope alignment around any strategy. arXiv 2408.12237; see `fedwsa.scope` for the formulas."""

import math
from collections.abc import Collection, Iterable
from functools import partial
from logging import WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from torch import Tensor, nn, stack

from fedwsa import messages, targets
from fedwsa.arrays import unpack
from fedwsa.config import Config
from fedwsa.divergence import divergence_of
from fedwsa.granularity import GRANULARITIES, layer_of, matching
from fedwsa.scope import VARIANCE_FUSIONS, WeightScope, is_layer, measure, moving_average
from fedwsa.simulation.folding import Fold, MakeFold
from fedwsa.simulation.sending import Replies
from fedwsa.stability import Descent, warning
from strategies.aggregation import ScopeStatistics, Weigh, weight_of
from strategies.fedavg import FedAvg
from strategies.scoped import ClientScopes, ScopedFold, stripped
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
    layers: names of the layers that are aligned, the others are free; None: all arrays of two or more dimensions that
        hold floats, which besides parameters may be buffers, or one parameter twice. Of granularity `model` these are
        the layers that are pooled, so there name those that train.
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
        layers: Collection[str] | None = None,
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
        self.layers = None if layers is None else frozenset(layers)
        self.schedule = schedule
        self.schedule_rounds = schedule_rounds
        self.share = share if schedule == "relative" else 0.0
        self.follows_clients = target == "fused"
        self.target_momentum = target_momentum
        self.variance = variance
        self.descent = descent
        self.target = target if isinstance(target, WeightScope) else None
        self._beyond = False  # the bound, in the round before

    @staticmethod
    def around(strategy: Strategy, config: Config, model: nn.Module) -> "WeightScopeAlignment":
        """Any strategy, with what a run's config says of WSA; model: of the architecture, its weights are not read.

        Raises ValueError where `wsa.layers` or the target does not go with the model.
        """
        wsa = config.wsa
        layers, target = aligned_with(model, config)
        return WeightScopeAlignment(
            strategy,
            strength=wsa.strength,
            mode=wsa.mode,
            reduction=wsa.reduction,
            divergence=wsa.divergence,
            granularity=wsa.granularity,
            layers=layers,
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
        aligned = ArrayRecord({name: arrays[name] for name in messages.layer_names(arrays) if self._aligns(name)})
        if self.target is None:
            self.target = measure(unpack(aligned), granularity=self.granularity)
        strength = self.strength_of(server_round)
        if strength > 0:
            self._check(self.target, strength, messages.unit_sizes(aligned, self.granularity))
            pooled = tuple(aligned) if self.granularity == "model" else ()
            alignment = messages.Alignment(
                self.target, strength, self.mode, self.reduction, self.divergence, self.granularity, self.share, pooled
            )
            config = ConfigRecord({**config, **messages.pack_alignment(alignment)})
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def _aligns(self, layer: str) -> bool:
        return self.layers is None or layer in self.layers

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
        scopes = ClientScopes(self.granularity, self.weigh)
        arrays, metrics = self.strategy.aggregate_train(server_round, Replies(stripped(replies, scopes)))
        return self._follow(server_round, arrays, metrics, scopes)

    def folding(self) -> MakeFold | None:
        """Parts of what `conclude_train` takes, where the wrapped strategy has such."""
        inner = getattr(self.strategy, "folding", None)
        own = type(self).aggregate_train is WeightScopeAlignment.aggregate_train
        make = inner() if inner and own else None
        return partial(ScopedFold, make, self.granularity, self.weigh) if make else None

    def conclude_train(self, server_round: int, folded: Fold | None) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What `aggregate_train` gives, from the fold of the replies."""
        if folded is None:
            return None, None
        assert isinstance(folded, ScopedFold)
        arrays, metrics = self.strategy.conclude_train(server_round, folded.inner)  # type: ignore[attr-defined]
        return self._follow(server_round, arrays, metrics, folded.scopes)

    @property
    def weigh(self) -> Weigh:
        """Scopes are fused with the weights with which the wrapped strategy takes its mean, where it says them."""
        weigh: Weigh = getattr(self.strategy, "weigh", weight_of)
        return weigh

    def _follow(
        self, server_round: int, arrays: ArrayRecord | None, metrics: MetricRecord | None, scopes: ClientScopes
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        if not arrays:
            return arrays, metrics
        sent = self.target if self.strength_of(server_round) > 0 else None
        by_layer = self._fused(arrays, scopes.layers)
        fused = by_layer if scopes.units is scopes.layers else self._fused(arrays, scopes.units)
        if fused and self.follows_clients:
            new = self._aligned_part(fused)
            before = self.target if self.target and self.target_momentum else new
            self.target = moving_average(before, new, self.target_momentum)
        if by_layer is None:
            return arrays, metrics
        to_target = scopes.units.target_metrics(sent) if sent else {}
        return arrays, MetricRecord({**(metrics or {}), **scopes.layers.metrics(by_layer), **to_target})

    def _fused(self, arrays: ArrayRecord, scopes: ScopeStatistics) -> WeightScope | None:
        merged = None
        if self.variance == "merged":
            pools = scopes.granularity == "model"
            names = [name for name in messages.layer_names(arrays) if not pools or self._aligns(name)]
            merged = measure(unpack({name: arrays[name] for name in names}), granularity=scopes.granularity)
        return scopes.fused(self.variance, merged)

    def _aligned_part(self, scope: WeightScope) -> WeightScope:
        """Of the units of all layers those that are aligned; the unit of the whole model is one."""
        if self.layers is None or self.granularity == "model":
            return scope
        return scope.only([name for name in scope.names if self._aligns(layer_of(name, self.granularity))])

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
    """The common pair: FedAvg with weight scope alignment.

    cohort, seed, evaluation_cohort, timeout: of `FedAvg`; alignment: of `WeightScopeAlignment`, by keyword.
    """

    def __init__(
        self, cohort: int, *, seed: int, evaluation_cohort: int = 0, timeout: float = 600.0, **alignment: Any
    ) -> None:
        super().__init__(FedAvg(cohort, seed=seed, evaluation_cohort=evaluation_cohort, timeout=timeout), **alignment)


def aligned_with(model: nn.Module, config: Config) -> tuple[list[str], str | WeightScope]:
    """The model's layers that `wsa.layers` says, of the unit "model" those that train; and the target.

    Raises ValueError for a pattern that matches no layer, or a target that the model cannot have.
    """
    wsa, parameters = config.wsa, dict(model.named_parameters())
    candidates = [name for name, weights in parameters.items() if is_layer(name, weights)]
    try:
        named = set(matching(candidates, wsa.layers))
    except ValueError as error:
        raise ValueError(f"wsa.{error}") from error  # the key, where `matching` has its argument
    pools = wsa.granularity == "model"
    layers = [name for name, weights in parameters.items() if name in named and (weights.requires_grad or not pools)]

    def chosen(name: str, tensor: Tensor) -> bool:
        return name in layers

    if wsa.target == "gaussian":
        return layers, targets.gaussian(parameters, wsa.target_mean, wsa.target_std, chosen, wsa.granularity)
    if wsa.target == "init-scheme":
        return layers, targets.init_scheme(model, config.init, chosen, wsa.granularity)
    return layers, wsa.target
