"""The one gate that every reply passes before any strategy, ours or Flower's, sees it.

Flower's FedAvg takes NaN and a negative weight, and one wrong shape or key ends its run.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedwsa import messages
from fedwsa.arrays import NumpyArray, as_type, view
from fedwsa.errors import RunError
from strategies.sampling import each

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]  # shape and type of every array of the model


class NoUsableReplyError(RunError):
    """A training round in which no client gave a reply that can be used."""


class Gate(Strategy):
    """Any strategy, shielded from replies that would poison or end its run; wrap it outermost.

    A reply passes if it answers this round's message, carries one model with the names (in their order), shapes and
    types that were sent and finite numbers, and one metric record with finite values and 0 < num-examples ≤ 10⁹.
    Others are left out; `failures` says why, one line each, for the phase that ended last.

    Flower's strategies end the run where clients report unlike metrics. They look at them when all replies are in, and
    by then those that not every usable reply has are gone.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.failures: list[str] = []
        self.usable = 0
        self._sent: list[Metadata] = []
        self._layout: Layout = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the wrapped strategy sends, marked with the round."""
        self._layout = {name: (tuple(array.shape), np.dtype(array.dtype)) for name, array in arrays.items()}
        return self._marked(server_round, self.strategy.configure_train(server_round, arrays, config, grid))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the wrapped strategy makes of the usable replies; NoUsableReplyError if there is none.

        The model keeps the types that were sent: Flower's FedAdam makes float64 of float32, and its FedAvg of counters.
        """
        passed = self._passed(server_round, replies, training=True)
        arrays, metrics = self.strategy.aggregate_train(server_round, passed)
        return arrays and self._typed(arrays), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the wrapped strategy sends, marked with the round."""
        return self._marked(server_round, self.strategy.configure_evaluate(server_round, arrays, config, grid))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """What the wrapped strategy makes of the usable replies."""
        return self.strategy.aggregate_evaluate(server_round, self._passed(server_round, replies, training=False))

    def summary(self) -> None:
        """As the wrapped strategy does."""
        self.strategy.summary()

    def state(self) -> dict[str, Tensor]:
        """The wrapped strategy's."""
        state: dict[str, Tensor] = self.strategy.state()  # type: ignore[attr-defined]
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The wrapped strategy's."""
        self.strategy.load_state(state)  # type: ignore[attr-defined]

    def _typed(self, arrays: ArrayRecord) -> ArrayRecord:
        for name, (_, dtype) in self._layout.items():
            if name in arrays and arrays[name].dtype != dtype:
                arrays[name] = NumpyArray(as_type(view(arrays[name]), dtype))
        return arrays

    def _marked(self, server_round: int, outgoing: Iterable[Message]) -> list[Message]:
        marked = list(outgoing)
        for message in marked:
            message.metadata.group_id = str(server_round)  # a reply inherits it
        self._sent = [message.metadata for message in marked]
        self.failures, self.usable = [], 0
        return marked

    def _passed(self, server_round: int, replies: Iterable[Message], *, training: bool) -> Iterator[Message]:
        received = 0
        passed: list[MetricRecord] = []
        for reply in each(replies):
            received += 1
            fault = _fault(reply, server_round, self._layout if training else None)
            if fault is None:
                self.usable += 1
                passed.append(reply.content.metric_records[messages.METRICS])
                yield reply
            else:
                self.failures.append(f"node {self._sender(reply.metadata)}: {fault}")
        _keep_common(passed)
        if missing := len(self._sent) - received:
            self.failures.append(f"{missing} of {len(self._sent)} clients did not reply in time")
        if training and self._sent and not self.usable:
            raise NoUsableReplyError(
                f"round {server_round}: none of {len(self._sent)} clients gave a usable reply; {self.failures[0]}"
            )

    def _sender(self, reply: Metadata) -> int:
        """Flower gives its own node id to the error reply in place of a node that died."""
        asked = {sent.message_id: sent.dst_node_id for sent in self._sent}
        return asked.get(reply.reply_to_message_id, reply.src_node_id)


def _keep_common(records: list[MetricRecord]) -> None:
    """Drop what not every record has, or not with the same length."""
    kinds = [{(key, len(v) if isinstance(v, list) else None) for key, v in record.items()} for record in records]
    common = set.intersection(*kinds) if kinds else set()
    for record, kind in zip(records, kinds, strict=True):
        for key, _ in kind - common:
            del record[key]


def _fault(reply: Message, server_round: int, layout: Layout | None) -> str | None:
    """Why a reply cannot be used, or None. layout: shape and type by name, for a reply that carries a model."""
    if reply.has_error():
        lines = (reply.error.reason or "").strip().splitlines()
        return f"error {reply.error.code}: {lines[-1] if lines else 'no reason given'}"
    if reply.metadata.group_id != str(server_round):
        return f"answers round {reply.metadata.group_id!r}, not {server_round}"
    if list(reply.content.metric_records) != [messages.METRICS]:
        return f"metric records are {sorted(reply.content.metric_records)}, not [{messages.METRICS!r}]"
    if fault := _metrics_fault(reply.content.metric_records[messages.METRICS]):
        return fault
    if layout is None:
        return None
    if list(reply.content.array_records) != [messages.ARRAYS]:
        return f"array records are {sorted(reply.content.array_records)}, not [{messages.ARRAYS!r}]"
    return _arrays_fault(reply.content.array_records[messages.ARRAYS], layout)


def _metrics_fault(metrics: MetricRecord) -> str | None:
    examples = metrics.get(messages.NUM_EXAMPLES)
    if not (isinstance(examples, int | float) and 0 < examples <= messages.MAX_EXAMPLES):
        return f"{messages.NUM_EXAMPLES} is {examples!r}, not a number in (0, {messages.MAX_EXAMPLES}]"
    for key, value in metrics.items():
        if not all(math.isfinite(number) for number in (value if isinstance(value, list) else [value])):
            return f"metric {key!r} is not finite"
    return None


def _arrays_fault(arrays: ArrayRecord, layout: Layout) -> str | None:
    """Also puts the decoded numbers in place of bytes, so that nobody decodes them again."""
    if unlike := layout.keys() ^ arrays.keys():
        return f"array names differ: {sorted(unlike)}"
    if list(layout) != list(arrays):  # scopes are told apart by it
        return f"arrays are not in the order in which they were sent: {list(arrays)}"
    for name, (shape, dtype) in layout.items():
        try:
            values = view(arrays[name])
        except Exception as error:  # whatever bytes may do to np.load
            return f"{name}: not a readable array ({error})"
        if values.shape != shape or values.dtype != dtype:
            return f"{name}: {values.dtype} {values.shape}, sent was {dtype} {shape}"
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            return f"{name}: not finite"
        if type(arrays[name]) is not NumpyArray:
            arrays[name] = NumpyArray(values)
    return None
