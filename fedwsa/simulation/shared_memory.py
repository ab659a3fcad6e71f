"""How messages and weights travel between the server process and a worker on the same machine.

Small things go through a Unix socket, the numbers through memory that both processes map (`memfd`): it has no name, so
that nothing is left behind whatever dies, and it does not count against a container's small /dev/shm. A record that
goes to many clients is written once and mapped by each worker; a reply is written into a block that the server lends.
"""

import mmap
import os
import pickle
import socket
import struct
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.common.constant import SType
from numpy.typing import NDArray

from fedwsa.arrays import from_bytes
from fedwsa.simulation.lending import SMALL, Expected, Pool, mapped, new_memory
from fedwsa.tracing import span

ALIGNMENT = 64  # bytes
SEEN, SEEN_BYTES = 8, 1 << 26  # records that a worker keeps, and bytes of those of them that are not in use


def plan(buffers: Sequence[memoryview]) -> tuple[list[tuple[int, int]], int]:
    """(offset, length) of each buffer, aligned, and the size of all."""
    layout, end = [], 0
    for buffer in buffers:
        layout.append((end, buffer.nbytes))
        end += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
    return layout, end


def _parts(memory: NDArray[np.uint8], layout: Sequence[tuple[int, int]]) -> list[memoryview]:
    """Views of (offset, length) each, which keep the memory alive."""
    view = memory.data
    return [view[offset : offset + length] for offset, length in layout]


def write(memory: NDArray[np.uint8], layout: Sequence[tuple[int, int]], buffers: Sequence[memoryview]) -> None:
    """Copy buffers to their places."""
    for (offset, length), buffer in zip(layout, buffers, strict=True):
        memory[offset : offset + length] = np.frombuffer(buffer, np.uint8)


class _Pickler(pickle.Pickler):
    """Numbers leave the stream: NumPy arrays by themselves, the bytes of Flower's plain arrays by this."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Array:
            return _array, (value.dtype, value.shape, value.stype, pickle.PickleBuffer(value.data))
        return NotImplemented


def _array(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:
    """One of ours where the bytes are those of `np.save` and are what the array says: they need no decoding then."""
    array = from_bytes(memoryview(data)) if stype == SType.NUMPY else None
    if array is not None and (array.dtype, array.shape) == (dtype, tuple(shape)):
        return array
    return Array(dtype=dtype, shape=shape, stype=stype, data=bytes(data))


def dumps(value: Any) -> tuple[bytes, list[memoryview]]:
    """A pickle without its numbers, and the numbers."""
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        with memoryview(buffer) as view:
            if not view.nbytes:
                return True
        buffers.append(buffer.raw())
        return False

    stream = BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=keep).dump(value)
    return stream.getvalue(), buffers


class Sent:
    """A record as the workers get it: written once into memory of its own, which each worker maps."""

    def __init__(self, number: int, record: ArrayRecord) -> None:
        self.number = number
        pickled, buffers = dumps(record)
        layout, self.size = plan(buffers)
        self.fd = _written(layout, buffers, self.size) if self.size >= SMALL else None
        inline = [bytes(buffer) for buffer in buffers] if self.fd is None else None
        self.packed = pickle.dumps((pickled, layout, self.size, inline), protocol=5)  # goes through the socket
        if self.fd is not None:
            weakref.finalize(self, os.close, self.fd).atexit = False


def _written(layout: Sequence[tuple[int, int]], buffers: Sequence[memoryview], size: int) -> int | None:
    """New memory that has the buffers in their places; None where the machine has no room or no descriptor for it."""
    fd = None
    try:
        fd = new_memory()
        os.truncate(fd, size)
        for (offset, _), buffer in zip(layout, buffers, strict=True):
            _write_whole(fd, buffer.cast("B"), offset)  # not through a map: the pages are not needed here
    except OSError:
        if fd is not None:
            os.close(fd)
        return None
    return fd


def _write_whole(fd: int, buffer: memoryview, offset: int) -> None:
    while buffer:
        written = os.pwrite(fd, buffer, offset)
        buffer, offset = buffer[written:], offset + written


class ServerEnd:
    """The server's end of the way to one worker, which answers values in the order in which they are sent."""

    def __init__(self, connection: Connection, pid: int, pool: Pool) -> None:
        self.connection = connection
        self.pid = pid
        self.pool = pool
        self.records: OrderedDict[int, int] = OrderedDict()  # that the worker has, the last used last, and their bytes
        self.blocks: set[int] = set()  # likewise
        self.lent: deque[tuple[int | None, Hashable]] = deque()  # block and kind of each answer that is due

    def send(
        self, value: Any, records: Mapping[Any, Sent], answer: Expected | None = None, limit: int | None = None
    ) -> bool:
        """Send a value with records to be put into it; False if that would put more than `limit` bytes into the socket.

        answer: what will come back, if anything will. Raises OSError: the worker is gone, or is given up because it
        got only a part of it.
        """
        pickled = pickle.dumps(value, protocol=5)
        used = {sent.number: sent for sent in records.values()}
        new = [sent for number, sent in used.items() if number not in self.records]
        if limit is not None and len(pickled) + sum(len(sent.packed) for sent in new) > limit:
            return False
        fds = [sent.fd for sent in new if sent.fd is not None]
        for number, sent in used.items():
            self.records[number] = sent.size
            self.records.move_to_end(number)
        lent, pool = None, self.pool
        if answer:
            block = pool.borrow(answer)
            self.lent.append((block, answer.kind))
            if block is not None:
                known = block in self.blocks
                lent = (block, pool.blocks[block].size, known)
                if not known:
                    fds.append(pool.blocks[block].fd)
                    self.blocks.add(block)
        stale = self.blocks - pool.blocks.keys()
        self.blocks -= stale
        keys = {key: sent.number for key, sent in records.items()}
        packed = {sent.number: sent.packed for sent in new}
        header = pickle.dumps((pickled, keys, packed, self._forget(len(used)), lent, stale), protocol=5)
        try:
            self.connection.send_bytes(header)
            for fd in fds:
                send_handle(self.connection, fd, self.pid)
        except BaseException:
            self._hang_up()
            raise
        return True

    def _forget(self, used: int) -> list[int]:
        """Records that the worker is to keep no more, the oldest first; never those that are used now, the last."""
        past = list(self.records.items())[: len(self.records) - used]
        size, dropped = sum(each for _, each in past), []
        for number, each in past:
            if len(self.records) <= SEEN and size <= SEEN_BYTES:
                break
            del self.records[number]
            size -= each
            dropped.append(number)
        return dropped

    def _hang_up(self) -> None:
        """Both ends read no more than what is already there, and then that the other is gone."""
        way = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=self.connection.fileno())
        with suppress(OSError):
            way.shutdown(socket.SHUT_RDWR)
        way.detach()

    def receive(self) -> Any:
        """The next answer. Raises EOFError or OSError: the worker is gone."""
        pickled, layout, size, in_block = pickle.loads(self.connection.recv_bytes())
        block, kind = self.lent.popleft()
        parts: list[Any]
        if in_block:
            assert block is not None
            views = _parts(self.pool.take(block, size), layout)
            parts = [bytearray(view) if view.nbytes < SMALL else view for view in views]  # a few bytes hold no block
        else:
            parts = [self.connection.recv_bytes() for _ in layout]
            if block is not None:
                self.pool.give_back(block)
        self.pool.learn(kind, size)
        return pickle.loads(pickled, buffers=parts)

    def close(self) -> None:
        """No answer that is still due will come. The worker may write one yet: its blocks are not lent again."""
        self.connection.close()
        for block, _ in self.lent:
            if block is not None:
                del self.pool.blocks[block]
        self.lent.clear()


