"""Who computes what when: how long clients take, and which of them travel together. No result depends on it."""

from collections import Counter
from collections.abc import Sequence

from fedwsa.simulation.folding import BLOCK

UNIT_SECONDS = 0.05  # of work that travels together at the most: a client that hangs takes its unit with it
SHARE = 1.5  # units for each worker, at least, in what is left of a round: nobody waits long for the last one
RECENT = 0.5  # weight of the newest time among those of a client
ENOUGH = 16  # clients whose times stand for those of the others


class Durations:
    """Seconds that clients take for a type of message.

    What a client took in rounds before; or else what others took, in proportion to the sizes of their data where these
    are known, or the mean of them where they are enough.
    """

    def __init__(self, sizes: Sequence[int] | None = None) -> None:
        self._sizes = sizes
        self._known: dict[tuple[int, str], float] = {}
        self._rates: dict[str, tuple[float, float, int]] = {}  # by type: seconds, samples and messages so far
        self._clients: Counter[str] = Counter()  # of whom something is known, by type

    def learn(self, partition_id: int, message_type: str, seconds: float) -> None:
        """A client took so long."""
        key = (partition_id, message_type)
        self._clients[message_type] += key not in self._known
        before = self._known.get(key, seconds)
        self._known[key] = before + RECENT * (seconds - before)
        total, samples, number = self._rates.get(message_type, (0.0, 0.0, 0))
        size = 0 if self._sizes is None else self._sizes[partition_id]
        self._rates[message_type] = total + seconds, samples + size, number + 1

    def seconds(self, partition_id: int, message_type: str) -> float | None:
        """What a client will take; None if nothing tells."""
        known = self._known.get((partition_id, message_type))
        if known is not None or message_type not in self._rates:
            return known
        total, samples, number = self._rates[message_type]
        if self._sizes is not None:
            return total / max(samples, 1.0) * self._sizes[partition_id]
        return total / number if self._clients[message_type] >= ENOUGH else None

    def rank(self, partition_id: int, message_type: str) -> float:
        """Larger for clients that take longer: seconds, or before any are known sizes, or all the same."""
        seconds = self.seconds(partition_id, message_type)
        if seconds is not None:
            return seconds
        return float("inf") if self._sizes is None else float(self._sizes[partition_id])


def units(seconds: Sequence[float | None], workers: int) -> list[int]:
    """Sizes of the runs of neighbouring clients that travel together, in order; their sum is len(seconds).

    Each is a power of two that divides its first position (what a `folding.Tree` takes), shorter than UNIT_SECONDS, and
    smaller towards the end. A client whose time is not known travels alone.
    """
    sizes: list[int] = []
    position, left = 0, sum(s for s in seconds if s is not None)
    while position < len(seconds):
        limit = min(UNIT_SECONDS, left / (SHARE * workers))
        size = 1
        while 2 * size <= BLOCK and position % (2 * size) == 0 and position + 2 * size <= len(seconds):
            total = 0.0
            for each in seconds[position : position + 2 * size]:
                total += float("inf") if each is None else each
            if total > limit:
                break
            size *= 2
        left -= sum(s for s in seconds[position : position + size] if s is not None)
        sizes.append(size)
        position += size
    return sizes
