"""The one gate that every reply passes before any strategy, ours or Flower's, sees it.

Flower's FedAvg takes NaN and a negative weight, and one wrong shape or key ends its run.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import Tensor

from fedwsa import messages
from fedwsa.arrays import NumpyArray, as_type, view
from fedwsa.errors import RunError
from fedwsa.simulation.folding import Fold, MakeFold
from fedwsa.simulation.sending import Replies
from fedwsa.warmup import loops_for
from strategies.sampling import each
from strategies.wrapper import Wrapper

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]  # shape and type of every array of a record
Layouts = Mapping[str, Layout]  # of every record of arrays in a message: the model's, and what a strategy adds


class NoUsableReplyError(RunError):
    """A training round in which too few clients gave a reply that can be used."""


class ClientFailedError(RunError):
    """A client whose reply cannot be used, in a run that is to end then."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a reply to a training has to carry: arrays, and metrics that are counts, see `messages.COUNTED`."""

    layouts: Layouts
    counted: tuple[str, ...] = ()


@dataclass(slots=True)
class Passage:
    """What passed the gate in one phase, and what did not."""

    received: int = 0
    usable: int = 0
    bytes_up: int = 0  # logical payload of all that was received
    failures: list[tuple[int, str]] = field(default_factory=list)  # node id, and why

    def check(self, reply: Message, server_round: int, expected: Expected | None) -> bool:
        """Whether a reply may pass. expected: of one to a training."""
        self.received += 1
        if reply.has_content():
            with suppress(Exception):  # whatever a client calls a type; the check will say so
                self.bytes_up += messages.payload_bytes(reply.content)
        fault = _fault(reply, server_round, expected)
        if fault is None:
            self.usable += 1
        else:
            self.failures.append((reply.metadata.src_node_id, fault))
        return fault is None

    def merge(self, later: Self) -> None:
        """Add what another has seen."""
        self.received += later.received
        self.usable += later.usable
        self.bytes_up += later.bytes_up
        self.failures += later.failures


