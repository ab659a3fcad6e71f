"""Messages on their way to clients, and what comes back, in the order of the messages."""

import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from math import inf
from operator import itemgetter
from typing import Any, Protocol, overload

import numpy as np
from flwr.app import ArrayRecord, Message
from numpy.typing import NDArray

from fedwsa.arrays import num_bytes
from fedwsa.simulation.folding import BLOCK, MakeFold
from fedwsa.simulation.schedule import UNIT_SECONDS, Durations, units
from fedwsa.tracing import span

FEED = 3  # units at the engine for each worker: one computed, one ready for the worker, one for the next free
HELD_BYTES = 1 << 26  # of answers that wait until those before them are there
HELD = (2, 16)  # their number for each worker, at least and at most

Piece = tuple[int, Any]  # how many messages it answers, and the reply or their fold (None: given up)


class Carrier(Protocol):
    """What a sending needs of the grid."""

    workers: int
    durations: Durations

    def partition_of(self, message: Message) -> int:
        """Whom a message is for."""

    def send(self, messages: list[Message], make: MakeFold | None, sending: "Sending", position: int) -> None:
        """Hand messages over that travel together; the answers come to `sending.arrived`."""

    def wait(self, timeout: float | None) -> None:
        """Wait until something may have arrived somewhere, for `timeout` seconds at most."""

    def give_up(self, message_ids: set[str]) -> None:
        """Expect no answer to these."""


