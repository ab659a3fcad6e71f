"""Sums over replies whose bits do not depend on who computed which part of them."""

from collections.abc import Callable, Iterable
from typing import Protocol, Self

from flwr.app import Message

BLOCK = 16  # replies that one worker may fold at the most; a power of two


class Fold(Protocol):
    """What replies come to. Parts are made on the workers, each from one reply, and put together two by two."""

    def add(self, reply: Message) -> None:
        """Take the one reply that this part is made of; the part may keep its numbers, which nobody writes to."""

    def merge(self, later: Self) -> None:
        """Take over the part that follows this one in the order of the messages; it is not used again."""


MakeFold = Callable[[], Fold]


class Tree:
    """The fold of replies in the order of their messages, BLOCK at a time, pairwise inside a block.

    The pairs are fixed by the positions alone: whether a worker gave one reply, or four that lie in one half of a block
    already folded, the same numbers are added in the same order. Memory: log2(BLOCK) + 2 parts.
    """

    def __init__(self) -> None:
        self._whole: Fold | None = None  # all blocks that are complete
        self._parts: list[tuple[int, Fold]] = []  # of the block that is not; sizes are falling powers of two

    def push(self, size: int, part: Fold) -> None:
        """The next `size` replies: a power of two that divides their first position, at most BLOCK."""
        while self._parts and self._parts[-1][0] == size:
            _, earlier = self._parts.pop()
            earlier.merge(part)
            size, part = 2 * size, earlier
        if size == BLOCK:
            self._absorb(part)
        else:
            self._parts.append((size, part))

    def total(self) -> Fold | None:
        """The fold of all that was pushed, None if nothing was. The tree is empty afterwards."""
        while len(self._parts) > 1:
            _, last = self._parts.pop()
            self._parts[-1][1].merge(last)
        if self._parts:
            self._absorb(self._parts.pop()[1])
        whole, self._whole = self._whole, None
        return whole

    def _absorb(self, part: Fold) -> None:
        if self._whole is None:
            self._whole = part
        else:
            self._whole.merge(part)


def fold(make: MakeFold, replies: Iterable[Message]) -> Fold | None:
    """What replies that are here come to, None if there is none; the same bits as where workers do a part of it."""
    tree = Tree()
    for reply in replies:
        part = make()
        part.add(reply)
        tree.push(1, part)
    return tree.total()
