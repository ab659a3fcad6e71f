"""Importing a great deal at once."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """For a program's own imports of PyTorch and Flower: without the garbage collector, which what is there then is
    spared for good.

    They make half a million objects, nearly all of which stay, and the collector goes through them again and again: an
    eighth of the time from a process's start to the end of its first round.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
