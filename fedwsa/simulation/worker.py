"""The worker: a process that holds the client app and does tasks, one after another."""

import ctypes
import gc
import os
import socket
import sys
import traceback
from multiprocessing.connection import Connection
from typing import NamedTuple

import ray
import torch
from flwr.app import ArrayRecord, Context, Error, Message, Metadata, RecordDict
from flwr.app.message.message import make_message
from flwr.clientapp import ClientApp
from ray import cloudpickle

from fedwsa import tracing
from fedwsa.run_folder import RunFolderError
from fedwsa.simulation.engine import Job, Outcome, Population, Task, identify, perform
from fedwsa.simulation.folding import MakeFold
from fedwsa.simulation.shared_memory import WorkerEnd, connect
from fedwsa.simulation.states import Kept
from fedwsa.tracing import span

LOAD_CLIENT_APP = 1  # Flower's error code

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_BYTES = 1 << 28  # of memory that is free, at the most
LARGEST_KEPT = 1 << 25  # bytes of one allocation, glibc's limit

Place = tuple[int, str]  # a record's: which of the contents, and its key there


class Packed(NamedTuple):
    """A task on its way: what several messages share stands there once, array records travel by themselves."""

    make: bytes | None
    contents: list[RecordDict]
    jobs: list[tuple[Metadata, int, int, Kept | None, str]]  # which content; the rest as in Job


class Worker:
    """Made into an actor by `RayEngine`. On the server's machine it serves a socket; elsewhere it is called.

    core: the one to stay on. Linux wakes a worker beside whoever sent it something, where the two then share a core for
    milliseconds before one of them is moved.
    """

    def __init__(self, threads: int, core: int | None = None) -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        _keep_memory()
        self.threads = threads
        self.name = f"worker {os.getpid()} on {socket.gethostname()}"
        identify()
        self.packed = b""
        self.population: Population | None = None
        self.pickled: bytes | None = None
        self.make: MakeFold | None = None
        self.connection: Connection | None = None
        self.modules = 0  # imported when `_set_aside` last looked

    def connect(self, name: str, node_id: str) -> int | None:
        """This process's id once it is connected to the server's socket; None on another of Ray's nodes than its."""
        if ray.get_runtime_context().get_node_id() != node_id:
            return None
        try:
            self.connection = connect(name)
        except OSError:
            return None
        return os.getpid()

    def serve(self) -> None:
        """Do what comes through the socket until the server closes it."""
        assert self.connection is not None, "connect() comes first"
        end = WorkerEnd(self.connection)
        try:
            while True:
                with span("transfer"):
                    value, records = end.receive()
                    if isinstance(value, Packed):
                        end.send(self.handle(value, list(records), *records.values()))
                    else:
                        self.begin(*value)
        except (EOFError, OSError):
            return
        finally:
            self.connection.close()  # whatever ends this, the server must see that no answer comes

    def begin(self, packed: bytes, path: list[str], trace: bool) -> None:
        """The next tasks are for this pickled population; `path` is where the server finds its modules."""
        if not trace:
            tracing.stop()
        elif not tracing.is_on():
            tracing.start()
        sys.path.extend(entry for entry in path if entry not in sys.path)
        self.packed, self.population = packed, None

    def handle(self, packed: Packed, places: list[Place], *records: ArrayRecord) -> Outcome:
        """Do one task, whose array records come beside it."""
        torch.set_num_threads(self.threads)
        for (number, key), record in zip(places, records, strict=True):
            packed.contents[number][key] = record
        jobs = [
            Job(make_message(metadata, packed.contents[number]), partition_id, state, file)
            for metadata, number, partition_id, state, file in packed.jobs
        ]
        try:
            if self.population is None:
                self.population = cloudpickle.loads(self.packed)
            population = self.population
        except Exception:
            population = Population(_Broken(traceback.format_exc()), 0, {})
        if packed.make != self.pickled:
            self.pickled, self.make = packed.make, None if packed.make is None else cloudpickle.loads(packed.make)
        try:
            outcome = perform(population, Task(jobs, self.make))
        except RunFolderError as error:
            return Outcome([], fault=str(error))
        self._set_aside()
        if tracing.is_on():
            outcome.worker, outcome.slices = self.name, tracing.take()
        return outcome

    def _set_aside(self) -> None:
        """Spare the garbage collector what has been imported: a pass over all of it is a pause of 0.1 s.

        Between two tasks, when hardly anything else is there.
        """
        if len(sys.modules) > self.modules:
            self.modules = len(sys.modules)
            gc.freeze()


def _keep_memory() -> None:
    """Let glibc keep what is freed for the next client: giving it back and getting it anew is a page fault a 4 KiB."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # not elsewhere
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


class _Broken(ClientApp):
    """In place of an app that could not be loaded: says why to every message."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def __call__(self, message: Message, context: Context) -> Message:
        return Message(Error(LOAD_CLIENT_APP, self.reason), reply_to=message)
