"""Importing a great deal at once."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """A program's own imports of PyTorch and Flower, at which the garbage collector neither looks now nor later.

    They make half a million objects, nearly all of which stay, and it goes through them again and again: an eighth of
    the time from a process's start to the end of its first round.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
