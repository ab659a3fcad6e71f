"""Where time goes: what a process does at each moment, as slices that do not overlap.

Nothing is kept unless `start` was called, and nothing of other threads than the one that called it. Times are those of
`time.perf_counter`, which on Linux is one clock for all processes of a machine.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

Slice = tuple[str, float, float]  # what, from, to; seconds


class _Trace:
    def __init__(self) -> None:
        self.slices: list[Slice] = []
        self.others: dict[str, list[Slice]] = {}  # of the workers, by name
        self.doing: list[str] = []
        self.since = time.perf_counter()
        self.thread = threading.get_ident()

    def turn(self) -> None:
        """What was done until now is a slice."""
        now = time.perf_counter()
        if self.doing:
            self.slices.append((self.doing[-1], self.since, now))
        self.since = now


_trace: _Trace | None = None


def start() -> None:
    """From now on this process keeps slices."""
    global _trace
    _trace = _Trace()


def stop() -> None:
    """It keeps none any more."""
    global _trace
    _trace = None


def is_on() -> bool:
    """Whether slices are kept."""
    return _trace is not None


@contextmanager
def span(what: str) -> Iterator[None]:
    """This process does `what`, except while a span inside this one says otherwise."""
    trace = _trace
    if trace is None or trace.thread != threading.get_ident():
        yield
        return
    trace.turn()
    trace.doing.append(what)
    try:
        yield
    finally:
        trace.turn()
        trace.doing.pop()


def mark(what: str) -> None:
    """A slice without length, to count and to find one's way by."""
    if _trace is not None:
        _trace.turn()
        _trace.slices.append((what, _trace.since, _trace.since))


def keep(worker: str, slices: list[Slice]) -> None:
    """What a worker says that it did."""
    if _trace is not None and slices:
        _trace.others.setdefault(worker, []).extend(slices)


def take_others() -> dict[str, list[Slice]]:
    """What the workers said since the last call."""
    if _trace is None:
        return {}
    others, _trace.others = _trace.others, {}
    return others


def take() -> list[Slice]:
    """The slices since the last call, up to this moment."""
    if _trace is None:
        return []
    _trace.turn()
    slices, _trace.slices = _trace.slices, []
    return slices
