"""What an engine is: something that answers messages with a Flower ClientApp. Two exist, `inprocess` and `ray`."""

import time
import traceback
from collections import deque
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedwsa.simulation import states
from fedwsa.simulation.folding import Fold, MakeFold, Tree
from fedwsa.simulation.states import Kept
from fedwsa.tracing import Slice, span

CLIENT_APP_RAISED, CLIENT_APP_CRASHED = 2, 8  # Flower's error codes

RunConfig = Mapping[str, bool | int | float | str]
Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)


@dataclass(frozen=True, slots=True)
class Population:
    """Whom an engine simulates: the app that every client runs, and what it is told of the run."""

    app: ClientApp
    num_clients: int
    run_config: RunConfig


@dataclass(slots=True)
class Job:
    """One message for one client.

    state: what it kept from the rounds before (None: nothing). file: for what it keeps now; empty: none.
    """

    message: Message
    partition_id: int
    state: Kept | None = None
    file: str = ""


@dataclass(slots=True)
class Task:
    """Jobs of different clients that one worker does one after another and gives back together.

    make: makes the parts of a fold; then the replies stay with the worker and their fold comes back.
    seconds: that it will take, as far as anybody knows.
    """

    jobs: list[Job]
    make: MakeFold | None = None
    seconds: float = 0.0

    @property
    def message_ids(self) -> list[str]:
        """Of the jobs, in order."""
        return [job.message.metadata.message_id for job in self.jobs]


@dataclass(slots=True)
class Answer:
    """A client's reply (or an error in its place; None if it was folded), and its state if that is another now."""

    message_id: str
    reply: Message | None
    state: Kept | None = None
    seconds: float = 0.0  # that the client app took


@dataclass(slots=True)
class Outcome:
    """The answers of a task or of a part of it, and their fold where the task asked for one.

    fault: why there are none, which the run cannot go on from; empty if all is well.
    """

    answers: list[Answer]
    fold: Fold | None = None
    worker: str = ""  # which did it, and what it did since it last said so; empty unless that is asked for
    slices: list[Slice] = field(default_factory=list)
    fault: str = ""


class Engine(Protocol):
    """Runs tasks; the order in which outcomes come is its own affair."""

    @property
    def workers(self) -> int:
        """How many clients compute at the same time."""

    @property
    def workers_elsewhere(self) -> bool:
        """Whether clients compute while nobody waits in `collect`."""

    def begin(self, population: Population) -> None:
        """Tasks from now on are for these clients."""

    def submit(self, task: Task) -> None:
        """Take a task; returns at once."""

    def collect(self, timeout: float | None) -> list[Outcome]:
        """Outcomes that are new; waits until there is one, for `timeout` seconds at most (None: without limit)."""

    def wake(self) -> None:
        """Make a `collect` that waits return; to be called by another thread than that which waits."""

    def cancel(self, message_ids: set[str]) -> None:
        """Give these jobs up, also where they are running; their answers never come."""

    def close(self) -> None:
        """Free what the engine holds."""


def identify() -> None:
    """Flower makes no message outside a run; this process takes part in ours."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


def answer(population: Population, job: Job) -> Answer:
    """Let the client app answer; what it raises becomes an error reply with the traceback.

    Raises RunFolderError where what it keeps cannot be read.
    """
    metadata = job.message.metadata
    message = make_message(metadata, own_content(job.message.content))
    before, state = states.load(job.state)
    start, threads = time.perf_counter(), torch.get_num_threads()
    try:
        context = Context(
            run_id=metadata.run_id,
            node_id=metadata.dst_node_id,
            node_config={"partition-id": job.partition_id, "num-partitions": population.num_clients},
            state=state,
            run_config=dict(population.run_config),
        )
        with span(metadata.message_type.partition(".")[0]):
            reply = population.app(message, context)
        if not isinstance(reply, Message):
            raise TypeError(f"the client app returned {type(reply).__name__}, not a Message")
        if reply.has_content():  # nothing of it is the app's or another reply's too
            reply.content = own_content(reply.content)
        after = states.pack(context.state)
        kept = None if after == before else states.write(job.file, after)
    except (Exception, SystemExit):  # the clients of `inprocess` must not end the server
        reply = Message(Error(CLIENT_APP_RAISED, traceback.format_exc()), reply_to=message)
        kept = None  # half of what it kept is nothing that it could go on from
    finally:
        if torch.get_num_threads() != threads:  # the next client of this worker must not depend on who was before it
            torch.set_num_threads(threads)
    return Answer(metadata.message_id, reply, kept, time.perf_counter() - start)


def perform(population: Population, task: Task) -> Outcome:
    """Do a task's jobs one after another."""
    if task.make is None:
        return Outcome([answer(population, job) for job in task.jobs])
    answers, tree = [], Tree()
    for job in task.jobs:
        given = answer(population, job)
        assert given.reply is not None
        with span("aggregate"):
            part = task.make()
            part.add(given.reply)
            tree.push(1, part)
        given.reply = None
        answers.append(given)
    return Outcome(answers, tree.total())


class InProcessEngine:
    """The clients one after another in this process: no start-up, and a debugger works."""

    workers, workers_elsewhere = 1, False

    def __init__(self, threads_per_client: int = 1) -> None:
        self.threads = threads_per_client
        self.tasks: deque[Task] = deque()
        self.population: Population | None = None

    def begin(self, population: Population) -> None:
        """See Engine."""
        self.tasks.clear()
        self.population = population

    def submit(self, task: Task) -> None:
        """See Engine."""
        self.tasks.append(task)

    def collect(self, timeout: float | None) -> list[Outcome]:
        """One task is done whatever the timeout: nothing here could stop it."""
        if not self.tasks:
            return []
        task = self.tasks[0]
        outcome = self.perform(task)
        if self.tasks and self.tasks[0] is task:  # not before, so that Ctrl-C loses none; now another may have begun
            self.tasks.popleft()
        return [outcome]

    def perform(self, task: Task) -> Outcome:
        """Do a task now."""
        assert self.population is not None, "begin() comes first"
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return perform(self.population, task)
        finally:
            torch.set_num_threads(before)

    def wake(self) -> None:
        """See Engine; nothing waits here."""

    def cancel(self, message_ids: set[str]) -> None:
        """See Engine."""
        self.tasks = deque(left for task in self.tasks if (left := without(task, message_ids)).jobs)

    def close(self) -> None:
        """Nothing is held."""


def without(task: Task, message_ids: set[str]) -> Task:
    """What is left of a task when these are given up."""
    jobs = [job for job in task.jobs if job.message.metadata.message_id not in message_ids]
    return Task(jobs, task.make, task.seconds)


def snapshot(record: Record) -> Record:
    """A copy: what either side changes in its own does not reach the other. Numbers and bytes are shared."""
    copied = record.copy()
    values = copied.__dict__["_data"]  # Flower checks every element of a list that is set by the front door
    for key, value in values.items():
        if not isinstance(value, int | float | str | bytes):
            values[key] = copy(value)
    return copied


def own_content(content: RecordDict) -> RecordDict:
    """Records of its own for one side of a message, as it would have behind a network."""
    copied = content.copy()
    values = copied.__dict__["_data"]
    for key, record in values.items():
        values[key] = snapshot(record)
    return copied
