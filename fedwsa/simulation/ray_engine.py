"""The clients on persistent Ray actors, one a worker."""

import logging
import os
import random
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 costs a fifth of the speed
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning on machines without a GPU

import ray
import torch
from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.app.message.message import make_message
from ray import cloudpickle

from fedwsa.arrays import NumpyArray
from fedwsa.simulation.engine import (
    CLIENT_APP_CRASHED,
    Answer,
    InProcessEngine,
    Job,
    Population,
    answer,
    identify,
)

LOAD_CLIENT_APP = 1  # Flower's error code
DEPTH = 2  # jobs at an actor: one computes, the next one is already there
START_TIMEOUT = 120.0  # seconds for Ray and the actors to come up
ATTEMPTS = 3  # at a job whose actor died
DEATHS = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)  # Ray kills a worker that fills the memory
RECORDS = 4  # array records whose copy in the object store is kept: a round's model is put there once


class _Worker:
    """One actor: holds the client app and answers jobs, one at a time."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        identify()
        self.packed = b""
        self.population: Population | None = None

    def begin(self, packed: bytes, path: list[str]) -> None:
        sys.path.extend(entry for entry in path if entry not in sys.path)
        self.packed, self.population = packed, None

    def handle(self, job: Job, keys: list[str], *records: ArrayRecord) -> Answer:
        torch.set_num_threads(self.threads)
        for key, record in zip(keys, records, strict=True):
            job.message.content[key] = record
        try:
            if self.population is None:
                self.population = cloudpickle.loads(self.packed)
        except Exception:
            reply = Message(Error(LOAD_CLIENT_APP, traceback.format_exc()), reply_to=job.message)
            return Answer(job.message.metadata.message_id, reply, job.state)
        return answer(self.population, job)


@dataclass(slots=True)
class _Sent:
    """A job at an actor."""

    job: Job
    attempt: int


@dataclass(slots=True)
class _Actor:
    handle: Any
    jobs: dict[Any, _Sent] = field(default_factory=dict)  # by Ray's reference to the answer


class RayEngine:
    """Persistent actors on this machine; an actor that dies is replaced and its messages are sent again.

    start_here: until Ray is up, seconds, the clients run in this process (results are the same bits wherever a client
    runs); for client apps that may run beside the server, and a server that draws nothing from the global `random`
    (Flower's own strategies do), because Ray's start draws from it too.
    """

    def __init__(self, workers: int = 0, threads_per_client: int = 1, *, start_here: bool = False) -> None:
        self._workers = workers or len(os.sched_getaffinity(0))
        self._threads = threads_per_client
        self._owns_ray = not ray.is_initialized()
        self._packed = b""
        self._queue: deque[tuple[Job, int]] = deque()  # with the number of the attempt
        self._records: dict[tuple[str | int, ...], tuple[list[Any], Any]] = {}
        self._actors: list[_Actor] = []
        self._closed = False
        self._here = InProcessEngine(threads_per_client) if start_here else None
        self._ended = threading.Event()
        self._starting: Future[list[_Actor]] = Future()
        bring_up = threading.Thread(target=self._bring_up, daemon=True)
        if start_here:
            bring_up.start()
        else:
            with _random_kept():
                bring_up.start()
                self._adopt()

    @property
    def workers(self) -> int:
        """See Engine."""
        return self._workers

    def begin(self, population: Population) -> None:
        """See Engine."""
        self._queue.clear()
        self.cancel({sent.job.message.metadata.message_id for actor in self._actors for sent in actor.jobs.values()})
        if self._here:
            self._here.begin(population)
        try:
            self._packed = cloudpickle.dumps(population)  # type: ignore[no-untyped-call]
        except Exception as error:
            raise ValueError(f"the client app cannot be sent to the workers: {error}") from error
        for actor in self._actors:
            actor.handle.begin.remote(self._packed, _path())

    def submit(self, job: Job) -> None:
        """See Engine."""
        self._queue.append((job, 1))
        self._dispatch()

    def collect(self, timeout: float | None) -> list[Answer]:
        """See Engine."""
        if self._here and self._queue and not self._starting.done():
            self._here.submit(self._queue.popleft()[0])
            return self._here.collect(timeout)
        self._adopt()
        waiting = {reference: actor for actor in self._actors for reference in actor.jobs}
        if not waiting:
            return []
        ray.wait(list(waiting), timeout=timeout)
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        answers: list[Answer] = []
        for reference in ready:
            actor = waiting[reference]
            if reference not in actor.jobs:  # the actor was replaced above
                continue
            try:
                answers.append(ray.get(reference))
                del actor.jobs[reference]
            except DEATHS as error:
                answers += self._crashed(actor, error)
        self._dispatch()
        return answers

    def cancel(self, message_ids: set[str]) -> None:
        """See Engine; an actor that computes one of these is replaced."""
        self._queue = deque(entry for entry in self._queue if entry[0].message.metadata.message_id not in message_ids)
        for actor in self._actors:
            if any(sent.job.message.metadata.message_id in message_ids for sent in actor.jobs.values()):
                others = [s for s in actor.jobs.values() if s.job.message.metadata.message_id not in message_ids]
                ray.kill(actor.handle)
                self._replace(actor, [(sent.job, sent.attempt) for sent in others])
        self._dispatch()

    def close(self) -> None:
        """End the actors, and Ray where this engine started it."""
        try:
            self._adopt()
            for actor in self._actors:
                ray.kill(actor.handle)
        finally:
            self._actors, self._records, self._closed = [], {}, True
            if self._owns_ray:
                with _random_kept():
                    ray.shutdown()
            self._ended.set()

    def _bring_up(self) -> None:
        """In a thread of its own, since Ray and the actors take seconds.

        The thread lives as long as the engine: Ray's processes are killed when the thread that started them ends.
        """
        try:
            if self._owns_ray:
                ray.init(
                    num_cpus=self._workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
                )
            actors = [self._start() for _ in range(self._workers)]
            ray.get([actor.handle.begin.remote(b"", []) for actor in actors], timeout=START_TIMEOUT)
            self._starting.set_result(actors)
        except BaseException as error:
            if self._owns_ray:
                ray.shutdown()
            self._starting.set_exception(error)
            return
        self._ended.wait()

    def _adopt(self) -> None:
        """Take the actors over once they are up; RuntimeError if they do not come up."""
        if self._actors or self._closed:
            return
        try:
            self._actors = self._starting.result()
        except Exception as error:
            raise RuntimeError(f"Ray did not start: {error}") from error
        for actor in self._actors:
            actor.handle.begin.remote(self._packed, _path())
        self._dispatch()

    def _start(self) -> _Actor:
        remote = ray.remote(num_cpus=1, max_restarts=0)(_Worker)
        actor = _Actor(remote.remote(self._threads))
        if self._packed:
            actor.handle.begin.remote(self._packed, _path())
        return actor

    def _crashed(self, actor: _Actor, error: Exception) -> list[Answer]:
        """The first job at the dead actor was the one that computed: only its attempts are limited."""
        sent, *others = actor.jobs.values()
        again = [(other.job, other.attempt) for other in others]
        gave_up: list[Answer] = []
        if sent.attempt < ATTEMPTS:
            again.insert(0, (sent.job, sent.attempt + 1))
        else:
            reason = f"the worker died {ATTEMPTS} times over this message: {error}"
            reply = Message(Error(CLIENT_APP_CRASHED, reason), reply_to=sent.job.message)
            gave_up = [Answer(sent.job.message.metadata.message_id, reply, sent.job.state)]
        self._replace(actor, again)
        return gave_up

    def _replace(self, actor: _Actor, jobs: list[tuple[Job, int]]) -> None:
        actor.jobs.clear()
        self._actors[self._actors.index(actor)] = self._start()
        self._queue.extendleft(reversed(jobs))

    def _dispatch(self) -> None:
        """Jobs to the actors that have the fewest, each up to DEPTH."""
        while self._queue and self._actors:
            actor = min(self._actors, key=lambda candidate: len(candidate.jobs))
            if len(actor.jobs) >= DEPTH:
                return
            job, attempt = self._queue.popleft()
            records = {key: record for key, record in job.message.content.items() if isinstance(record, ArrayRecord)}
            reference = actor.handle.handle.remote(
                _without(job, records), list(records), *[self._put(record) for record in records.values()]
            )
            actor.jobs[reference] = _Sent(job, attempt)

    def _put(self, record: ArrayRecord) -> Any:
        """The record in the object store; one that was put there lately is not put again."""
        values = [array.view() if isinstance(array, NumpyArray) else array.data for array in record.values()]
        key = (*record, *map(id, values))  # the entry keeps them alive, so no id is used again
        if key not in self._records:
            while len(self._records) >= RECORDS:
                del self._records[next(iter(self._records))]
            self._records[key] = (values, ray.put(record))
        return self._records[key][1]


@contextmanager
def _random_kept() -> Iterator[None]:
    """Ray draws from the global `random`, from which a ServerApp's strategy may draw its cohorts."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _path() -> list[str]:
    """Where this process finds modules, for the workers; the current folder by its name."""
    return [os.path.abspath(entry) for entry in sys.path]


def _without(job: Job, records: Mapping[str, ArrayRecord]) -> Job:
    """Empty records hold the places of those that travel by themselves."""
    rest = RecordDict({key: ArrayRecord() if key in records else value for key, value in job.message.content.items()})
    return Job(make_message(job.message.metadata, rest), job.partition_id, job.state)
