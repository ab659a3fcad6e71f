"""When the compiled loops of `fedwsa.loops` are worth their compiler, which takes half a second and 125 MB to load."""

import sys
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

ENOUGH = 1 << 27  # numbers that a process goes through without: a tenth of a second, in a run that is likely to go on

_seen = 0


def loops_for(*rows: NDArray[Any]) -> ModuleType | None:
    """`fedwsa.loops` if these are numbers that it takes and this process has seen enough of them; None if not.

    Whoever asks has the same loop in NumPy, to the last bit: no result depends on the answer.
    """
    global _seen
    if not all(row.dtype == np.float32 and row.flags.c_contiguous and row.flags.aligned for row in rows):
        return None
    _seen += sum(row.size for row in rows)
    if _seen < ENOUGH and "numba" not in sys.modules:
        return None
    from fedwsa import loops

    return loops
