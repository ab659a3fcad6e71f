"""The way of the messages to a worker: one small interface, shared memory or Ray's object store behind it."""

import os
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

import ray
from flwr.app import ArrayRecord, RecordDict

from fedwsa.arrays import NumpyArray
from fedwsa.simulation import pickling, states
from fedwsa.simulation.engine import Job, Outcome, Task
from fedwsa.simulation.folding import MakeFold
from fedwsa.simulation.lending import Expected, Pool
from fedwsa.simulation.shared_memory import Sent, ServerEnd
from fedwsa.simulation.worker import Packed, Place

BLOCKS = 3  # for each worker at least: of the task that it does, of the next one, and of one that waits its turn
RECORDS = 4  # array records that are kept as they were sent: a round's model is written once
LARGE = 1 << 15  # bytes; what a socket may not be able to take while the worker is not reading
REASON_TIMEOUT = 5.0  # seconds for Ray to find out why an actor died

T = TypeVar("T")


class WorkerDiedError(RuntimeError):
    """The process behind a link is gone."""


class Link(Protocol):
    """To one worker, which does tasks in the order in which it got them."""

    def fileno(self) -> int:
        """Readable when there are outcomes, or the worker is gone."""

    def begin(self, packed: bytes, path: list[str], trace: bool) -> None:
        """Later tasks are for this population; trace: whether to say what time they took for what."""

    def send(self, task: Task, *, busy: bool) -> bool:
        """Whether the task was sent; one that is too large has to wait until the worker is not busy."""

    def receive(self) -> list[Outcome]:
        """Outcomes that are there; a small one may have overtaken a large one. Raises WorkerDiedError."""

    def close(self) -> None:
        """Free what the link holds."""