class Sending:
    """Messages that go out in units, the longest first, and whose answers are given in the order of the messages.

    The answers that wait their turn are limited: from the limit on the units go out in order, and where the answer due
    still does not come, only its own. The limit is lifted once half of the time that was left has been waited for one
    answer: a client that hangs must not cost the replies of those that nobody has asked yet.
    """

    def __init__(self, grid: Carrier, messages: list[Message], make: MakeFold | None, timeout: float | None) -> None:
        self._grid = grid
        self._make = make
        self._left = timeout  # seconds of waiting; what the ServerApp does between two answers does not count
        self._is_late = False  # the answer that is due
        self.ids = [message.metadata.message_id for message in messages]
        self._position = 0  # of the answer that is due
        self._arrived: dict[int, Piece] = {}  # by position
        self._unanswered = 0  # units
        self._plan(messages)
        self._fill()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        """The answer that is due, as soon as it is there; (1, None) for one that was given up."""
        if self._position == len(self.ids):
            self._grid.give_up(set(self.ids))
            raise StopIteration
        late = None if self._left is None else self._left / 2
        while self._position not in self._arrived and self._may_wait():
            self._fill()
            if not self._unanswered:
                raise RuntimeError(f"{self.ids[self._position]} is neither answered nor on the way: an engine lost it")
            self._wait(late)
        self._is_late = False
        size, answer = self._arrived.pop(self._position, (1, None))
        self._position += size
        self._fill()  # the workers go on while the ServerApp looks at this answer
        return size, answer

    def finish(self) -> None:
        """Wait for all answers that are still to come, and keep them."""
        position = self._position
        kept = {}
        for size, answer in self:
            kept[position] = size, answer
            position += size
        self._arrived = kept
        self._position = min(kept, default=len(self.ids))

    def arrived(self, position: int, size: int, answer: Any) -> None:
        """Called by the grid."""
        unit = self._unit_of[position]
        self._missing[unit] -= size
        if self._missing[unit] == 0:
            self._unanswered -= 1
        if self._make is not None:  # parts that wait are put together as the `Tree` would do it
            while 2 * size <= BLOCK and self._arrived.get(position ^ size, (0, None))[0] == size:
                _, other = self._arrived.pop(position ^ size)
                earlier, later = (other, answer) if position & size else (answer, other)
                earlier.merge(later)
                position, size, answer = position & ~size, 2 * size, earlier
        self._arrived[position] = size, answer

    def _wait(self, late: float | None) -> None:
        """late: seconds that are left when an answer is."""
        if self._left is None or late is None:
            self._grid.wait(None)
            return
        start = time.monotonic()
        self._grid.wait(self._left if self._is_late else self._left - late)
        self._left -= time.monotonic() - start
        self._is_late = self._left <= late

    def _may_wait(self) -> bool:
        return self._left is None or self._left > 0

    def _plan(self, messages: list[Message]) -> None:
        """Which messages travel together, and which units go first."""
        durations = self._grid.durations
        kinds = [(self._grid.partition_of(message), message.metadata.message_type) for message in messages]
        sizes = units([durations.seconds(*kind) for kind in kinds], self._grid.workers)
        starts = np.cumsum([0, *sizes]).tolist()
        self._units = [(start, messages[start : start + size]) for start, size in zip(starts, sizes, strict=False)]
        self._unit_of = np.repeat(np.arange(len(sizes)), sizes).tolist()
        self._missing = list(sizes)
        ranks = np.zeros(len(sizes))
        if self._grid.workers > 1:  # else the order is nothing to gain by
            each = [durations.rank(*kind) for kind in kinds]
            ranks = np.add.reduceat(each, starts[:-1]) if each else ranks
        ranks = np.where(ranks < UNIT_SECONDS, 0, ranks)  # among short ones the order gains nothing: answers would wait
        if len({client for client, _ in kinds}) < len(kinds):
            _keep_order(ranks, [client for client, _ in kinds], self._unit_of)
        self._longest_last = np.lexsort((-np.arange(len(sizes)), ranks)).tolist()
        self._sent = [False] * len(sizes)
        self._lowest = 0  # unit that may not have been sent
        least, most = (each * self._grid.workers for each in HELD)
        self._room = int(np.clip(HELD_BYTES // max(1, _reply_bytes(messages, self._make)), least, most))

    def _fill(self) -> None:
        """Keep the engine busy, as long as there is time."""
        with span("dispatch"):
            self._feed()

    def _feed(self) -> None:
        while self._unanswered < FEED * self._grid.workers and self._may_wait():
            unit = self._next_unit()
            if unit is None:
                return
            start, messages = self._units[unit]
            self._units[unit] = start, []
            self._sent[unit] = True
            self._unanswered += 1
            self._grid.send(messages, self._make, self, start)

    def _next_unit(self) -> int | None:
        while self._lowest < len(self._sent) and self._sent[self._lowest]:
            self._lowest += 1
        if self._lowest == len(self._sent):
            return None
        if len(self._arrived) + self._unanswered >= self._room + FEED * self._grid.workers:
            is_due = self._units[self._lowest][0] <= self._position
            return self._lowest if is_due or self._is_late else None
        if len(self._arrived) >= self._room:
            return self._lowest
        while self._sent[self._longest_last[-1]]:
            self._longest_last.pop()
        return int(self._longest_last.pop())


class Replies(Sequence[Message]):
    """Replies as a list would hold them, except that iteration need not wait for the last one.

    `stream` gives each once and keeps none, so that a server's memory does not grow with the cohort.
    """

    def __init__(self, coming: Iterator[Message]) -> None:
        self._coming = coming
        self._kept: list[Message] = []

    def stream(self) -> Iterator[Message]:
        """Each reply once, in order; afterwards this object is empty."""
        while self._kept or self._advance():
            yield self._kept.pop(0)

    def __iter__(self) -> Iterator[Message]:
        position = 0
        while position < len(self._kept) or self._advance():
            yield self._kept[position]
            position += 1

    def _advance(self) -> bool:
        for reply in self._coming:
            self._kept.append(reply)
            return True
        return False

    def __len__(self) -> int:
        while self._advance():
            pass
        return len(self._kept)

    def __bool__(self) -> bool:
        return bool(self._kept) or self._advance()

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        len(self)
        return self._kept[index]


def _keep_order(ranks: NDArray[np.float64], clients: list[int], unit_of: list[int]) -> None:
    """Lower ranks until no unit goes before an earlier one of the same client, which gets its messages in order."""
    lowest: dict[int, float] = {}  # so far, by client
    for unit, group in groupby(zip(unit_of, clients, strict=True), itemgetter(0)):
        whose = [client for _, client in group]
        ranks[unit] = min(ranks[unit], *(lowest.get(client, inf) for client in whose))
        lowest.update(dict.fromkeys(whose, ranks[unit]))


def _reply_bytes(messages: list[Message], make: MakeFold | None) -> int:
    """About what an answer will have: the model that went out, as float64 sums where it is folded."""
    records = messages[0].content.values() if messages else ()
    return (2 if make else 1) * sum(num_bytes(record) for record in records if isinstance(record, ArrayRecord))
