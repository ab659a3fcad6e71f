"""Flower's own strategies from a run's config: server optimisers, and rules that withstand bad clients.

Their arithmetic is Flower's, untouched. Ours are the cohorts (from seed and round, as FedAvg draws them), the scopes
that are recorded, and the state that a run goes on from.
"""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import flwr.serverapp.strategy as flower
import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy.fedopt import FedOpt
from torch import Tensor

from fedwsa import messages
from fedwsa.arrays import NumpyArray, as_type, record_of, view
from fedwsa.config import Config
from fedwsa.sections import FedAdamConfig
from fedwsa.simulation.folding import Fold
from strategies.aggregation import MeanMetrics, ScopeStatistics, equal, weight_of
from strategies.fedavg import FedAvg, cohorts
from strategies.holdout import Holdout
from strategies.sampling import each
from strategies.updates import OfUpdates


class ServerOptimizer(OfUpdates):
    """FedAvg, and then a step of the server with Δ = mean − x as its (negative) gradient, x the model that was sent.

    flowers: Flower's class, which makes the step. It is shown one reply, the weighted mean as our FedAvg makes it, so
    that the server keeps one sum whatever the cohort.
    parameters: names of the arrays that it may move, None: all floating ones. The others, BatchNorm's statistics and
    counters, are the mean. Flower alone would step these too: variances below zero, counters that run backwards.
    Minimises Σ p_k f_k in the limit of small local steps, as FedAvg does; p_k the clients' shares of the examples.
    """

    def __init__(self, cohort: int, flowers: flower.FedAvgM | FedOpt, **options: Any) -> None:
        super().__init__(cohort, **options)
        self.flowers = flowers
        self._names: list[str] = []  # of what FedAvgM keeps, which is a list

    def conclude_train(self, server_round: int, folded: Fold | None) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The model after the server's step; metrics as FedAvg gives them."""
        mean, metrics = super().conclude_train(server_round, folded)
        return mean and self._step(server_round, mean), metrics

    def _step(self, server_round: int, mean: ArrayRecord) -> ArrayRecord:
        self._names = list(self.origin())
        sent = {name: self.sent[name] for name in self._names}
        if isinstance(self.flowers, flower.FedAvgM):
            self.flowers.current_arrays = ArrayRecord(sent)
        else:
            self.flowers.current_arrays = self.origin()
        stepped, _ = self.flowers.aggregate_train(server_round, [_reply({name: mean[name] for name in self._names})])
        assert stepped is not None
        return record_of(_typed({**mean, **stepped}, mean))

    def state(self) -> dict[str, Tensor]:
        """The moments that Flower's class keeps, by array."""
        kept: dict[str, Tensor] = {}
        for what in self._moments():
            found = getattr(self.flowers, what) or {}
            named = found if isinstance(found, dict) else dict(zip(self._names, found, strict=True))
            kept |= {f"{what}/{i:06d}/{name}": torch.tensor(named[name]) for i, name in enumerate(named)}
        return kept

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        for what in self._moments():
            keys = sorted(key for key in state if key.startswith(f"{what}/"))
            named = {key.split("/", 2)[2]: state[key].numpy() for key in keys}
            self._names = list(named)
            setattr(self.flowers, what, (list(named.values()) if what == "momentum_vector" else named) or None)

    def _moments(self) -> tuple[str, ...]:
        """Where Flower's class keeps them."""
        return ("momentum_vector",) if isinstance(self.flowers, flower.FedAvgM) else ("m_t", "v_t")


class RobustRule(FedAvg):
    """What a rule of Flower's makes of all models at once, so that the server's memory grows with the cohort.

    flowers: Flower's class. It is shown every array, BatchNorm's statistics and counters too (rounded to the nearest):
    a mean of these would let a bad client in again.
    Clients count alike, whatever they hold, as in the papers, and so do their scopes (`weigh`). The fused target of WSA
    is a mean all the same, which one bad client moves at will: a fixed target is not.
    """

    weigh = staticmethod(equal)

    def __init__(self, cohort: int, flowers: flower.FedAvg, **options: Any) -> None:
        super().__init__(cohort, **options)
        self.flowers = flowers

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The rule's model; metrics as FedAvg gives them, of all replies."""
        models, metrics, scopes = [], MeanMetrics(), ScopeStatistics(weigh=self.weigh)
        for reply in each(replies):
            arrays, own = messages.arrays_of(reply), messages.metrics_of(reply)
            scopes.take(arrays, own)
            metrics.add(own, weight_of(own))
            models.append(arrays)
        if not models:
            return None, None
        merged = self._merge(server_round, models)
        return merged, MetricRecord({**metrics.record(), **scopes.metrics(scopes.fused())})

    def _merge(self, server_round: int, models: list[ArrayRecord]) -> ArrayRecord:
        merged, _ = self.flowers.aggregate_train(server_round, [_reply(model) for model in models])
        assert merged is not None
        return record_of(_typed(merged, models[0]))


