"""When the compiled loops of `fedwsa.loops` are worth their compiler, which takes half a second and 125 MB to load.

They are for processes in which clients train; a server whose clients are elsewhere has little to loop over.
"""

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALL = 1 << 16
"""Numbers in a model for which the loops do not pay: NumPy's passes find it in the processor's cache."""

ENOUGH = 1 << 24
"""Numbers in the larger models that a process trained without: a run that gets there is likely to go on."""

SINGLE = np.dtype(np.float32)

_trained = 0
_loops: ModuleType | None = None


def trained(numbers: int) -> None:
    """A client of this process has trained a model of so many numbers."""
    global _loops, _trained
    _trained += numbers if numbers > SMALL else 0
    if _loops is None and _trained >= ENOUGH:
        from fedwsa import loops

        _loops = loops


def loops_for(*rows: NDArray[Any]) -> ModuleType | None:
    """`fedwsa.loops` if it is loaded, and these are numbers that it takes; else None.

    Whoever asks has the same loop in NumPy, to the last bit: no result depends on the answer.
    """
    for row in rows:
        flags = row.flags
        if row.dtype != SINGLE or not (flags.c_contiguous and flags.aligned):
            return None
    return _loops
