"""The clients on persistent Ray actors, one a worker."""

import logging
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

import ray
from flwr.app import Error, Message

from fedwsa import tracing
from fedwsa.errors import RunError
from fedwsa.run_folder import RunFolderError
from fedwsa.simulation import pickling
from fedwsa.simulation.cluster import Resources, bring_up, count_workers, random_kept, shut_down
from fedwsa.simulation.engine import CLIENT_APP_CRASHED, Answer, InProcessEngine, Outcome, Population, Task, without
from fedwsa.simulation.links import Link, ObjectStoreLink, SharedMemory, SharedMemoryLink, WorkerDiedError, pipe_of
from fedwsa.simulation.shared_memory import listen
from fedwsa.simulation.worker import Worker
from fedwsa.tracing import span

_LOG = logging.getLogger("fedwsa")

DEPTH = 2  # tasks at an actor: one is done, the next one is already there
MOMENT = 0.1  # seconds
START_TIMEOUT = 120.0  # seconds for Ray and for each actor to come up
LONGEST_WAIT = 3600.0  # seconds in one go; poll() takes no more than 24 days
END_TIMEOUT = 10.0  # seconds for what the actors were doing to come or fail once they are ended
ATTEMPTS = 3  # at a task whose actor died


@dataclass(slots=True, eq=False)
class _Sent:
    """A task for an actor."""

    task: Task
    attempt: int


@dataclass(slots=True, eq=False)
class _Actor:
    handle: Any
    core: int | None = None
    link: Link | None = None  # None while it starts
    tasks: deque[_Sent] = field(default_factory=deque)  # in the order in which they were sent
    connecting: threading.Thread | None = None

    def seconds(self) -> float:
        """Of work that it has."""
        return sum(sent.task.seconds for sent in self.tasks)

    def takes_more(self) -> bool:
        """Whether it has nothing to do, or soon: a task behind a long one would be done sooner by another."""
        return not self.tasks or (len(self.tasks) < DEPTH and 0 < self.seconds() <= MOMENT)