class KrumRule(RobustRule):
    """The whole model of one client: that whose parameters are nearest to those of its neighbours.

    parameters: names of the arrays whose distances count, None: all floating ones. They are compared in float64: of
    float32 Flower's ‖a‖² + ‖b‖² − 2⟨a, b⟩ leaves few digits. Buffers do not count: BatchNorm's counter of batches would
    outweigh all else.
    """

    def __init__(
        self, cohort: int, flowers: flower.Krum, *, parameters: Set[str] | None = None, **options: Any
    ) -> None:
        super().__init__(cohort, flowers, **options)
        self.parameters = parameters

    def _merge(self, server_round: int, models: list[ArrayRecord]) -> ArrayRecord:
        floating = (name for name, array in models[0].items() if np.dtype(array.dtype).kind == "f")
        names = [name for name in floating if self.parameters is None or name in self.parameters]
        compared = ({name: NumpyArray(view(model[name]).astype(np.float64)) for name in names} for model in models)
        replies = [_reply(arrays, position=position) for position, arrays in enumerate(compared)]
        _, metrics = self.flowers.aggregate_train(server_round, replies)
        assert metrics is not None
        return models[int(metrics["position"])]  # type: ignore[arg-type]  # those are of the one that is chosen


def fedavgm(config: Config, holdout: Holdout) -> ServerOptimizer:
    """FedAvgM: v ← βv − Δ, x ← x − ηv. Hsu, Qi, Brown, arXiv 1909.06335.

    η = 1 as there; β = 0.9 is our default, one of the values tried there. (Flower's is 0, which is FedAvg.)
    """
    options = config.fedavgm
    theirs = flower.FedAvgM(server_learning_rate=options.server_learning_rate, server_momentum=options.server_momentum)
    return _optimizer(config, holdout, theirs)


def fedadam(config: Config, holdout: Holdout) -> ServerOptimizer:
    """FedAdam: m ← β₁m + (1 − β₁)Δ, v ← β₂v + (1 − β₂)Δ², x ← x + η_t m/(√v + τ). Reddi et al., arXiv 2003.00295.

    β₁ = 0.9, β₂ = 0.99, τ = 10⁻³ as there; η, which is tuned there for each task, is Flower's 0.1. Unlike the paper's
    algorithm 2, Flower corrects the bias, η_t = η √(1 − β₂ᵗ⁺¹)/(1 − β₁ᵗ⁺¹) in round t = 1, 2, …, and begins at v = 0
    (there v ≥ τ²).
    """
    return _optimizer(config, holdout, _adaptive(flower.FedAdam, config.fedadam))


def fedyogi(config: Config, holdout: Holdout) -> ServerOptimizer:
    """FedYogi: as FedAdam without its correction, and v ← v − (1 − β₂) Δ² sign(v − Δ²). Reddi et al., arXiv 2003.00295.

    β₁ = 0.9, β₂ = 0.99, τ = 10⁻³ as there; η is Flower's 0.01. Flower begins at v = 0.
    """
    return _optimizer(config, holdout, _adaptive(flower.FedYogi, config.fedyogi))


def fedadagrad(config: Config, holdout: Holdout) -> ServerOptimizer:
    """FedAdagrad: v ← v + Δ², x ← x + ηΔ/(√v + τ). Reddi et al., arXiv 2003.00295.

    β₁ = 0, τ = 10⁻³ as there; η is Flower's 0.1. Flower begins at v = 0.
    """
    theirs = flower.FedAdagrad(eta=config.fedadagrad.server_learning_rate, tau=config.fedadagrad.tau)
    return _optimizer(config, holdout, theirs)


def fedmedian(config: Config, holdout: Holdout) -> RobustRule:
    """The median of each coordinate. Yin et al., arXiv 1803.01498, algorithm 1, option I, of models for gradients."""
    return RobustRule(flowers=flower.FedMedian(), **cohorts(config))


def fedtrimmedavg(config: Config, holdout: Holdout) -> RobustRule:
    """The mean of each coordinate without its ⌊βK⌋ smallest and largest values. Yin et al., option II.

    β is Flower's 0.2; the paper's is to be at least the share of bad clients. K: usable replies of the round. Where
    βK < 1 nothing is cut and it is the plain mean.
    """
    return RobustRule(flowers=flower.FedTrimmedAvg(beta=config.fedtrimmedavg.beta), **cohorts(config))


def krum(config: Config, holdout: Holdout) -> KrumRule:
    """The client with the least Σ ‖w_k − w_j‖² over its K − f − 2 nearest others. Blanchard et al., arXiv 1703.02757.

    f: the bad clients that it is to withstand, 0 as in Flower; the paper demands 2f + 2 < K, the cohort.
    """
    theirs = flower.Krum(num_malicious_nodes=config.krum.num_malicious)
    return KrumRule(flowers=theirs, parameters=holdout.trainable, **cohorts(config))


def _adaptive(kind: type[flower.FedAdam | flower.FedYogi], options: FedAdamConfig) -> flower.FedAdam | flower.FedYogi:
    return kind(eta=options.server_learning_rate, beta_1=options.beta_1, beta_2=options.beta_2, tau=options.tau)


def _optimizer(config: Config, holdout: Holdout, theirs: flower.FedAvgM | FedOpt) -> ServerOptimizer:
    return ServerOptimizer(flowers=theirs, parameters=holdout.trainable, **cohorts(config))


def _reply(arrays: Mapping[str, Array], **metrics: float) -> Message:
    """A reply with these arrays that weighs 1, for Flower to look at, which may empty its record."""
    own = MetricRecord({messages.NUM_EXAMPLES: 1, **metrics})
    content = RecordDict({messages.ARRAYS: ArrayRecord(dict(arrays)), messages.METRICS: own})
    return Message(content, dst_node_id=1, message_type=MessageType.TRAIN)


def _typed(arrays: Mapping[str, Array], like: Mapping[str, Array]) -> dict[str, Any]:
    """In the order and the types of `like`: Flower makes float64 of some."""
    return {name: as_type(view(arrays[name]), np.dtype(array.dtype)) for name, array in like.items()}