class Gate(Wrapper):
    """Any strategy, shielded from replies that would poison or end its run; wrap it outermost.

    A reply passes if it answers this round's message, carries the records of arrays that were sent (the model and what
    the strategy adds to it) with the same names in their order, shapes and types and with finite numbers, and one
    metric record with finite values and 0 < num-examples ≤ 10⁹, and the counts that the objective asks for.
    Others are left out; `failures` says why, one line each, for the phase that ended last.

    min_replies: usable replies that a training round needs; with fewer it is a NoUsableReplyError.
    fail: a reply that is left out, or missing, is a ClientFailedError, once all are there.

    Flower's strategies end the run where clients report unlike metrics. They look at them when all replies are in, and
    by then those that not every usable reply has are gone.
    """

    def __init__(self, strategy: Strategy, *, min_replies: int = 1, fail: bool = False) -> None:
        super().__init__(strategy)
        self.min_replies = min_replies
        self.fail = fail
        self.failures: list[str] = []
        self.passage = Passage()
        self.sent: list[Metadata] = []
        self.bytes_down = 0
        self._expected = Expected({})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the wrapped strategy sends, marked with the round."""
        marked = self._marked(server_round, self.strategy.configure_train(server_round, arrays, config, grid))
        sent = {messages.ARRAYS: arrays, **(marked[0].content if marked else {})}
        layouts = {key: _layout(record) for key, record in sent.items() if isinstance(record, ArrayRecord)}
        asked = sent.get(messages.CONFIG)
        objective = asked.get(messages.OBJECTIVE) if isinstance(asked, ConfigRecord) else None
        self._expected = Expected(layouts, messages.COUNTED.get(str(objective), ()))
        return marked

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the wrapped strategy makes of the usable replies.

        The model keeps the types that were sent: Flower's FedAdam makes float64 of float32, and its FedAvg of counters.
        """
        arrays, metrics = self.strategy.aggregate_train(
            server_round, self._passed(server_round, replies, training=True)
        )
        return arrays and self._typed(arrays), metrics

    def folding(self, server_round: int) -> MakeFold | None:
        """Parts of what `conclude_train` takes, where the wrapped strategy has such: workers check the replies then."""
        inner = getattr(self.strategy, "folding", None)
        make = inner() if inner else None
        return partial(_GatedFold, make, server_round, self._expected) if make else None

    def conclude_train(self, server_round: int, folded: Fold | None) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What `aggregate_train` gives, from the fold of all replies."""
        if folded is None:
            return None, None
        assert isinstance(folded, _GatedFold)
        self._close(server_round, folded.passage, training=True)
        arrays, metrics = self.strategy.conclude_train(server_round, folded.inner)  # type: ignore[attr-defined]
        return arrays and self._typed(arrays), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the wrapped strategy sends, marked with the round."""
        return self._marked(server_round, self.strategy.configure_evaluate(server_round, arrays, config, grid))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """What the wrapped strategy makes of the usable replies."""
        return self.strategy.aggregate_evaluate(server_round, self._passed(server_round, replies, training=False))

    def state(self) -> dict[str, Tensor]:
        """The wrapped strategy's."""
        state: dict[str, Tensor] = self.strategy.state()  # type: ignore[attr-defined]
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The wrapped strategy's."""
        self.strategy.load_state(state)  # type: ignore[attr-defined]

    @property
    def usable(self) -> int:
        """Replies that passed in the phase that ended last."""
        return self.passage.usable

    def _typed(self, arrays: ArrayRecord) -> ArrayRecord:
        for name, (_, dtype) in self._expected.layouts[messages.ARRAYS].items():
            if name in arrays and arrays[name].dtype != dtype:
                arrays[name] = NumpyArray(as_type(view(arrays[name]), dtype))
        return arrays

    def _marked(self, server_round: int, outgoing: Iterable[Message]) -> list[Message]:
        marked = list(outgoing)
        sizes: dict[int, int] = {}  # messages of one broadcast share their content
        for message in marked:
            message.metadata.group_id = str(server_round)  # a reply inherits it
            key = id(message.content)
            if key not in sizes:
                sizes[key] = messages.payload_bytes(message.content)
        self.sent = [message.metadata for message in marked]
        self.bytes_down = sum(sizes[id(message.content)] for message in marked)
        self.failures, self.passage = [], Passage()
        return marked

    def _passed(self, server_round: int, replies: Iterable[Message], *, training: bool) -> Replies:
        """Some strategies look at them twice."""
        return Replies(self._usable(server_round, replies, training=training))

    def _usable(self, server_round: int, replies: Iterable[Message], *, training: bool) -> Iterator[Message]:
        passage = self.passage
        passed: list[MetricRecord] = []
        asked = {sent.message_id: sent.dst_node_id for sent in self.sent}
        for reply in each(replies):
            if passage.check(reply, server_round, self._expected if training else None):
                passed.append(messages.metrics_of(reply))
                yield reply
            else:  # Flower gives its own node id to the error reply in place of a node that died
                node, fault = passage.failures[-1]
                passage.failures[-1] = asked.get(reply.metadata.reply_to_message_id, node), fault
        _keep_common(passed)
        self._close(server_round, passage, training=training)

    def _close(self, server_round: int, passage: Passage, *, training: bool) -> None:
        """All replies are in."""
        self.passage = passage
        self.failures = [f"node {node}: {fault}" for node, fault in passage.failures]
        if missing := len(self.sent) - passage.received:
            self.failures.append(f"{missing} of {len(self.sent)} clients did not reply in time")
        if self.fail and self.failures:
            raise ClientFailedError(f"round {server_round}: {self.failures[0]}")
        if training and self.sent and passage.usable < self.min_replies:
            number = "none" if passage.usable == 0 else str(passage.usable)
            needed = f", {self.min_replies} are needed" if self.min_replies > 1 else ""
            first = f"; {self.failures[0]}" if self.failures else ""
            diverged = first and all(failure.endswith("not finite") for failure in self.failures)
            remedy = " (a run that diverges is to be begun anew, with a smaller learning-rate or a clip-norm)"
            raise NoUsableReplyError(
                f"round {server_round}: {number} of {len(self.sent)} clients gave a usable reply{needed}"
                f"{first}{remedy if diverged else ''}"
            )


class _GatedFold:
    """What passed the gate, and the wrapped strategy's part of the replies that did."""

    def __init__(self, make: MakeFold, server_round: int, expected: Expected) -> None:
        self.passage, self.inner = Passage(), make()
        self._server_round: int = server_round
        self._expected: Expected = expected

    def __getstate__(self) -> dict[str, Any]:
        """Without what was expected: a part that travels has its reply already."""
        return {"passage": self.passage, "inner": self.inner}

    def add(self, reply: Message) -> None:
        if self.passage.check(reply, self._server_round, self._expected):
            self.inner.add(reply)

    def merge(self, later: Self) -> None:
        self.passage.merge(later.passage)
        self.inner.merge(later.inner)


