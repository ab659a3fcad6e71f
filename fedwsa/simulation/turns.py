"""Whose turn it is to use the engine: one thread's at a time.

Flower's older servers send each client's message from a thread of its own, and a ServerApp may push messages and look
for the replies later. Then a thread of the grid's, the feeder, takes what comes and gives the workers more, whenever no
other thread has the turn.
"""

import threading
from collections.abc import Callable
from types import TracebackType

END_TIMEOUT = 10.0  # seconds for what the feeder is at to end


class Turns:
    """`with turns:` gives the caller's thread the turn; it may be nested.

    step: what the feeder does at its turn: wait for the engine, and take what comes. needed: whether it has to.
    wake: makes a step that waits return. What a step raises is raised to whoever has or awaits something next.
    """

    def __init__(self, step: Callable[[], object], needed: Callable[[], bool], wake: Callable[[], None]) -> None:
        self._step, self._needed, self._wake = step, needed, wake
        self._lock = threading.RLock()
        self._given_way = threading.Condition(self._lock)
        self._changed = threading.Condition()
        self._others = 0  # threads that have the turn or want it
        self._wanting = 0  # of these, threads that want it
        self._entered = 0  # how many times it was had
        self._feeding = self._waiting = self._closed = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        with self._changed:
            self._others += 1
            self._wanting += 1
        if self._feeding or self._waiting:
            self._wake()
        self._lock.acquire()
        with self._changed:
            self._wanting -= 1
            self._entered += 1
        if self._error is not None:
            self.__exit__(None, None, None)
            raise self._error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given_way.notify_all()
        self._lock.release()
        with self._changed:
            self._others -= 1
            self._changed.notify_all()  # it may have taken what another thread waits for

    def wait(self, step: Callable[[], object]) -> None:
        """At one's turn: do a step that waits, but let others that want the turn have it meanwhile, once each."""
        self._waiting = True  # whoever comes from now on wakes it
        try:
            if not self._wanting:
                step()
        finally:
            self._waiting = False
        with self._changed:
            self._changed.notify_all()  # it may have brought what another thread waits for
        had = self._entered + self._wanting  # whoever comes later, or again, waits for the next time
        while self._wanting and self._entered < had:
            self._given_way.wait()

    def feed(self) -> None:
        """From now on there is a feeder."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._feed, name="fedwsa-feeder", daemon=True)
            self._thread.start()

    def wait_for(self, done: Callable[[], bool], timeout: float | None) -> None:
        """Wait until the feeder has brought it about, for `timeout` seconds at most, or has ended.

        Not to be called at one's turn.
        """
        with self._changed:
            self._changed.wait_for(lambda: done() or self._closed, timeout)

    def close(self) -> None:
        """End the feeder."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._wake()
            self._thread.join(END_TIMEOUT)

    def _feed(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (not self._others and self._needed()))
                if self._closed:
                    return
            with self._lock:
                self._feeding = True  # whoever comes from now on wakes it; who came before is among the others
                try:
                    if not self._others and not self._closed:
                        self._step()
                except Exception as error:  # it is raised to the others
                    self._error, self._closed = error, True
                finally:
                    self._feeding = False
            with self._changed:
                self._changed.notify_all()