class Recent(OrderedDict[tuple[str | int, ...], tuple[list[Any], T]]):
    """What was made of the array records that were sent last; these are nobody's to change."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[ArrayRecord | None, Any] = None, None

    def of(self, record: ArrayRecord, make: Callable[[ArrayRecord], T]) -> T:
        """What `make(record)` gave when the same numbers were sent before, or gives now."""
        if record is not self._last[0]:
            self._last = record, self._of(record, make)
        made: T = self._last[1]
        return made

    def _of(self, record: ArrayRecord, make: Callable[[ArrayRecord], T]) -> T:
        values = [array.view() if isinstance(array, NumpyArray) else array.data for array in record.values()]
        key = (*record, *map(id, values))  # the entry keeps them alive, so no id is used again
        if key not in self:
            while len(self) >= RECORDS:
                self.popitem(last=False)
            self[key] = (values, make(record))
        return self[key][1]


class _Packer:
    """Tasks without their array records, which travel by themselves."""

    def __init__(self) -> None:
        self._make: MakeFold | None = None
        self._pickled: bytes | None = None

    def pack(self, task: Task) -> tuple[Packed, dict[Place, ArrayRecord]]:
        """Messages of one broadcast share their content, which goes once."""
        if task.make is not self._make:  # one a phase: pickled once
            self._make = task.make
            self._pickled = None if task.make is None else pickling.dumps(task.make, "the aggregation")
        numbers: dict[int, int] = {}
        contents: list[RecordDict] = []
        records: dict[Place, ArrayRecord] = {}
        jobs = []
        for job in task.jobs:
            content = job.message.content
            number = numbers.setdefault(id(content), len(contents))
            if number == len(contents):
                rest = content.copy()
                for key, record in content.items():
                    if isinstance(record, ArrayRecord):
                        records[number, key] = record
                        rest[key] = ArrayRecord()  # keeps its place
                contents.append(rest)
            jobs.append((job.message.metadata, number, job.partition_id, job.state, job.file))
        return Packed(self._pickled, contents, jobs), records


class SharedMemory:
    """What the links to all workers on this machine share."""

    def __init__(self) -> None:
        self.pool = Pool()
        self.packer = _Packer()
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
        shared.pool.least += BLOCKS
        self.shared = shared
        self.serving = serving  # Ray's reference to the call that ends with the worker

    def fileno(self) -> int:
        """See Link."""
        return self.end.connection.fileno()

    def begin(self, packed: bytes, path: list[str], trace: bool) -> None:
        """See Link."""
        with suppress(OSError):  # a worker that is gone is seen by receive()
            self.end.send((packed, path, trace), {})

    def send(self, task: Task, *, busy: bool) -> bool:
        """See Link."""
        packed, records = self.shared.packer.pack(task)
        sent = {place: self.shared.sent(record) for place, record in records.items()}
        largest = max((one.size for one in sent.values()), default=0)
        folds, jobs = task.make is not None, len(task.jobs)
        times = (2 if jobs > 1 else 1) if folds else jobs  # sums are float64; of one reply it is the reply
        with suppress(OSError):
            kind = folds, jobs, task.jobs[0].message.metadata.message_type
            return self.end.send(packed, sent, Expected(kind, largest * times), LARGE if busy else None)
        return True

    def receive(self) -> list[Outcome]:
        """See Link."""
        try:
            outcome: Outcome = self.end.receive()
        except (EOFError, OSError):
            raise WorkerDiedError(self._reason()) from None
        except MemoryError:  # the server's own
            raise
        except Exception as error:  # what a client calls an array, for one
            raise WorkerDiedError(f"its answer cannot be read: {error}") from error
        return [outcome]

    def close(self) -> None:
        """See Link."""
        self.end.close()
        self.shared.pool.least -= BLOCKS

    def _reason(self) -> str:
        try:
            ray.get(self.serving, timeout=REASON_TIMEOUT)
        except Exception as error:
            return str(error)
        return "it closed its connection"


class ObjectStoreLink:
    """To another machine: Ray carries everything.

    coming: what all these links wait for.
    """

    def __init__(self, handle: Any, coming: set[Future[Outcome]]) -> None:
        self.handle = handle
        self.coming = coming
        self.packer = _Packer()
        self.recent: Recent[Any] = Recent()
        self.done: deque[Future[Outcome]] = deque()
        self.reader, self.writer = pipe_of(self)

    def fileno(self) -> int:
        """See Link."""
        return self.reader

    def begin(self, packed: bytes, path: list[str], trace: bool) -> None:
        """See Link."""
        self.handle.begin.remote(packed, path, trace)

    def send(self, task: Task, *, busy: bool) -> bool:
        """See Link."""
        packed, records = self.packer.pack(_without_files(task))
        references = [self.recent.of(record, ray.put) for record in records.values()]
        future = self.handle.handle.remote(packed, list(records), *references).future()
        self.coming.add(future)
        future.add_done_callback(self._finished)
        return True

    def receive(self) -> list[Outcome]:
        """See Link."""
        os.read(self.reader, 1)
        try:
            outcome = self.done.popleft().result()
        except ray.exceptions.RayError as error:  # also what the worker raised, which ends one on this machine too
            raise WorkerDiedError(str(error)) from None
        return [outcome]

    def close(self) -> None:
        """See Link."""
        self.recent.clear()

    def _finished(self, future: Future[Outcome]) -> None:
        """Called by a thread of Ray's."""
        self.coming.discard(future)
        self.done.append(future)
        os.write(self.writer, b".")


def pipe_of(owner: object) -> tuple[int, int]:
    """The ends of a pipe, to read from and to write to, that is closed once its owner is not needed by anybody."""
    ends = os.pipe()
    for end in ends:
        weakref.finalize(owner, os.close, end).atexit = False
    return ends


def _without_files(task: Task) -> Task:
    """What clients keep travels with the task: another machine does not see the server's files."""
    jobs = [Job(job.message, job.partition_id, states.read(job.state) or None) for job in task.jobs]
    return Task(jobs, task.make, task.seconds)
