"""Memory that the server lends to workers for their answers, and gets back when nobody looks at the answer any more."""

import mmap
import os
import weakref
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SMALL = 1 << 14  # bytes of numbers that are not worth a block, nor to hold one
ROUNDED = 1 << 16  # bytes: answers of one kind that differ by little fit in each other's blocks
LENT_BYTES = 1 << 27  # in all blocks together; where they are used up, answers are copied out of theirs
LENT_BLOCKS = 128  # likewise; each holds two descriptors in the server and one in each worker, of 1,024 as a rule


class Segment:
    """Memory that the server lends to workers. Raises OSError where the machine has no room."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = new_memory()
        weakref.finalize(self, os.close, self.fd).atexit = False
        os.posix_fallocate(self.fd, 0, size)  # else a machine that is full would show itself as SIGBUS
        self.memory = mapped(self.fd, size)


def new_memory() -> int:
    """A descriptor of memory without a name."""
    return os.memfd_create("fedwsa", os.MFD_CLOEXEC)


def mapped(fd: int, size: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> NDArray[np.uint8]:
    """Python's map keeps a descriptor of its own, so that `fd` may be closed."""
    return np.frombuffer(mmap.mmap(fd, size, prot=protection), np.uint8)


class Expected(NamedTuple):
    """An answer that is to come: how large the first of its kind is thought to be, in bytes of numbers."""

    kind: Hashable
    guess: int


class Pool:
    """The blocks that are lent, or free to be.

    least: blocks that there may be however large they are.
    """

    def __init__(self, least: int = 0) -> None:
        self.blocks: dict[int, Segment] = {}
        self.free: list[int] = []
        self.least = least
        self._kept: set[int] = set()  # by somebody who looks at the answer
        self._most_lent = 0  # to workers at the same time, so far
        self._sizes: dict[Hashable, int] = {}  # of the largest answer of each kind so far
        self._next = 0

    def learn(self, kind: Hashable, size: int) -> None:
        """An answer of this kind had so many bytes."""
        self._sizes[kind] = max(size, self._sizes.get(kind, 0))

    def borrow(self, expected: Expected) -> int | None:
        """A free block in which the answer fits, or a new one while there is room; None if it must do without."""
        size = self._sizes.get(expected.kind, expected.guess)  # a larger one comes through the socket, and is learnt
        if size < SMALL:
            return None
        if fitting := self._fitting(size):
            number = min(fitting, key=lambda each: self.blocks[each].size)
            self.free.remove(number)
        else:
            size = -(-size // ROUNDED) * ROUNDED
            self._make_room(size)
            if not self._has_room(size):
                return None
            try:
                segment = Segment(size)
            except OSError:
                return None
            self._next = number = self._next + 1
            self.blocks[number] = segment
        self._most_lent = max(self._most_lent, len(self.blocks) - len(self.free) - len(self._kept))
        return number

    def give_back(self, number: int) -> None:
        """The block may be lent again."""
        self._kept.discard(number)
        self.free.append(number)

    def take(self, number: int, size: int) -> NDArray[np.uint8]:
        """The first bytes of a block that was lent: free when their last view dies, or copied if blocks are scarce."""
        block = self.blocks[number]
        memory = np.frombuffer(block.memory.data, np.uint8, count=size)
        others = len(self.blocks) - len(self._kept) - 1  # that are lent or free: workers go on with them
        enough = others >= self._most_lent and self._fitting(block.size)
        if enough or self._has_room(block.size):
            self._kept.add(number)
            weakref.finalize(memory, self.give_back, number).atexit = False
        else:
            memory = memory.copy()
            self.give_back(number)
        return memory

    def _fitting(self, size: int) -> list[int]:
        """The free blocks of this size or more."""
        return [number for number in self.free if self.blocks[number].size >= size]

    def _make_room(self, size: int) -> None:
        """Drop free blocks, the oldest first, as far as a new one of this size needs it."""
        while self.free and not self._has_room(size):
            del self.blocks[self.free.pop(0)]

    def _has_room(self, size: int) -> bool:
        if len(self.blocks) < self.least:
            return True
        lent = sum(block.size for block in self.blocks.values())
        return len(self.blocks) < LENT_BLOCKS and lent + size <= LENT_BYTES