class RayEngine:
    """Persistent actors; one that dies is replaced and its messages are sent again.

    workers: 0 is as many as fit on all of Ray's machines. start_here: until the first actor is up, seconds, the clients
    run in this process (the results are the same bits wherever a client runs); for client apps that may run beside the
    server, and a server that draws nothing from the global `random` (Flower's own strategies do), because Ray's start
    draws from it too. Not where Ray is joined, which takes no time.
    """

    def __init__(
        self,
        workers: int = 0,
        threads_per_client: int = 1,
        *,
        start_here: bool = False,
        resources: Resources | None = None,
    ) -> None:
        self._resources = resources or Resources()
        self._workers = workers
        self._threads = threads_per_client
        self._owns_ray = not ray.is_initialized()
        self._packed = b""
        self._queue: deque[_Sent] = deque()
        self._actors: list[_Actor] = []
        self._shared_memory = SharedMemory()
        self._coming: set[Future[Outcome]] = set()  # from workers on other machines
        self._started: queue.SimpleQueue[tuple[_Actor, Link | Exception] | Exception] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = pipe_of(self)
        here = workers or self._resources.slots(len(os.sched_getaffinity(0)), 0)  # workers; 0: Ray will refuse
        start_here = start_here and here > 0 and not (self._resources.address or self._resources.gpus_per_client)
        self._here = InProcessEngine(threads_per_client) if start_here else None
        self._closing = False
        self._ray_is_up, self._ended = threading.Event(), threading.Event()
        thread = threading.Thread(target=self._bring_up, daemon=True)
        if start_here:
            self._workers = here
            thread.start()
            return
        with random_kept():
            thread.start()
            try:
                self._wait_for_all()
            except BaseException:
                self.close()
                raise

    @property
    def workers(self) -> int:
        """See Engine."""
        return self._workers

    @property
    def workers_elsewhere(self) -> bool:
        """See Engine."""
        return True

    def begin(self, population: Population) -> None:
        """See Engine."""
        self._queue.clear()
        self.cancel({id_ for actor in self._actors for sent in actor.tasks for id_ in sent.task.message_ids})
        if self._here:
            self._here.begin(population)
        pickling.dumps(population.app, "the client app")  # so that an error names its part
        self._packed = pickling.dumps(population, "the run config")
        for actor in self._actors:
            if actor.link:
                actor.link.begin(self._packed, _path(), tracing.is_on())

    def submit(self, task: Task) -> None:
        """See Engine."""
        self._queue.append(_Sent(task, 1))
        self._dispatch()

    def collect(self, timeout: float | None) -> list[Outcome]:
        """See Engine."""
        self._adopt()
        if self._here and self._queue:
            sent = self._queue[0]
            outcome = self._here.perform(sent.task)
            if self._queue and self._queue[0] is sent:  # see InProcessEngine
                self._queue.popleft()
            return [outcome]
        if not self._queue and not any(actor.tasks for actor in self._actors):
            return []
        links: dict[Any, _Actor] = {actor.link: actor for actor in self._actors if actor.link}
        outcomes: list[Outcome] = []
        with span("wait"):
            all_ready = connection.wait(
                [self._wake_reader, *links], LONGEST_WAIT if timeout is None else min(timeout, LONGEST_WAIT)
            )
        for ready in all_ready:
            if ready == self._wake_reader:
                os.read(self._wake_reader, 1024)
                self._adopt()
            elif links[ready] in self._actors:  # else it was replaced a moment ago
                outcomes += self._receive(links[ready])
        self._dispatch()
        return outcomes

    def wake(self) -> None:
        """See Engine."""
        os.write(self._wake_writer, b".")

    def cancel(self, message_ids: set[str]) -> None:
        """See Engine; an actor that has one of these is replaced."""
        self._queue = deque(_without(self._queue, message_ids))
        for actor in list(self._actors):
            if any(not message_ids.isdisjoint(sent.task.message_ids) for sent in actor.tasks):
                self._replace(actor, _without(actor.tasks, message_ids))
        self._dispatch()

    def close(self) -> None:
        """End the actors, and Ray where this engine started it."""
        self._ray_is_up.wait(START_TIMEOUT)
        self._closing = True
        for actor in self._actors:
            self._end(actor)
        self._actors.clear()
        while not self._started.empty():  # those that nobody has taken over
            news = self._started.get()
            if isinstance(news, tuple) and not isinstance(news[1], Exception):
                news[1].close()
        wait(self._coming.copy(), END_TIMEOUT)  # one that comes while Ray shuts down ends this process
        self._shared_memory = SharedMemory()
        if self._owns_ray:
            shut_down()
        self._ended.set()

    def _bring_up(self) -> None:
        """In a thread of its own, since Ray takes seconds.

        The thread lives as long as the engine: Ray's processes are killed when the thread that started them ends.
        """
        try:
            bring_up(self._resources, self._workers)
            fit = count_workers(self._resources)
            if self._workers > fit:
                _LOG.warning("workers = %d: only %d fit on Ray's machines", self._workers, fit)
            self._workers = min(self._workers or fit, fit)
            for _ in range(self._workers):
                self._actors.append(self._start())
        except Exception as error:
            self._tell(error)
        self._ray_is_up.set()
        os.write(self._wake_writer, b".")
        self._ended.wait()

    def _wait_for_all(self) -> None:
        while True:
            up = self._ray_is_up.is_set()
            self._adopt()
            if up and all(actor.link for actor in self._actors):
                return
            connection.wait([self._wake_reader])  # each start has a limit of its own
            os.read(self._wake_reader, 1024)

    def _start(self) -> _Actor:
        """An actor whose link will be told by a thread when it is there."""
        actor_class = ray.remote(
            num_cpus=self._resources.cpus_per_client, num_gpus=self._resources.gpus_per_client, max_restarts=0
        )(Worker)
        core = self._free_core()
        actor = _Actor(actor_class.remote(self._threads, core), core)
        actor.connecting = threading.Thread(target=self._connect, args=(actor,), daemon=True)
        actor.connecting.start()
        return actor

    def _free_core(self) -> int | None:
        """For a worker to stay on, where there is one for each that nobody else was promised; else None."""
        cores = sorted(os.sched_getaffinity(0))
        if not self._owns_ray or self._resources.address or self._threads != 1 or self._workers != len(cores):
            return None
        taken = {actor.core for actor in self._actors}
        return next((core for core in cores if core not in taken), None)

    def _connect(self, actor: _Actor) -> None:
        name = f"fedwsa-{actor.handle._actor_id.hex()}"
        try:
            accept = listen(name)
            here = ray.get_runtime_context().get_node_id()
            pid = ray.get(actor.handle.connect.remote(name, here), timeout=START_TIMEOUT)
            if pid is None:
                self._tell((actor, ObjectStoreLink(actor.handle, self._coming)))
            else:
                end = accept(START_TIMEOUT)
                self._tell((actor, SharedMemoryLink(end, pid, self._shared_memory, actor.handle.serve.remote())))
        except Exception as error:
            if not self._closing:
                self._tell((actor, error))

    def _tell(self, news: tuple[_Actor, Link | Exception] | Exception) -> None:
        self._started.put(news)
        os.write(self._wake_writer, b".")

    def _adopt(self) -> None:
        """Take over the actors that have come up. Raises RunError if none does.

        One that does not (the machine that it was to replace an actor of is gone) is done without.
        """
        while not self._started.empty():
            news = self._started.get()
            if isinstance(news, RunError):
                raise news
            if isinstance(news, Exception):
                raise RunError(f"Ray did not start: {news}") from news
            actor, link = news
            if actor not in self._actors:  # given up in the meantime
                continue
            if isinstance(link, Exception):
                self._actors.remove(actor)
                if not self._actors:
                    raise RunError(f"Ray did not start: {link}") from link
                _LOG.warning("a worker did not start (%s); %d are left", link, len(self._actors))
                continue
            actor.link = link
            self._here = None  # for good: a client whose worker dies must not come into this process
            if self._packed:
                link.begin(self._packed, _path(), tracing.is_on())
        self._dispatch()

    def _receive(self, actor: _Actor) -> list[Outcome]:
        assert actor.link is not None
        try:
            with span("transfer"):
                outcomes = actor.link.receive()
        except WorkerDiedError as error:
            return self._crashed(actor, error)
        for outcome in outcomes:
            if outcome.fault:
                raise RunFolderError(outcome.fault)
            first = outcome.answers[0].message_id
            actor.tasks = deque(sent for sent in actor.tasks if sent.task.message_ids[0] != first)
        return outcomes

    def _crashed(self, actor: _Actor, error: Exception) -> list[Outcome]:
        """The first task at the dead actor was the one that was done: only its attempts are limited.

        Its jobs are sent again one by one: which of them ended the worker is not known.
        """
        gave_up: list[Outcome] = []
        others = list(actor.tasks)
        first = others.pop(0) if others else None
        if first and first.attempt < ATTEMPTS:
            others[:0] = [_Sent(task, first.attempt + 1) for task in singles(first.task)]
        elif first:
            reason = f"the worker died {ATTEMPTS} times over this message: {error}"
            gave_up = [_refused(task, reason) for task in singles(first.task)]
        self._replace(actor, others)
        return gave_up

    def _replace(self, actor: _Actor, tasks: list[_Sent]) -> None:
        self._end(actor)
        actor.core, position = None, self._actors.index(actor)
        self._actors[position] = self._start()
        self._queue.extendleft(reversed(tasks))

    def _end(self, actor: _Actor) -> None:
        ray.kill(actor.handle)
        if actor.connecting:
            actor.connecting.join()  # it ends now; a thread that asks Ray while that shuts down ends the process
        if actor.link:
            actor.link.close()

    def _dispatch(self) -> None:
        """Tasks to the actors that have the least to do; to a busy one only where it is for a moment.

        The last tasks wait for whoever is idle first.
        """
        while self._queue:
            last = len(self._queue) < len(self._actors)
            free = [each for each in self._actors if each.link and (each.takes_more() if not last else not each.tasks)]
            if not free:
                return
            actor = min(free, key=lambda candidate: (candidate.seconds(), len(candidate.tasks)))
            assert actor.link is not None
            sent, busy = self._queue[0], bool(actor.tasks)
            actor.tasks.append(sent)  # before it is sent: where Ctrl-C comes between, the answer is not a stranger's
            taken = False
            try:
                taken = actor.link.send(sent.task, busy=busy)
            finally:
                if not taken:
                    actor.tasks.pop()
            if not taken:
                return
            self._queue.popleft()


def _without(waiting: Iterable[_Sent], message_ids: set[str]) -> list[_Sent]:
    left = (_Sent(without(sent.task, message_ids), sent.attempt) for sent in waiting)
    return [sent for sent in left if sent.task.jobs]


def singles(task: Task) -> list[Task]:
    """A task for each of its jobs."""
    return [Task([job], task.make, task.seconds / len(task.jobs)) for job in task.jobs]


def _refused(task: Task, reason: str) -> Outcome:
    """An error reply in place of the one job's."""
    (job,) = task.jobs
    reply = Message(Error(CLIENT_APP_CRASHED, reason), reply_to=job.message)
    given = Answer(job.message.metadata.message_id, reply)
    if task.make is None:
        return Outcome([given])
    part = task.make()
    part.add(reply)
    given.reply = None
    return Outcome([given], part)


def _path() -> list[str]:
    """Where this process finds modules, for the workers; the current folder by its name."""
    return [os.path.abspath(entry) for entry in sys.path]
