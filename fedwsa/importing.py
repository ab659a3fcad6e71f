"""Importing a great deal at once."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """A program's own imports of PyTorch and Flower, at which the garbage collector neither looks now nor later.

    They make half a million objects, nearly all of which stay, and it goes through them again and again: an eighth of
    the time from a process's start to the end of its first round. Where PyTorch is there already it only rests: what
    else is there may be garbage, and must not be kept.
    """
    enabled, is_start = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_start:
            gc.freeze()
        if enabled:
            gc.enable()
