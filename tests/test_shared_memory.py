"""The way to a worker, both ends in this process: memory and descriptors are limited, and nobody waits for ever."""

import gc
import os
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import Pipe, get_context
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import ray
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedwsa.arrays import record_of, view
from fedwsa.simulation import shared_memory
from fedwsa.simulation.engine import Answer, Job, Outcome, Task, identify
from fedwsa.simulation.lending import LENT_BLOCKS, Expected, Pool
from fedwsa.simulation.links import ObjectStoreLink, SharedMemory, SharedMemoryLink, WorkerDiedError
from fedwsa.simulation.shared_memory import SEEN, Sent, ServerEnd, WorkerEnd
from fedwsa.simulation.states import Kept

pytestmark = pytest.mark.timeout(60)

LARGE = 1 << 18  # bytes; more than a socket takes


def refuse(*_: object) -> Any:
    raise OSError(24, "Too many open files")


def ends(pool: Pool) -> tuple[ServerEnd, WorkerEnd]:
    ours, theirs = Pipe()
    return ServerEnd(ours, os.getpid(), pool), WorkerEnd(theirs)


def linked() -> tuple[SharedMemoryLink, WorkerEnd]:
    ours, theirs = Pipe()
    return SharedMemoryLink(ours, os.getpid(), SharedMemory(), None), WorkerEnd(theirs)


