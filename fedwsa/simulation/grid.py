"""Flower's `Grid` over an engine, so that any ServerApp runs unchanged."""

import time
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from itertools import count
from typing import overload

from flwr.app import Message, RecordDict
from flwr.app.message.message import make_message
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedwsa.simulation.engine import Engine, Job, Record, snapshot

FIRST_NODE_ID = 1000  # Flower gives 1 to the server; node id − FIRST_NODE_ID is the partition id
WINDOW = 4  # messages handed to the engine for each worker ahead of the next reply due


class SimulationGrid(Grid):
    """The clients of one run. Replies come in the order in which their messages were sent."""

    def __init__(self, engine: Engine, num_clients: int) -> None:
        self.engine = engine
        self.num_clients = num_clients
        self._run = Run.create_empty(run_id=1)
        self._numbers = count(1)
        self._states: dict[int, RecordDict] = {}  # of the clients that keep any, by partition id
        self._partition_of: dict[str, int] = {}  # message id → partition id, while the answer is due
        self._due: dict[int, list[Message]] = {}  # by partition id; the first of each is with the engine
        self._replies: dict[str, Message] = {}  # arrived, not yet asked for
        self._open: list[Replies] = []

    def set_run(self, run: Run) -> None:
        """See Grid."""
        self._run = run

    @property
    def run(self) -> Run:
        """See Grid."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See Grid."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Ascending; every client is always there."""
        return list(range(FIRST_NODE_ID, FIRST_NODE_ID + self.num_clients))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand messages to the clients; the ids are for `pull_messages`."""
        self.finish()
        return [self.send(message) for message in self._numbered(messages)]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages that are there by now; each is given once."""
        self._receive(timeout=0)
        return [self._replies.pop(message_id) for message_id in list(message_ids) if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> "Replies":
        """Replies in the order of the messages; iterating over them gives each as soon as all before it are there.

        After `timeout` seconds of waiting (None: no limit) the replies that are missing are given up, running clients
        included.
        """
        self.finish()
        replies = Replies(self, self._numbered(messages), timeout)
        self._open.append(replies)
        return replies

    def finish(self) -> None:
        """Run what was sent and never looked at, as a real network would."""
        for replies in self._open:
            replies.finish()
        self._open.clear()

    def _numbered(self, messages: Iterable[Message]) -> list[Message]:
        """Copies with ids: clients get what the ServerApp sent, whatever it changes before they start."""
        numbered: list[Message] = []
        taken: dict[int, tuple[Record, Record]] = {}  # by id of the original, which stays alive here
        for message in messages:
            if not 0 <= message.metadata.dst_node_id - FIRST_NODE_ID < self.num_clients:
                raise ValueError(f"message for node {message.metadata.dst_node_id}: no such node")
            message.metadata.__dict__["_message_id"] = f"message-{next(self._numbers)}"
            content = RecordDict()
            for key, record in message.content.items():
                if id(record) not in taken:
                    taken[id(record)] = record, snapshot(record)
                content[key] = taken[id(record)][1]
            numbered.append(make_message(copy(message.metadata), content))
        return numbered

    def send(self, message: Message) -> str:
        """Hand one numbered message to the engine; a client gets one at a time, with its state after the one before."""
        partition_id = message.metadata.dst_node_id - FIRST_NODE_ID
        self._partition_of[message.metadata.message_id] = partition_id
        due = self._due.setdefault(partition_id, [])
        due.append(message)
        if len(due) == 1:
            self._submit(partition_id)
        return message.metadata.message_id

    def _submit(self, partition_id: int) -> None:
        message = self._due[partition_id][0]
        self.engine.submit(Job(message, partition_id, self._states.get(partition_id) or RecordDict()))

    def wait_for(self, message_id: str, timeout: float | None) -> Message | None:
        """The reply to a message that was sent, or None if it does not come within `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while message_id not in self._replies:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            self._receive(left)
        return self._replies.pop(message_id)

    def give_up(self, message_ids: set[str]) -> None:
        """Expect no reply to these any more."""
        self.engine.cancel(message_ids)
        for message_id in message_ids:
            self._replies.pop(message_id, None)
        for partition_id in {self._partition_of.pop(key) for key in message_ids & self._partition_of.keys()}:
            self._strike(partition_id, message_ids)

    def _strike(self, partition_id: int, message_ids: set[str]) -> None:
        """Messages off a client's list; the one that is now the first starts."""
        first = self._due[partition_id][0]
        left = [message for message in self._due.pop(partition_id) if message.metadata.message_id not in message_ids]
        if left:
            self._due[partition_id] = left
            if left[0] is not first:
                self._submit(partition_id)

    def _receive(self, timeout: float | None) -> None:
        for answer in self.engine.collect(timeout):
            partition_id = self._partition_of.pop(answer.message_id, None)
            if partition_id is None:  # given up in the meantime
                continue
            if answer.state or partition_id in self._states:
                self._states[partition_id] = answer.state
            answer.reply.metadata.__dict__["_message_id"] = f"reply-to-{answer.message_id}"
            self._replies[answer.message_id] = answer.reply
            self._strike(partition_id, {answer.message_id})


class Replies(Sequence[Message]):
    """Replies as a list would hold them, except that iteration need not wait for the last one.

    `stream` gives each once and keeps none, so that a server's memory does not grow with the cohort.
    """

    def __init__(self, grid: SimulationGrid, messages: list[Message], timeout: float | None) -> None:
        self._grid = grid
        self._ids = [message.metadata.message_id for message in messages]
        self._unsent = messages
        self._unsent.reverse()
        self._left = timeout  # seconds of waiting; what the ServerApp does between two replies does not count
        self._kept: list[Message] = []
        self._next = self._arrivals()
        self._fill(0)

    def stream(self) -> Iterator[Message]:
        """Each reply once, in order; afterwards this object is empty."""
        while self._kept or self._advance():
            yield self._kept.pop(0)

    def finish(self) -> None:
        """Wait for all that are still to come."""
        self._kept.extend(self._next)

    def _fill(self, position: int) -> None:
        """Send up to a window ahead of the reply at `position`."""
        if self._left is not None and self._left <= 0:
            return
        ahead = position + WINDOW * self._grid.engine.workers
        while self._unsent and len(self._ids) - len(self._unsent) < ahead:
            self._grid.send(self._unsent.pop())

    def _arrivals(self) -> Iterator[Message]:
        for position, message_id in enumerate(self._ids):
            self._fill(position)
            start = time.monotonic()
            reply = self._grid.wait_for(message_id, self._left)
            if self._left is not None:
                self._left -= time.monotonic() - start
            if reply is not None:
                yield reply
        if self._left is not None:
            self._grid.give_up(set(self._ids))

    def __iter__(self) -> Iterator[Message]:
        position = 0
        while position < len(self._kept) or self._advance():
            yield self._kept[position]
            position += 1

    def _advance(self) -> bool:
        for reply in self._next:
            self._kept.append(reply)
            return True
        return False

    def __len__(self) -> int:
        self.finish()
        return len(self._kept)

    def __bool__(self) -> bool:
        return bool(self._kept) or self._advance()

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        self.finish()
        return self._kept[index]
