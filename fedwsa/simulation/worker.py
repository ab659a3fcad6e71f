"""The worker: a process that holds the client app and answers jobs, one at a time."""

import os
import sys
import traceback
from multiprocessing.connection import Connection

import torch
from flwr.app import ArrayRecord, Error, Message
from ray import cloudpickle

from fedwsa.simulation.engine import Answer, Job, Population, answer, identify, snapshot
from fedwsa.simulation.shared_memory import WorkerEnd, connect

LOAD_CLIENT_APP = 1  # Flower's error code


class Worker:
    """Made into an actor by `RayEngine`. On the server's machine it serves a socket; elsewhere it is called."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        identify()
        self.packed = b""
        self.population: Population | None = None
        self.connection: Connection | None = None

    def connect(self, path: str) -> int | None:
        """This process's id once it is connected to the server's socket; None on another machine."""
        try:
            self.connection = connect(path)
        except OSError:
            return None
        return os.getpid()

    def serve(self) -> None:
        """Answer what comes through the socket until the server closes it."""
        assert self.connection is not None, "connect() comes first"
        end = WorkerEnd(self.connection)
        try:
            while True:
                value, records = end.receive()
                if isinstance(value, Job):
                    end.send(self.handle(value, list(records), *records.values()))
                else:
                    self.begin(*value)
        except (EOFError, OSError):
            return
        finally:
            self.connection.close()  # whatever ends this, the server must see that no answer comes

    def begin(self, packed: bytes, path: list[str]) -> None:
        """The next jobs are for this pickled population; `path` is where the server finds its modules."""
        sys.path.extend(entry for entry in path if entry not in sys.path)
        self.packed, self.population = packed, None

    def handle(self, job: Job, keys: list[str], *records: ArrayRecord) -> Answer:
        """Answer one job, whose array records travelled by themselves."""
        torch.set_num_threads(self.threads)
        for key, record in zip(keys, records, strict=True):
            job.message.content[key] = snapshot(record)
        try:
            if self.population is None:
                self.population = cloudpickle.loads(self.packed)
        except Exception:
            reply = Message(Error(LOAD_CLIENT_APP, traceback.format_exc()), reply_to=job.message)
            return Answer(job.message.metadata.message_id, reply, job.state)
        return answer(self.population, job)
