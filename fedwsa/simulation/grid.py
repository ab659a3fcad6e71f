"""Flower's `Grid` over an engine, so that any ServerApp runs unchanged."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.run import Run

from fedwsa import tracing
from fedwsa.run_folder import RunFolderError
from fedwsa.simulation.engine import Answer, Engine, Job, Outcome, Task, own_content
from fedwsa.simulation.folding import Fold, MakeFold, Tree
from fedwsa.simulation.schedule import Durations
from fedwsa.simulation.sending import Replies, Sending
from fedwsa.simulation.states import ClientStates
from fedwsa.simulation.turns import Turns
from fedwsa.tracing import span

NUMBERS = count(1)  # of messages; one count for the process: a thread left behind must not name another run's
UNKNOWN, EXPIRED = "no such message, or its reply was pulled before", "its time to live is over"
FOREVER = 1e9  # seconds; what is longer is no limit, and more than a wait can be told
FIRST_NODE_ID = 1000  # Flower gives 1 to the server; node id − FIRST_NODE_ID is the partition id


@dataclass(slots=True)
class _OnTheWay:
    """A message whose answer is not there yet."""

    message: Message
    partition_id: int
    make: MakeFold | None
    sending: Sending | None  # None: it was pushed, and waits to be pulled
    position: int


class SimulationGrid(Grid):
    """The clients of one run. Replies come in the order in which their messages were sent.

    Made in the thread of the ServerApp; other threads may use it too (`fedwsa.simulation.turns`).
    client_sizes: samples of each client, by partition id, so that the first round can begin with the longest.
    """

    def __init__(self, engine: Engine, num_clients: int, client_sizes: Sequence[int] | None = None) -> None:
        self.engine = engine
        self.num_clients = num_clients
        self.workers = engine.workers
        self.durations = Durations(client_sizes)
        self.states = ClientStates()
        self._run = Run.create_empty(run_id=1)
        self._on_the_way: dict[str, _OnTheWay] = {}  # by message id, until the answer is there
        self._due: dict[int, list[str]] = {}  # by partition id; the first of each is with the engine
        self._replies: dict[str, Message] = {}  # to pushed messages, not yet asked for
        self._open: list[Sending] = []
        self._pushed = 0  # on the way
        self._closed = False
        self._failed: RunFolderError | None = None  # what clients keep could not be read or written
        self._thread = threading.get_ident()
        self._turns = Turns(lambda: self.receive(None), lambda: self._pushed > 0, engine.wake)

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
        messages = list(messages)  # what makes them may wait for another thread
        with self._turns:
            self.finish()
            return self._push(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages that are there by now; each is given once.

        An error reply in place of that to a message that there is not, or whose reply was given, as Flower has it. In
        this process (`inprocess`) the clients that were pushed to are run now.
        """
        with self._turns:
            self._take_what_is_there()
            asked = list(dict.fromkeys(message_ids))
            there = [message_id for message_id in asked if message_id not in self._on_the_way]
            return [self._replies.pop(id_) if id_ in self._replies else _unavailable(id_, UNKNOWN) for id_ in there]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Replies:
        """Replies in the order of the messages; iterating over them gives each as soon as all before it are there.

        After `timeout` seconds of waiting the replies that are missing are given up, running clients included; of 0
        nothing is sent. Without one the messages' time to live (12 hours by default) is the limit, after which error
        replies stand for them, as Flower has it. To another thread than that of the ServerApp they are given when all
        are there.
        """
        messages = list(messages)
        if not self._is_own_thread():
            return Replies(iter(self._from_another_thread(messages, timeout)))
        with self._turns:
            self.finish()
            sending = Sending(self, self._numbered(messages), None, _limit(messages, timeout))
            self._open.append(sending)
        return Replies(self._coming(sending, timeout is None))

    def _is_own_thread(self) -> bool:
        return threading.get_ident() == self._thread

    def _coming(self, sending: Sending, expires: bool) -> Iterator[Message]:
        ids = iter(sending.ids)
        while True:
            with self._turns:
                piece = next(sending, None)
            if piece is None:
                return
            message_id, reply = next(ids), piece[1]
            if reply is not None or expires:
                yield reply or _unavailable(message_id, EXPIRED)

    def _from_another_thread(self, messages: list[Message], timeout: float | None) -> list[Message]:
        with self._turns:
            ids = self._push(messages)
        if self.engine.workers_elsewhere:
            limit = _limit(messages, timeout)
            self._turns.wait_for(lambda: self._on_the_way.keys().isdisjoint(ids), limit)
        with self._turns:
            self._take_what_is_there()
            self.give_up(set(ids))
            replies = [self._replies.pop(message_id, None) for message_id in ids]
        if timeout is not None:
            return [reply for reply in replies if reply]
        return [reply or _unavailable(message_id, EXPIRED) for message_id, reply in zip(ids, replies, strict=True)]

    def _take_what_is_there(self) -> None:
        while self.receive(timeout=0):
            pass

    def _push(self, messages: Iterable[Message]) -> list[str]:
        numbered = self._numbered(messages)
        for message in numbered:
            self._pushed += 1
            self.send([message], None, None, 0)
        if self.engine.workers_elsewhere:
            self._turns.feed()
        return [message.metadata.message_id for message in numbered]

    def fold(self, messages: Iterable[Message], make: MakeFold, *, timeout: float | None = None) -> Fold | None:
        """What the replies come to, error replies included; None if there are no messages.

        The workers fold what they can; the result does not depend on how many there are. A reply that is missing after
        `timeout` seconds of waiting, or without one after the messages' time to live, is given up. make: picklable;
        gives an empty part.
        """
        messages = list(messages)
        with self._turns:
            self.finish()
            sending = Sending(self, self._numbered(messages), make, _limit(messages, timeout))
            self._open.append(sending)  # until it is done: what is raised meanwhile leaves no message behind
            tree = Tree()
            for size, part in sending:
                with span("aggregate"):
                    tree.push(size, make() if part is None else part)
            return tree.total()

    def finish(self) -> None:
        """Run what was sent and never looked at, as a real network would.

        Other threads than the ServerApp's do not wait for what that has sent.
        """
        if not self._is_own_thread():
            return
        with self._turns:
            for sending in self._open:
                sending.finish()
            self._open.clear()

    def keep_states(self, states: ClientStates) -> None:
        """What clients keep from now on, instead of what they kept."""
        self.finish()
        self.states.close()
        self.states = states

    def close(self) -> None:
        """Nothing goes out or comes in any more."""
        self._closed = True
        self._turns.close()
        self.states.close()

    def _check_open(self) -> None:
        """A thread that the ServerApp has left behind must not use the engine, which may have begun another."""
        if self._closed:
            raise RuntimeError("the simulation has ended: nothing can be sent or received any more")
        if self._failed:
            raise self._failed

    def _numbered(self, messages: Iterable[Message]) -> list[Message]:
        """Copies with ids: clients get what the ServerApp sent, whatever it changes before they start."""
        self._check_open()
        numbered: list[Message] = []
        contents: dict[int, tuple[RecordDict, RecordDict]] = {}  # by id of the original, which stays alive here
        records: dict[int, tuple[object, ArrayRecord | ConfigRecord | MetricRecord]] = {}  # likewise
        for message in messages:
            if not 0 <= message.metadata.dst_node_id - FIRST_NODE_ID < self.num_clients:
                raise ValueError(f"message for node {message.metadata.dst_node_id}: no such node")
            message.metadata.__dict__["_message_id"] = f"message-{next(NUMBERS)}"
            content = message.content
            if id(content) not in contents:
                own = own_content(content)
                for key, record in content.items():  # one record in several contents stays one
                    own[key] = records.setdefault(id(record), (record, own[key]))[1]
                contents[id(content)] = content, own
            numbered.append(make_message(_copy(message.metadata), contents[id(content)][1]))
        return numbered

    def partition_of(self, message: Message) -> int:
        """Whom a message is for."""
        return message.metadata.dst_node_id - FIRST_NODE_ID

    def send(self, messages: list[Message], make: MakeFold | None, sending: Sending | None, position: int) -> None:
        """Hand numbered messages to the engine, as one task if they are for clients that have nothing to do.

        A client gets one message at a time, with its state after the one before. The answers go to `sending`, whose
        messages these are from `position` on, or else wait to be pulled.
        """
        self._check_open()
        partitions = [self.partition_of(message) for message in messages]
        idle = self._due.keys().isdisjoint(partitions) and len(set(partitions)) == len(partitions)
        for offset, (message, partition_id) in enumerate(zip(messages, partitions, strict=True)):
            message_id = message.metadata.message_id
            self._on_the_way[message_id] = _OnTheWay(message, partition_id, make, sending, position + offset)
            due = self._due.setdefault(partition_id, [])
            due.append(message_id)
            if not idle and len(due) == 1:
                self._submit([message_id])
        if idle:
            self._submit([message.metadata.message_id for message in messages])

    def _submit(self, message_ids: list[str]) -> None:
        going = [self._on_the_way[message_id] for message_id in message_ids]
        jobs = [self._job(each.message, each.partition_id) for each in going]
        seconds = [self.durations.seconds(each.partition_id, each.message.metadata.message_type) for each in going]
        self.engine.submit(Task(jobs, going[0].make, sum(each or 0.0 for each in seconds)))

    def _job(self, message: Message, partition_id: int) -> Job:
        return Job(message, partition_id, self.states.path(partition_id), self.states.next_file(partition_id))

    def give_up(self, message_ids: set[str]) -> None:
        """Expect no reply to these any more."""
        message_ids &= self._on_the_way.keys()
        if not message_ids:
            return
        self._check_open()
        self.engine.cancel(message_ids)
        given_up = [self._on_the_way.pop(message_id) for message_id in message_ids]
        self._pushed -= sum(each.sending is None for each in given_up)
        for partition_id in {each.partition_id for each in given_up}:
            self._strike(partition_id, message_ids)

    def _strike(self, partition_id: int, message_ids: set[str]) -> None:
        """Messages off a client's list; the one that is now the first starts."""
        first = self._due[partition_id][0]
        left = [message_id for message_id in self._due.pop(partition_id) if message_id not in message_ids]
        if left:
            self._due[partition_id] = left
            if left[0] != first:
                self._submit([left[0]])

    def wait(self, timeout: float | None) -> None:
        """See Carrier; meanwhile other threads may use the grid."""
        self._turns.wait(lambda: self.receive(timeout))

    def receive(self, timeout: float | None) -> bool:
        """Take what has come to those who wait for it; waits until something has, for `timeout` seconds at most.

        False where nothing has.
        """
        self._check_open()
        try:
            with span("dispatch"):
                outcomes = self.engine.collect(timeout)
            self._take(outcomes)
        except RunFolderError as error:  # answers are lost
            self._failed = error
            raise
        return bool(outcomes)

    def _take(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            tracing.keep(outcome.worker, outcome.slices)
            settled = [each for answer in outcome.answers if (each := self._settle(answer))]
            if outcome.fold is not None and settled:
                first = settled[0]
                assert first.sending is not None
                first.sending.arrived(first.position, len(outcome.answers), outcome.fold)

    def _settle(self, answer: Answer) -> _OnTheWay | None:
        """A client has answered; None if its message was given up in the meantime."""
        known = self._on_the_way.pop(answer.message_id, None)
        if known is None:
            return None
        if answer.state is not None:
            self.states.take(known.partition_id, answer.state)
        if answer.seconds:  # else it was given up
            self.durations.learn(known.partition_id, known.message.metadata.message_type, answer.seconds)
        if answer.reply is not None:
            answer.reply.metadata.__dict__["_message_id"] = f"reply-to-{answer.message_id}"
            if known.sending is None:
                self._pushed -= 1
                self._replies[answer.message_id] = answer.reply
            else:
                known.sending.arrived(known.position, 1, answer.reply)
        self._strike(known.partition_id, {answer.message_id})
        return known


def _copy(metadata: Metadata) -> Metadata:
    """Python's own way to it takes five times as long."""
    copied = object.__new__(Metadata)
    copied.__dict__.update(metadata.__dict__)
    return copied


def _limit(messages: list[Message], timeout: float | None) -> float | None:
    """Seconds to wait for the replies; None: whatever it takes."""
    if timeout is None:
        now = time.time()
        timeout = max((each.metadata.created_at + each.metadata.ttl - now for each in messages), default=0.0)
    return timeout if timeout < FOREVER else None


def _unavailable(message_id: str, reason: str) -> Message:
    """In place of the reply to a message that there is not (any more), or whose reply never came."""
    server = Metadata(
        run_id=1,
        message_id=f"no-reply-to-{message_id}",
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=SUPERLINK_NODE_ID,
        reply_to_message_id=message_id,
        group_id="",
        created_at=time.time(),
        ttl=0.0,
        message_type=SYSTEM_MESSAGE_TYPE,
    )
    return make_message(server, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, reason))
