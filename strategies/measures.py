"""What averaging does to the clients' models, looked at in some rounds as their replies pass by."""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedwsa import arrays as flower_arrays
from fedwsa import messages
from fedwsa.evaluation import evaluate
from fedwsa.simulation.folding import MakeFold
from fedwsa.simulation.sending import Replies
from strategies.aggregation import Weigh, weight_of
from strategies.holdout import Holdout
from strategies.sampling import each
from strategies.updates import square
from strategies.wrapper import Wrapper

UPDATE_NORM, UPDATE_COSINE = "update-norm", "update-cosine"
LAYER_UPDATE_NORMS, LAYER_UPDATE_COSINES = "layer-update-norms", "layer-update-cosines"
ROUND_BARRIER, IMPROVEMENT_LOST = "round-barrier", "improvement-lost"
MIN_GAIN = 1e-3  # of the old model's loss; of less no share is taken

Vector = Sequence[NDArray[np.float64]]  # in pieces


class Measures(Wrapper):
    """Any strategy, with measures of every `every`-th round among the metrics of its training. Ours.

    With x the model that was sent, y_k that of client k and x′ the new global model:

    `update-norm`: mean over clients of ‖y_k − x‖, over the parameters that train; `layer-update-norms`, by layer.
    `update-cosine`: mean over pairs of clients of the cosine between y_k − x and y_j − x; `layer-update-cosines`, by
    layer. Clients that did not move count for no pair; without a pair it is left out, or NaN in the list.
    `round-barrier`: L(x′) − Σ p_k L(y_k), nats a sample, L the loss on the server's held-out samples and p_k the
    weights of the strategy's mean; left out without such samples.
    `improvement-lost`: the barrier as a share of what the clients gained, L(x) − Σ p_k L(y_k): 0 where the new model
    is as good as they are on average, 1 where all is lost, less than 0 where it is better; left out where they gained
    a thousandth of L(x) or less, since it would then be rounding or in the hundreds.

    The model stays as it is, to the bit. In these rounds all replies come to the server, which keeps three models in
    float64 besides; in the others nothing is done.
    every: ≥ 1. holdout: its module is filled anew at each look, and whoever else uses it must do so too.
    Raises ValueError for another `every`.
    """

    def __init__(self, strategy: Strategy, holdout: Holdout, every: int) -> None:
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every!r}; to measure nothing, leave the wrapper out")
        super().__init__(strategy)
        self.holdout = holdout
        self.every = every
        self._look: _Look | None = None  # of this round, if it is measured

    def __getattr__(self, name: str) -> Any:
        """What a strategy may have besides (its state, its weights, the end of a fold) is the wrapped one's."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the wrapped strategy sends."""
        weigh: Weigh = getattr(self.strategy, "weigh", weight_of)
        self._look = _Look(arrays, self.holdout, weigh) if server_round % self.every == 0 else None
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def folding(self) -> MakeFold | None:
        """The wrapped strategy's, but for rounds whose replies are looked at here."""
        inner = getattr(self.strategy, "folding", None)
        return inner() if inner and self._look is None else None

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the wrapped strategy makes of the replies; the measures join the metrics."""
        look, self._look = self._look, None
        if look is None:
            return self.strategy.aggregate_train(server_round, replies)
        arrays, metrics = self.strategy.aggregate_train(server_round, Replies(look.at_each(replies)))
        return (arrays, MetricRecord({**(metrics or {}), **look.metrics(arrays)})) if arrays else (arrays, metrics)


class _Look:
    """At one round: the updates, and the losses on the server's samples."""

    def __init__(self, start: ArrayRecord, holdout: Holdout, weigh: Weigh) -> None:
        trainable = {name for name, weights in holdout.model.named_parameters() if weights.requires_grad}
        self.updates = Updates(start, trainable)
        self.start = start
        self.holdout = holdout
        self.weigh = weigh
        self.loss, self.weight = 0.0, 0.0  # of the clients: weighted sum, and its weights'

    def at_each(self, replies: Iterable[Message]) -> Iterator[Message]:
        """The replies, each looked at before the strategy has it, which may change it."""
        for reply in each(replies):
            if reply.has_content():
                arrays, weight = messages.arrays_of(reply), self.weigh(messages.metrics_of(reply))
                self.updates.add(arrays)
                self.loss += weight * self._loss_of(arrays)
                self.weight += weight
            yield reply

    def metrics(self, end: ArrayRecord) -> dict[str, float | list[float]]:
        """See `Measures`."""
        found = self.updates.metrics()
        if len(self.holdout.labels) and self.weight > 0:
            found |= _averaging(self._loss_of(self.start), self.loss / self.weight, self._loss_of(end))
        return {key: value for key, value in found.items() if isinstance(value, list) or math.isfinite(value)}

    def _loss_of(self, arrays: ArrayRecord) -> float:
        if not len(self.holdout.labels):
            return 0.0
        flower_arrays.load(self.holdout.model.state_dict(), arrays)
        return evaluate(self.holdout.model, self.holdout.images, self.holdout.labels)[0]


