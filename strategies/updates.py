"""What the strategies share that look at the clients' updates y_k − x besides averaging the models."""

from collections.abc import Iterable, Mapping, Set
from typing import Any, Self

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import Tensor

from fedwsa import messages
from fedwsa.arrays import NumpyArray, as_type, view
from strategies.aggregation import MeanFold, Weigh
from strategies.fedavg import FedAvg


class OfUpdates(FedAvg):
    """FedAvg that knows which model it sent, x, and which of the arrays are parameters.

    parameters: names of the arrays that the rule is about, None: all floating ones. The others, BatchNorm's statistics
    and counters, are averaged as FedAvg does.
    """

    def __init__(self, cohort: int, *, parameters: Set[str] | None = None, **options: Any) -> None:
        super().__init__(cohort, **options)
        self.parameters = parameters
        self.sent = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg, and keep in mind what is sent."""
        self.sent = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def origin(self) -> dict[str, NDArray[Any]]:
        """x, the parameters alone, in the order of the model."""
        return {name: view(array) for name, array in self.sent.items() if self.is_parameter(name, array)}

    def is_parameter(self, name: str, array: Array) -> bool:
        """Whether the rule is about an array."""
        return np.dtype(array.dtype).kind == "f" and (self.parameters is None or name in self.parameters)

    def stepped(self, mean: ArrayRecord, step: float) -> ArrayRecord:
        """x + step · (mean − x) for the parameters, the mean for all else; exactly the mean at step = 1."""
        for name, x in self.origin().items():
            ahead = view(mean[name])
            moved = (1 - step) * x.astype(np.float64) + step * ahead.astype(np.float64)
            mean[name] = NumpyArray(as_type(moved, ahead.dtype))
        return mean


def pack_kept(what: str, kept: Mapping[str, NDArray[np.float64]]) -> dict[str, Tensor]:
    """Arrays by name as part of a strategy's `state`."""
    return {f"{what}/{name}": torch.from_numpy(np.array(values)) for name, values in kept.items()}


def unpack_kept(what: str, state: Mapping[str, Tensor]) -> dict[str, NDArray[np.float64]]:
    """What `pack_kept` was given, in memory of its own."""
    return {key.removeprefix(f"{what}/"): values.numpy().copy() for key, values in state.items()}


class UpdateFold(MeanFold):
    """What FedAvg makes of replies, and Σ_k ‖y_k − x‖² of each parameter, float64.

    start: x, by the names of the parameters.
    """

    def __init__(self, weigh: Weigh, start: Mapping[str, NDArray[Any]]) -> None:
        super().__init__(weigh)
        self.start = start
        self.squares = dict.fromkeys(start, 0.0)

    def add(self, reply: Message) -> None:
        """A reply that passed the gate."""
        super().add(reply)
        for name, found in squares(messages.arrays_of(reply), self.start).items():
            self.squares[name] += found

    def merge(self, later: Self) -> None:
        """See `Fold`."""
        super().merge(later)
        for name, found in later.squares.items():
            self.squares[name] += found


def squares(arrays: Mapping[str, Array], start: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """‖y − x‖² by array."""
    return {
        name: square(np.subtract(view(arrays[name]).reshape(-1), x.reshape(-1), dtype=np.float64))
        for name, x in start.items()
    }


def square(values: NDArray[Any]) -> float:
    """‖v‖², summed in float64. Not by BLAS, whose threads would decide the last bits."""
    return float(np.square(values, dtype=np.float64).sum())
