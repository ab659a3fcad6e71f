"""Which clients take part in a round."""

import time
from collections.abc import Iterable, Iterator
from logging import INFO

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log

from fedwsa import messages
from fedwsa.errors import RunError
from fedwsa.seeding import generator

POLL = 1.0  # seconds between two looks at who is connected


class TooFewClientsError(RunError):
    """Fewer clients connected than a cohort needs."""


def draw(grid: Grid, size: int, *, seed: int, purpose: str, server_round: int, timeout: float) -> list[int]:
    """Node ids of a cohort: `size` of those connected, without replacement, ascending.

    Depends on seed, purpose and round alone, given the nodes. Waits until enough are connected; TooFewClientsError
    after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    told: int | None = None
    while len(nodes := sorted(grid.get_node_ids())) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TooFewClientsError(f"{len(nodes)} clients connected after {timeout:g} s, the cohort needs {size}")
        if len(nodes) != told:
            told = len(nodes)
            log(INFO, "waiting for clients: %d connected, the cohort needs %d", told, size)
        time.sleep(min(POLL, left))
    chosen = generator(seed, purpose, server_round).choice(len(nodes), size, replace=False)
    return [nodes[index] for index in sorted(chosen)]


def broadcast(
    nodes: Iterable[int], message_type: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord
) -> list[Message]:
    """The same content to every node; the caller's config is left as it is."""
    config = ConfigRecord({**config, messages.SERVER_ROUND: server_round, messages.VERSION: messages.SCHEMA_VERSION})
    content = RecordDict({messages.ARRAYS: arrays, messages.CONFIG: config})
    return [Message(content=content, dst_node_id=node, message_type=message_type) for node in nodes]


def each(replies: Iterable[Message]) -> Iterator[Message]:
    """Replies one by one, kept by nobody where the grid allows it, so that memory does not grow with the cohort."""
    stream = getattr(replies, "stream", None)
    return stream() if stream else iter(replies)
