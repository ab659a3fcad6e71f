"""How messages and weights travel between the server process and a worker on the same machine.

Small things go through a Unix socket, the numbers through memory that both processes map (`memfd`): it has no name, so
that nothing is left behind whatever dies, and it does not count against a container's small /dev/shm. A record that
goes to many clients is written once and mapped by each worker; a reply is written into a block that the server lends.
"""

import mmap
import os
import pickle
import socket
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from io import BytesIO
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.common.constant import SType
from numpy.typing import NDArray

from fedwsa.arrays import from_bytes
from fedwsa.tracing import span

ALIGNMENT = 64  # bytes
SMALL = 1 << 14  # bytes of numbers that are not worth a block
ROUNDED = 1 << 16  # bytes: answers of one kind that differ by little fit in each other's blocks
SEEN = 8  # records that a worker keeps mapped beyond those in use
LENT_BYTES = 1 << 27  # in all blocks together; where they are used up, answers are copied out of theirs


class Segment:
    """Memory that several processes map; `fd` is another process's. Raises OSError where the machine has no room."""

    def __init__(self, size: int, fd: int | None = None, *, writable: bool = True) -> None:
        self.size = size
        self.fd = _memory() if fd is None else fd
        try:
            if fd is None:
                os.posix_fallocate(self.fd, 0, size)  # else a machine that is full would show itself as SIGBUS
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self.memory = np.frombuffer(mmap.mmap(self.fd, size, prot=protection), np.uint8)
        except BaseException:
            os.close(self.fd)
            raise
        weakref.finalize(self, os.close, self.fd).atexit = False


def _memory() -> int:
    return os.memfd_create("fedwsa", os.MFD_CLOEXEC)


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


def write(segment: Segment, layout: Sequence[tuple[int, int]], buffers: Sequence[memoryview]) -> None:
    """Copy buffers to their places."""
    for (offset, length), buffer in zip(layout, buffers, strict=True):
        segment.memory[offset : offset + length] = np.frombuffer(buffer, np.uint8)


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


class Expected(NamedTuple):
    """An answer that is to come: how large the first of its kind is thought to be, in bytes of numbers."""

    kind: Hashable
    guess: int


