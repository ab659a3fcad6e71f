"""What an engine is: something that answers messages with a Flower ClientApp. Two exist, `inprocess` and `ray`."""

import time
import traceback
from collections import deque
from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Protocol

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

CLIENT_APP_RAISED, CLIENT_APP_CRASHED = 2, 8  # Flower's error codes

RunConfig = Mapping[str, bool | int | float | str]
Record = ArrayRecord | ConfigRecord | MetricRecord


@dataclass(frozen=True, slots=True)
class Population:
    """Whom an engine simulates: the app that every client runs, and what it is told of the run."""

    app: ClientApp
    num_clients: int
    run_config: RunConfig


@dataclass(slots=True)
class Job:
    """One message for one client, and the client's state of the rounds before."""

    message: Message
    partition_id: int
    state: RecordDict


@dataclass(slots=True)
class Answer:
    """A client's reply (or an error in its place), and its state after it."""

    message_id: str
    reply: Message
    state: RecordDict
    seconds: float = 0.0  # that the client app took


class Engine(Protocol):
    """Runs jobs; the order in which answers come is its own affair."""

    @property
    def workers(self) -> int:
        """How many clients compute at the same time."""

    def begin(self, population: Population) -> None:
        """Jobs from now on are for these clients."""

    def submit(self, job: Job) -> None:
        """Take a job; returns at once."""

    def collect(self, timeout: float | None) -> list[Answer]:
        """Answers that are new; waits until there is one, for `timeout` seconds at most (None: without limit)."""

    def cancel(self, message_ids: set[str]) -> None:
        """Give these jobs up, also where they are running; their answers never come."""

    def close(self) -> None:
        """Free what the engine holds."""


def identify() -> None:
    """Flower makes no message outside a run; this process takes part in ours."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


def answer(population: Population, job: Job) -> Answer:
    """Let the client app answer; what it raises becomes an error reply with the traceback."""
    node_id = job.message.metadata.dst_node_id
    context = Context(
        run_id=job.message.metadata.run_id,
        node_id=node_id,
        node_config={"partition-id": job.partition_id, "num-partitions": population.num_clients},
        state=job.state,
        run_config=dict(population.run_config),
    )
    start = time.perf_counter()
    try:
        reply = population.app(job.message, context)
        if not isinstance(reply, Message):
            raise TypeError(f"the client app returned {type(reply).__name__}, not a Message")
    except (Exception, SystemExit):  # the clients of `inprocess` must not end the server
        reply = Message(Error(CLIENT_APP_RAISED, traceback.format_exc()), reply_to=job.message)
    return Answer(job.message.metadata.message_id, reply, context.state, time.perf_counter() - start)


class InProcessEngine:
    """The clients one after another in this process: no start-up, and a debugger works."""

    workers = 1

    def __init__(self, threads_per_client: int = 1) -> None:
        self.threads = threads_per_client
        self.jobs: deque[Job] = deque()
        self.population: Population | None = None

    def begin(self, population: Population) -> None:
        """See Engine."""
        self.jobs.clear()
        self.population = population

    def submit(self, job: Job) -> None:
        """See Engine."""
        self.jobs.append(job)

    def collect(self, timeout: float | None) -> list[Answer]:
        """One job is run whatever the timeout: nothing here could stop it."""
        if not self.jobs:
            return []
        assert self.population is not None, "begin() comes first"
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            job = self.jobs.popleft()
            own = make_message(job.message.metadata, _own(job.message.content))
            given = answer(self.population, Job(own, job.partition_id, job.state))
            if given.reply.has_content():
                given.reply.content = _own(given.reply.content)
            return [given]
        finally:
            torch.set_num_threads(before)

    def cancel(self, message_ids: set[str]) -> None:
        """See Engine."""
        self.jobs = deque(job for job in self.jobs if job.message.metadata.message_id not in message_ids)

    def close(self) -> None:
        """Nothing is held."""


def snapshot(record: Record) -> Record:
    """A copy: what either side changes in its own does not reach the other. Numbers and bytes are shared."""
    if not isinstance(record, ArrayRecord):
        return deepcopy(record)
    arrays = record.copy()
    for name, array in record.items():
        arrays[name] = copy(array)
    return arrays


def _own(content: RecordDict) -> RecordDict:
    """Records of its own for a side of a message that stays in this process, as it would have behind a network."""
    return RecordDict({key: snapshot(record) for key, record in content.items()})
