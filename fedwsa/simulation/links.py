"""The way of the messages to a worker: one small interface, shared memory or Ray's object store behind it."""

import os
from collections import OrderedDict, deque
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

import ray
from flwr.app import ArrayRecord, RecordDict
from flwr.app.message.message import make_message

from fedwsa.arrays import NumpyArray
from fedwsa.simulation.engine import Answer, Job
from fedwsa.simulation.shared_memory import Pool, Sent, ServerEnd

DEATHS = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)  # Ray kills a worker that fills the memory
RECORDS = 4  # array records that are kept as they were sent: a round's model is written once
LARGE = 1 << 15  # bytes; what a socket may not be able to take while the worker is not reading
REASON_TIMEOUT = 5.0  # seconds for Ray to find out why an actor died

T = TypeVar("T")


class WorkerDiedError(RuntimeError):
    """The process behind a link is gone."""


class Link(Protocol):
    """To one worker, which answers jobs in the order in which it got them."""

    def fileno(self) -> int:
        """Readable when there are answers, or the worker is gone."""

    def begin(self, packed: bytes, path: list[str]) -> None:
        """Later jobs are for this population."""

    def send(self, job: Job, *, busy: bool, limit: int) -> bool:
        """Whether the job was sent; one that is too large has to wait until the worker is not busy.

        limit: replies that may lie in lent memory at a time.
        """

    def receive(self) -> list[Answer]:
        """Answers that are there. Raises WorkerDiedError."""

    def close(self) -> None:
        """Free what the link holds."""


class Recent(OrderedDict[tuple[str | int, ...], tuple[list[Any], T]]):
    """What was made of the array records that were sent last."""

    def of(self, record: ArrayRecord, make: Any) -> T:
        """What `make(record)` gave when the same numbers were sent before, or gives now."""
        values = [array.view() if isinstance(array, NumpyArray) else array.data for array in record.values()]
        key = (*record, *map(id, values))  # the entry keeps them alive, so no id is used again
        if key not in self:
            while len(self) >= RECORDS:
                self.popitem(last=False)
            self[key] = (values, make(record))
        return self[key][1]


class SharedMemory:
    """What the links to all workers on this machine share."""

    def __init__(self) -> None:
        self.pool = Pool()
        self.recent: Recent[Sent] = Recent()
        self._number = 0

    def sent(self, record: ArrayRecord) -> Sent:
        """The record, written into memory that workers map; once for all of them."""
        return self.recent.of(record, self._write)

    def _write(self, record: ArrayRecord) -> Sent:
        self._number += 1
        return Sent(self._number, record)


class SharedMemoryLink:
    """On one machine."""

    def __init__(self, connection: Connection, pid: int, shared: SharedMemory, serving: Any) -> None:
        self.end = ServerEnd(connection, pid, shared.pool)
        self.shared = shared
        self.serving = serving  # Ray's reference to the call that ends with the worker

    def fileno(self) -> int:
        """See Link."""
        return self.end.connection.fileno()

    def begin(self, packed: bytes, path: list[str]) -> None:
        """See Link."""
        with suppress(OSError):  # a worker that is gone is seen by receive()
            self.end.send((packed, path), {})

    def send(self, job: Job, *, busy: bool, limit: int) -> bool:
        """See Link."""
        rest, records = _split(job)
        if busy and _is_large(rest):
            return False
        sent = {key: self.shared.sent(record) for key, record in records.items()}
        self.shared.pool.need(max((one.size for one in sent.values()), default=0))
        with suppress(OSError):
            self.end.send(rest, sent, blocks=limit)
        return True

    def receive(self) -> list[Answer]:
        """See Link."""
        try:
            return [self.end.receive()]
        except (EOFError, OSError):
            raise WorkerDiedError(self._reason()) from None

    def close(self) -> None:
        """See Link."""
        self.end.close()

    def _reason(self) -> str:
        try:
            ray.get(self.serving, timeout=REASON_TIMEOUT)
        except Exception as error:
            return str(error)
        return "it closed its connection"


class ObjectStoreLink:
    """To another machine: Ray carries everything."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.recent: Recent[Any] = Recent()
        self.done: deque[Any] = deque()
        self.reader, self.writer = os.pipe()

    def fileno(self) -> int:
        """See Link."""
        return self.reader

    def begin(self, packed: bytes, path: list[str]) -> None:
        """See Link."""
        self.handle.begin.remote(packed, path)

    def send(self, job: Job, *, busy: bool, limit: int) -> bool:
        """See Link."""
        rest, records = _split(job)
        references = [self.recent.of(record, ray.put) for record in records.values()]
        reference = self.handle.handle.remote(rest, list(records), *references)
        reference.future().add_done_callback(lambda _: self._finished(reference))
        return True

    def receive(self) -> list[Answer]:
        """See Link."""
        os.read(self.reader, 1)
        try:
            return [ray.get(self.done.popleft())]
        except DEATHS as error:
            raise WorkerDiedError(str(error)) from None

    def close(self) -> None:
        """See Link."""
        self.recent.clear()

    def _finished(self, reference: Any) -> None:
        """Called by a thread of Ray's."""
        self.done.append(reference)
        os.write(self.writer, b".")


def _split(job: Job) -> tuple[Job, Mapping[str, ArrayRecord]]:
    """The job with empty records in the places of those that travel by themselves, and these."""
    content = job.message.content
    records = {key: record for key, record in content.items() if isinstance(record, ArrayRecord)}
    rest = RecordDict({key: ArrayRecord() if key in records else record for key, record in content.items()})
    return Job(make_message(job.message.metadata, rest), job.partition_id, job.state), records


def _is_large(job: Job) -> bool:
    """Whether what travels through the socket could fill it: client state, texts, bytes."""
    size = 0
    for record in (*job.state.values(), *job.message.content.values()):
        for value in record.values():
            size += len(value) * 9 if isinstance(value, list | str | bytes) else 9
            if not isinstance(value, list | str | bytes | int | float):
                size += LARGE
    return size > LARGE
