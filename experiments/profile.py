"""Where a round's time went: a table, and a trace for Chrome (chrome://tracing) or Perfetto (ui.perfetto.dev)."""

import json
from collections.abc import Mapping, Sequence

from rich.table import Table

from fedwsa.tracing import Slice

SERVER = "server"
KINDS = ("starting", "dispatch", "transfer", "train", "aggregate", "evaluate", "record", "wait", "other")

Seconds = dict[str, float]


def totals(slices: Sequence[Slice], start: float, end: float) -> Seconds:
    """Seconds of each kind between two moments; kinds that are not in KINDS count as other."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for what, since, until in slices:
        seconds[what if what in seconds else "other"] += max(0.0, min(until, end) - max(since, start))
    return seconds


def per_round(processes: Mapping[str, Sequence[Slice]], rounds: int) -> tuple[float, Seconds, Seconds]:
    """Wall seconds of a round, what the server did in it, and what a worker did (the mean over them; empty: none).

    The time is that between the first and the last slice of the server. A worker is starting before its first slice,
    and waits after its last: it says what it did with its next answer.
    """
    server = processes[SERVER]
    start, end = server[0][1], server[-1][2]
    whole = [
        [("starting", start, slices[0][1]), *slices, ("wait", slices[-1][2], end)]
        for name, slices in processes.items()
        if name != SERVER
    ]
    workers = [totals(slices, start, end) for slices in whole]
    mean = {kind: sum(each[kind] for each in workers) / len(workers) / rounds for kind in KINDS} if workers else {}
    return (end - start) / rounds, {k: v / rounds for k, v in totals(server, start, end).items()}, mean


def table(wall: float, server: Seconds, worker: Seconds) -> Table:
    """Milliseconds of a round."""
    shown = Table(title="where a round's time went (ms)", title_justify="left")
    for column in ("", "server", "a worker"):
        shown.add_column(column, justify="left" if not column else "right")
    for kind in KINDS:
        shown.add_row(kind, *(f"{1000 * each[kind]:.2f}" if each else "–" for each in (server, worker)))
    shown.add_section()
    shown.add_row("sum", *(f"{1000 * sum(each.values()):.2f}" if each else "–" for each in (server, worker)))
    shown.add_row("wall", f"{1000 * wall:.2f}", f"{1000 * wall:.2f}")
    return shown


def chrome_trace(processes: Mapping[str, Sequence[Slice]]) -> bytes:
    """JSON in the Trace Event Format: a row a process, microseconds since the server's first slice."""
    origin = processes[SERVER][0][1]
    events: list[dict[str, object]] = []
    for row, (name, slices) in enumerate(processes.items()):
        events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": row, "args": {"name": name}})
        events += [
            {
                "ph": "X",
                "name": what,
                "pid": 1,
                "tid": row,
                "ts": round(1e6 * (since - origin), 1),
                "dur": round(1e6 * (until - since), 1),
            }
            for what, since, until in slices
        ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode()