class Pool:
    """Blocks that the server lends to workers for answers, and gets back when nobody looks at the answer any more.

    least: blocks that there may be however large they are.
    """

    def __init__(self, least: int = 0) -> None:
        self.blocks: dict[int, Segment] = {}
        self.free: list[int] = []
        self.least = least
        self._sizes: dict[Hashable, int] = {}  # of the largest answer of each kind so far
        self._next = 0

    def learn(self, kind: Hashable, size: int) -> None:
        """An answer of this kind had so many bytes."""
        self._sizes[kind] = max(size, self._sizes.get(kind, 0))

    def borrow(self, expected: Expected) -> int | None:
        """A free block in which the answer fits, or a new one while there is room; None if it must do without."""
        size = max(expected.guess, self._sizes.get(expected.kind, 0))
        if size < SMALL:
            return None
        if (fitting := self._fitting(size)) is not None:
            self.free.remove(fitting)
            return fitting
        size = -(-size // ROUNDED) * ROUNDED
        self._make_room(size)
        if not self._has_room(size):
            return None
        try:
            segment = Segment(size)
        except OSError:
            return None
        self._next += 1
        self.blocks[self._next] = segment
        return self._next

    def give_back(self, number: int) -> None:
        """The block may be lent again."""
        self.free.append(number)

    def take(self, number: int, size: int) -> NDArray[np.uint8]:
        """The first bytes of a block that was lent: free when their last view dies, or copied if blocks are scarce."""
        block = self.blocks[number]
        memory = np.frombuffer(block.memory.data, np.uint8, count=size)
        if self._fitting(block.size) is None and not self._has_room(block.size):
            memory = memory.copy()
            self.give_back(number)
        else:
            weakref.finalize(memory, self.give_back, number).atexit = False
        return memory

    def _fitting(self, size: int) -> int | None:
        """The smallest free block of this size or more."""
        fitting = [number for number in self.free if self.blocks[number].size >= size]
        return min(fitting, key=lambda number: self.blocks[number].size, default=None)

    def _make_room(self, size: int) -> None:
        """Drop free blocks, the oldest first, as far as a new one of this size needs it."""
        while self.free and not self._has_room(size):
            del self.blocks[self.free.pop(0)]

    def _has_room(self, size: int) -> bool:
        lent = sum(block.size for block in self.blocks.values())
        return len(self.blocks) < self.least or lent + size <= LENT_BYTES


class Sent:
    """A record as the workers get it: written once into memory of its own, which each worker maps."""

    def __init__(self, number: int, record: ArrayRecord) -> None:
        self.number = number
        self.pickled, buffers = dumps(record)
        self.layout, self.size = plan(buffers)
        self.fd: int | None = None
        self.inline: list[bytes] = []
        if self.size >= SMALL:
            self.fd = _memory()
            weakref.finalize(self, os.close, self.fd).atexit = False
            try:
                os.truncate(self.fd, self.size)
                for (offset, _), buffer in zip(self.layout, buffers, strict=True):
                    _write_whole(self.fd, buffer.cast("B"), offset)  # not through a map: the pages are not needed here
            except OSError:  # the machine has no room
                self.fd = None
        if self.fd is None:
            self.inline = [bytes(buffer) for buffer in buffers]


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
        self.records: OrderedDict[int, None] = OrderedDict()  # that the worker has
        self.blocks: set[int] = set()  # likewise
        self.lent: deque[tuple[int | None, Hashable]] = deque()  # block and kind of each answer that is due

    def send(self, value: Any, records: Mapping[Any, Sent], answer: Expected | None = None) -> None:
        """A value with records to be put into it. answer: what will come back, if anything will.

        Raises OSError: the worker is gone.
        """
        fds = []
        pool = self.pool
        block = pool.borrow(answer) if answer else None
        if answer:
            self.lent.append((block, answer.kind))
        new: dict[int, Any] = {}
        for sent in records.values():
            if sent.number not in self.records:
                new[sent.number] = (sent.pickled, sent.layout, sent.size, sent.inline, sent.fd is not None)
                if sent.fd is not None:
                    fds.append(sent.fd)
                self.records[sent.number] = None
            self.records.move_to_end(sent.number)
        keep = max(SEEN, len(records))
        dropped = [self.records.popitem(last=False)[0] for _ in range(len(self.records) - keep)]
        lent = None
        if block is not None:
            known = block in self.blocks
            lent = (block, pool.blocks[block].size, known)
            if not known:
                fds.append(pool.blocks[block].fd)
                self.blocks.add(block)
        stale = self.blocks - pool.blocks.keys()
        self.blocks -= stale
        header = (value, {key: sent.number for key, sent in records.items()}, new, dropped, lent, stale)
        self.connection.send_bytes(pickle.dumps(header, protocol=5))
        for fd in fds:
            send_handle(self.connection, fd, self.pid)

    def receive(self) -> Any:
        """The next answer. Raises EOFError or OSError: the worker is gone."""
        pickled, layout, size, in_block = pickle.loads(self.connection.recv_bytes())
        block, kind = self.lent.popleft()
        parts: list[Any]
        if in_block:
            assert block is not None
            parts = _parts(self.pool.take(block, size), layout)
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
        self.blocks: dict[int, Segment] = {}
        self.block: int | None = None

    def receive(self) -> tuple[Any, dict[Any, ArrayRecord]]:
        """A value and its records, which other values may share. Raises EOFError: the server is gone."""
        with span("wait"):
            header = self.connection.recv_bytes()
        value, keys, new, dropped, lent, stale = pickle.loads(header)
        for number, (pickled, layout, size, inline, mapped) in new.items():
            parts: list[Any] = inline
            if mapped:
                parts = _parts(Segment(size, recv_handle(self.connection), writable=False).memory, layout)
            self.records[number] = pickle.loads(pickled, buffers=parts)
        for number in dropped:
            self.records.pop(number, None)
        for number in stale:
            self.blocks.pop(number, None)
        self.block = None
        if lent is not None:
            self.block, size, known = lent
            if not known:
                self.blocks[self.block] = Segment(size, recv_handle(self.connection))
        return value, {key: self.records[number] for key, number in keys.items()}

    def send(self, answer: Any) -> None:
        """An answer; its numbers go into the block that came with the value if they fit, else through the socket."""
        pickled, buffers = dumps(answer)
        layout, size = plan(buffers)
        segment = None if self.block is None or not layout else self.blocks[self.block]
        in_block = segment is not None and size <= segment.size
        if segment is not None and in_block:
            write(segment, layout, buffers)
        self.connection.send_bytes(pickle.dumps((pickled, layout, size, in_block), protocol=5))
        if not in_block:
            for buffer in buffers:
                self.connection.send_bytes(buffer)


def listen(path: str) -> Callable[[float], Connection]:
    """Listen at a path; the function returned waits for one worker, TimeoutError after so many seconds."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()

    def accept(timeout: float) -> Connection:
        listener.settimeout(timeout)
        accepted, _ = listener.accept()
        accepted.setblocking(True)
        return Connection(accepted.detach())

    return accept


def connect(path: str) -> Connection:
    """The worker's side of `listen`. Raises OSError where the path is another machine's."""
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    caller.connect(path)
    return Connection(caller.detach())