def _keep_common(records: list[MetricRecord]) -> None:
    """Drop what not every record has, or not with the same length."""
    kinds = [{(key, len(v) if isinstance(v, list) else None) for key, v in record.items()} for record in records]
    common = set.intersection(*kinds) if kinds else set()
    for record, kind in zip(records, kinds, strict=True):
        for key, _ in kind - common:
            del record[key]


def _layout(arrays: ArrayRecord) -> Layout:
    return {name: (tuple(array.shape), np.dtype(array.dtype)) for name, array in arrays.items()}


def _fault(reply: Message, server_round: int, expected: Expected | None) -> str | None:
    """Why a reply cannot be used, or None. expected: of one to a training."""
    if reply.has_error():
        lines = (reply.error.reason or "").strip().splitlines()
        return f"error {reply.error.code}: {lines[-1] if lines else 'no reason given'}"
    if reply.metadata.group_id != str(server_round):
        return f"answers round {reply.metadata.group_id!r}, not {server_round}"
    if fault := _kinds_fault(reply.content, MetricRecord, [messages.METRICS], "metric"):
        return fault
    if fault := _metrics_fault(messages.metrics_of(reply), expected.counted if expected else ()):
        return fault
    if expected is None:
        return None
    if fault := _kinds_fault(reply.content, ArrayRecord, list(expected.layouts), "array"):
        return fault
    records = ((cast(ArrayRecord, reply.content[key]), layout) for key, layout in expected.layouts.items())
    return next(filter(None, (_arrays_fault(record, layout) for record, layout in records)), None)


def _kinds_fault(content: RecordDict, kind: type, keys: list[str], name: str) -> str | None:
    """There must be these records of a kind and no others."""
    found = sorted(own for own, record in content.items() if isinstance(record, kind))
    return None if found == sorted(keys) else f"{name} records are {found}, not {sorted(keys)}"


def _metrics_fault(metrics: MetricRecord, counted: tuple[str, ...]) -> str | None:
    examples = metrics.get(messages.NUM_EXAMPLES)
    if not (isinstance(examples, int | float) and 0 < examples <= messages.MAX_EXAMPLES):
        return f"{messages.NUM_EXAMPLES} is {examples!r}, not a number in (0, {messages.MAX_EXAMPLES}]"
    for key in counted:
        count = metrics.get(key)
        if not (isinstance(count, int | float) and 1 <= count <= messages.MAX_EXAMPLES):
            return f"{key} is {count!r}, not a number in [1, {messages.MAX_EXAMPLES}]"
    for key, value in metrics.items():
        if not all(math.isfinite(number) for number in (value if isinstance(value, list) else [value])):
            return f"metric {key!r} is not finite"
    return None


def _arrays_fault(arrays: ArrayRecord, layout: Layout) -> str | None:
    """Also puts the decoded numbers in place of bytes, so that nobody decodes them again."""
    if list(layout) != list(arrays):
        if unlike := layout.keys() ^ arrays.keys():
            return f"array names differ: {sorted(unlike)}"
        return f"arrays are not in the order in which they were sent: {list(arrays)}"  # scopes are told apart by it
    for name, (shape, dtype) in layout.items():
        try:
            values = view(arrays[name])
        except Exception as error:  # whatever bytes may do to np.load
            return f"{name}: not a readable array ({error})"
        if not isinstance(values, np.ndarray):  # np.load makes something else of an archive
            return f"{name}: not a readable array ({type(values).__name__})"
        if values.shape != shape or values.dtype != dtype:
            return f"{name}: {values.dtype} {values.shape}, sent was {dtype} {shape}"
        if values.dtype.kind == "f" and not _all_finite(values):
            return f"{name}: not finite"
        if type(arrays[name]) is not NumpyArray:
            arrays[name] = NumpyArray(values)
    return None


def _all_finite(values: NDArray[Any]) -> bool:
    loops = loops_for(values)
    return bool(loops.all_finite(values.reshape(-1)) if loops else np.isfinite(values).all())