class WorkerEnd:
    """The worker's end."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.records: dict[int, ArrayRecord] = {}
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self.block: int | None = None

    def receive(self) -> tuple[Any, dict[Any, ArrayRecord]]:
        """A value and its records, which other values may share. Raises EOFError: the server is gone."""
        with span("wait"):
            header = self.connection.recv_bytes()
        value, keys, new, dropped, lent, stale = pickle.loads(header)
        for number in dropped:
            del self.records[number]
        for number, packed in new.items():
            pickled, layout, size, inline = pickle.loads(packed)
            parts = _parts(self._map(size, mmap.PROT_READ), layout) if inline is None else inline
            self.records[number] = pickle.loads(pickled, buffers=parts)
        for number in stale:
            self.blocks.pop(number, None)
        self.block = None
        if lent is not None:
            self.block, size, known = lent
            if not known:
                self.blocks[self.block] = self._map(size)
        return pickle.loads(value), {key: self.records[number] for key, number in keys.items()}

    def _map(self, size: int, *protection: int) -> NDArray[np.uint8]:
        """The memory that comes next."""
        fd = recv_handle(self.connection)
        try:
            return mapped(fd, size, *protection)
        finally:
            os.close(fd)

    def send(self, answer: Any) -> None:
        """An answer; its numbers go into the block that came with the value if they fit, else through the socket."""
        pickled, buffers = dumps(answer)
        layout, size = plan(buffers)
        memory = None if self.block is None or not layout else self.blocks[self.block]
        in_block = memory is not None and size <= memory.size
        if memory is not None and in_block:
            write(memory, layout, buffers)
        self.connection.send_bytes(pickle.dumps((pickled, layout, size, in_block), protocol=5))
        if not in_block:
            for buffer in buffers:
                self.connection.send_bytes(buffer)


def listen(name: str) -> Callable[[float], Connection]:
    """Listen at a name; the function returned waits for one worker, TimeoutError after so many seconds.

    The name is none of a file (Linux's abstract namespace), so that nothing is left behind whatever dies.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0{name}")
    listener.listen()

    def accept(timeout: float) -> Connection:
        listener.settimeout(timeout)
        while True:
            accepted, _ = listener.accept()
            if _user_of(accepted) == os.getuid():
                accepted.setblocking(True)
                return Connection(accepted.detach())
            accepted.close()  # anybody on this machine may call

    return accept


def _user_of(accepted: socket.socket) -> int:
    """Who is at the other end."""
    _, user, _ = struct.unpack("3i", accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(user)


def connect(name: str) -> Connection:
    """The worker's side of `listen`. Raises OSError where the name is another machine's."""
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    caller.connect(f"\0{name}")
    return Connection(caller.detach())