def numbers(size: int, value: float = 1.0) -> ArrayRecord:
    """Of so many bytes."""
    return record_of({"numbers": np.full(size // 8, value)})


def first(record: ArrayRecord) -> float:
    return float(view(record["numbers"])[0])


def open_descriptors() -> list[str]:
    """What this process's descriptors are of."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the folder itself
            found.append(os.readlink(entry))
    return found


def memory_descriptors() -> int:
    """Of this process, to memory without a name."""
    return sum("memfd:fedwsa" in each for each in open_descriptors())


def task(content: RecordDict, state: Kept | None = None, make: Any = None) -> Task:
    identify()
    return Task([Job(Message(content, 1000, "train"), 0, state, "the next file")], make)


# ---- what the server keeps


def test_a_small_array_of_an_answer_holds_no_block_and_a_large_one_is_not_copied() -> None:
    pool = Pool()
    server, worker = ends(pool)
    server.send("a value", {}, Expected("answers", LARGE))
    worker.receive()
    worker.send({"large": np.ones(LARGE // 16), "small": np.arange(10)})
    answer = server.receive()
    (block,) = pool.blocks.values()
    assert np.shares_memory(answer["large"], block.memory)
    assert pool.free == []
    small = answer.pop("small")
    del answer
    assert pool.free == list(pool.blocks)
    block.memory[:] = 7
    assert small.tolist() == list(range(10))
    small += 1  # whoever gets it may write to it, as to a large one


def test_kept_answers_use_no_more_descriptors_than_there_are() -> None:
    """Two workers, whose answers come together; none of them has to go through the socket."""
    before, pool = memory_descriptors(), Pool(least=6)
    pairs, kept = [ends(pool) for _ in range(2)], []
    for number in range(LENT_BLOCKS + 50):
        for server, _ in pairs:
            server.send(number, {}, Expected("answers", LARGE // 4))
        for at, (server, worker) in enumerate(pairs):
            (block, _), *_ = server.lent
            assert block is not None, f"answer {number} of worker {at}"
            assert worker.receive()[0] == number
            worker.send(np.full(LARGE // 32, 2 * number + at))
        kept += [server.receive() for server, _ in pairs]
    assert [each[0] for each in kept] == list(range(len(kept)))
    assert [each[-1] for each in kept] == list(range(len(kept)))
    assert len(pool.blocks) == LENT_BLOCKS
    assert memory_descriptors() - before <= (2 + len(pairs)) * LENT_BLOCKS  # two in the server, one in each worker


# ---- by Ray's object store


class Handle:
    """An actor on another machine: what it is called with, and a call that ends as a test says."""

    def __init__(self, future: Future[Outcome]) -> None:
        self.handle = self
        self.future = lambda: future

    def remote(self, *_: object) -> Any:
        return self


def elsewhere() -> tuple[ObjectStoreLink, Future[Outcome]]:
    """A link that has sent a task, and what will be its outcome."""
    future: Future[Outcome] = Future()
    link = ObjectStoreLink(Handle(future), set())
    assert link.send(task(RecordDict()), busy=False)
    return link, future


@pytest.mark.parametrize(
    "error", [ray.exceptions.RaySystemError("no room"), ray.exceptions.RayTaskError("handle", "MemoryError", "")]
)
def test_what_ray_or_the_worker_raises_is_the_workers_end(error: Exception) -> None:
    link, future = elsewhere()
    future.set_exception(error)
    with pytest.raises(WorkerDiedError):
        link.receive()


def test_a_link_that_is_not_needed_any_more_leaves_no_descriptor() -> None:
    link, future = elsewhere()
    pipe = os.readlink(f"/proc/self/fd/{link.reader}")
    future.set_result(Outcome([]))
    link.close()
    assert open_descriptors().count(pipe) == 2  # Ray's thread might write yet
    del link, future
    gc.collect()  # each holds the other
    assert pipe not in open_descriptors()


# ---- descriptors that are used up


def test_a_worker_that_got_a_part_of_a_task_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for the rest. What it answered before still comes."""
    link, worker = linked()
    assert link.send(task(RecordDict()), busy=False)
    worker.receive()
    worker.send(Outcome([Answer("earlier", None, None)]))
    monkeypatch.setattr(shared_memory, "send_handle", refuse)
    monkeypatch.setattr(SharedMemoryLink, "_reason", lambda self: "as Ray says it")
    link.send(task(RecordDict({"arrays": numbers(LARGE)})), busy=True)
    (outcome,) = link.receive()
    assert [answer.message_id for answer in outcome.answers] == ["earlier"]
    with pytest.raises(EOFError):
        worker.receive()
    with pytest.raises(WorkerDiedError, match="as Ray says it"):
        link.receive()
    link.close()


@pytest.mark.parametrize("step", ["new_memory", "_write_whole"])
def test_a_record_that_gets_no_memory_of_its_own_goes_through_the_socket(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = memory_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(shared_memory, step, refuse)
        sent = Sent(1, numbers(1 << 16, 3.0))
    assert memory_descriptors() == before
    server, worker = ends(Pool())
    server.send("a value", {"arrays": sent})
    _, records = worker.receive()
    assert first(records["arrays"]) == 3.0


# ---- what a worker keeps


def test_a_worker_keeps_past_records_while_they_are_few_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SEEN_BYTES", 1 << 16)
    server, worker = ends(Pool())

    def send(*sent: Sent) -> list[int]:
        server.send("a value", {str(each.number): each for each in sent})
        _, records = worker.receive()
        assert [first(record) for record in records.values()] == [each.number for each in sent]
        assert worker.records.keys() == server.records.keys()
        return list(server.records)

    small, large = ([Sent(n, numbers(size, n)) for n in range(20)] for size in (80, 1 << 15))
    for sent in small:
        kept = send(sent)
    assert kept == list(range(20 - SEEN, 20))
    server, worker = ends(Pool())
    assert [send(sent) for sent in large[:5]] == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert send(*large[5:15]) == [3, 4, *range(5, 15)][-10:]
    assert send(large[14]) == [12, 13, 14]
    assert send(large[0]) == [13, 14, 0]  # it comes again
    assert send(large[13]) == [14, 0, 13]


def test_a_model_that_is_out_of_use_leaves_the_workers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SEEN_BYTES", 1 << 16)
    before = memory_descriptors()
    server, worker = ends(Pool())
    for number in range(5):
        sent = Sent(number, numbers(1 << 17))
        server.send("a value", {"arrays": sent})
        worker.receive()
        assert memory_descriptors() - before == 2  # the record's, and the map's


# ---- a worker that computes reads nothing: what is sent to it must fit into the socket


def many_records() -> RecordDict:
    return RecordDict({str(k): numbers(1 << 13, k) for k in range(LARGE >> 12)})


class Make:
    """Of a fold; it has what it needs with it."""

    def __init__(self) -> None:
        self.weights = np.ones(LARGE)

    def __call__(self) -> Any:
        raise NotImplementedError


TASKS: dict[str, Callable[[], Task]] = {
    "many small records": lambda: task(many_records()),
    "a record without memory": lambda: task(RecordDict({"arrays": numbers(LARGE)})),
    "long texts in a list": lambda: task(RecordDict({"config": ConfigRecord({"texts": ["x" * LARGE] * 2})})),
    "what the client keeps": lambda: task(RecordDict(), bytes(LARGE)),
    "the fold": lambda: task(RecordDict(), None, Make()),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_that_the_socket_may_not_take_waits_until_the_worker_is_idle(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "a record without memory":
        monkeypatch.setattr(shared_memory, "new_memory", refuse)
    link, worker = linked()
    large = TASKS[name]()
    os.set_blocking(link.fileno(), False)  # else a failure here would wait for ever
    assert not link.send(large, busy=True)
    assert not worker.connection.poll()
    assert not link.end.lent
    os.set_blocking(link.fileno(), True)
    received: list[Any] = []
    thread = Thread(target=lambda: received.append(worker.receive()), daemon=True)
    thread.start()
    assert link.send(large, busy=False)
    thread.join(20)
    ((packed, records),) = received
    content = large.jobs[0].message.content
    for (number, key), record in records.items():
        packed.contents[number][key] = record
    assert packed.contents[0].object_id == content.object_id
    assert (packed.make is None) == (large.make is None)


def test_a_small_task_or_one_whose_records_are_there_goes_to_a_busy_worker() -> None:
    link, worker = linked()
    content = many_records()
    for sent in content.values():  # as many as one message may carry to a busy one, and then all of them
        assert link.send(task(RecordDict({"arrays": sent})), busy=True)
        worker.receive()
    few = RecordDict({"arrays": sent, "config": ConfigRecord({"rate": 0.5})})
    assert link.send(task(few, "a file"), busy=True)
    packed, records = worker.receive()
    assert len(records) == 1
    assert packed.jobs[0][3:] == ("a file", "the next file")


# ---- the socket


@pytest.mark.process
@pytest.mark.skipif(os.getuid() != 0, reason="only root can call as somebody else")
def test_nobody_else_gets_the_workers_place() -> None:
    name = f"fedwsa-test-{os.getpid()}"
    accept = shared_memory.listen(name)

    called, calling = Pipe(duplex=False)

    def call_as_somebody_else() -> None:
        os.setuid(65534)
        connection = shared_memory.connect(name)
        calling.send_bytes(b"!")
        with suppress(EOFError, OSError):
            connection.recv_bytes()  # ended by the other side

    stranger = get_context("fork").Process(target=call_as_somebody_else)
    stranger.start()
    assert called.poll(20.0)
    worker = shared_memory.connect(name)
    end = accept(20.0)
    end.send_bytes(b"a task")
    assert worker.recv_bytes() == b"a task"
    stranger.join(20.0)
    assert stranger.exitcode == 0


def test_who_waits_for_a_worker_that_never_calls_is_told() -> None:
    with pytest.raises(TimeoutError):
        shared_memory.listen(f"fedwsa-nobody-{os.getpid()}")(0.01)