class Updates:
    """Norms of updates that come one by one, and the cosines between them, none of which is kept.

    trainable: names of the arrays of which the whole consists; layers are told apart by `messages.layer_names`.
    """

    def __init__(self, start: ArrayRecord, trainable: Collection[str]) -> None:
        self.layers = messages.layer_names(start)
        self.whole = [name for name in start if name in trainable]
        self.start = {name: flower_arrays.view(start[name]) for name in {*self.whole, *self.layers}}
        self.of_whole, self.of_layers = Directions(), {layer: Directions() for layer in self.layers}

    def add(self, arrays: ArrayRecord) -> None:
        """A client's model, of the same names and shapes."""
        moves = {
            name: np.subtract(flower_arrays.view(arrays[name]), before, dtype=np.float64)
            for name, before in self.start.items()
        }
        self.of_whole.add([moves[name] for name in self.whole])
        for layer, directions in self.of_layers.items():
            directions.add([moves[layer]])

    def metrics(self) -> dict[str, float | list[float]]:
        """The means; NaN where there is none."""
        return {
            UPDATE_NORM: self.of_whole.norm(),
            UPDATE_COSINE: self.of_whole.cosine(),
            LAYER_UPDATE_NORMS: [directions.norm() for directions in self.of_layers.values()],
            LAYER_UPDATE_COSINES: [directions.cosine() for directions in self.of_layers.values()],
        }


class Directions:
    """Of vectors v_k that come one by one: the mean norm, and the mean cosine over pairs, in one vector's memory.

    With unit vectors u_k it is Σ_{j≠k} ⟨u_j, u_k⟩ / (K(K − 1)) = (‖Σ u_k‖² − K) / (K(K − 1)).
    """

    def __init__(self) -> None:
        self.norms = 0.0
        self.vectors = self.moved = 0  # how many, and how many are not zero
        self.sums: list[NDArray[np.float64]] = []

    def add(self, vector: Vector) -> None:
        """One more; it is not kept."""
        norm = math.sqrt(_square(vector))
        self.vectors += 1
        self.norms += norm
        if norm > 0:
            self.moved += 1
            self.sums = self.sums or [np.zeros_like(piece) for piece in vector]
            for total, piece in zip(self.sums, vector, strict=True):
                total += piece / norm

    def norm(self) -> float:
        """NaN without a vector."""
        return self.norms / self.vectors if self.vectors else math.nan

    def cosine(self) -> float:
        """NaN without a pair."""
        if self.moved < 2:
            return math.nan
        return (_square(self.sums) - self.moved) / (self.moved * (self.moved - 1))


def _square(vector: Vector) -> float:
    """‖v‖²."""
    return math.fsum(square(piece) for piece in vector)


def _averaging(before: float, clients: float, after: float) -> dict[str, float | list[float]]:
    """Barrier and share lost, from losses in nats: of the old model, the clients on average, the new model."""
    barrier, gain = after - clients, before - clients
    lost = barrier / gain if gain > MIN_GAIN * before else math.nan
    return {ROUND_BARRIER: barrier, IMPROVEMENT_LOST: lost}
