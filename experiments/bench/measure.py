"""One contestant: a program of this folder in a session of its own, timed from outside, with nothing left behind."""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 600.0  # seconds for one contestant
SHOWN_LINES = 5  # of standard error, where a contestant fails


class ContestantError(Exception):
    """A contestant that failed; the message has its last lines on standard error."""


@dataclass(frozen=True)
class Contestant:
    """`module` is run with workload, rounds and `argument`.

    stop_after: seconds after the end of round 1 at which it is stopped, whatever it has done by then; 0: never.
    limit: what the limit is that it says, if it says one.
    """

    name: str
    module: str
    workload: str
    rounds: int
    argument: str = ""
    stop_after: float = 0.0
    limit: str = ""

    def command(self) -> list[str]:
        """The command line."""
        program = [sys.executable, "-W", "ignore", "-m", f"experiments.bench.{self.module}"]
        return [*program, self.workload, str(self.rounds), *filter(None, [self.argument])]


@dataclass(frozen=True)
class Figure:
    """A number; `at_least` where it is a lower bound of one that was not waited for."""

    value: float
    at_least: bool = False


@dataclass(frozen=True)
class Measurement:
    """Seconds: from the start of the process to the end of round 1, of each round, and what these are compared with.

    unfinished: since the last round ended, where the contestant was stopped.
    """

    start: float
    laps: tuple[float, ...]
    unfinished: float | None = None
    limit: float | None = None

    @property
    def seconds(self) -> Figure | None:
        """The median round after the first; if there is none, what has passed of the second, or nothing."""
        if self.laps[1:]:
            return Figure(statistics.median(self.laps[1:]))
        return None if self.unfinished is None else Figure(self.unfinished, at_least=True)


def measure(contestant: Contestant) -> Measurement:
    """Run it to its end, or till it is stopped; ContestantError if it fails."""
    start = time.perf_counter()
    laps: list[float] = []
    limit, first, last = None, start, start
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            contestant.command(), stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        assert process.stdout is not None
        timers = [_kill_after(TIMEOUT, process.pid)]
        try:
            for line in process.stdout:
                word, _, value = line.partition(" ")
                if word == "lap":
                    laps.append(float(value))
                    last = time.perf_counter()
                    if len(laps) == 1:
                        first = last
                        timers += [_kill_after(contestant.stop_after, process.pid)] if contestant.stop_after else []
                elif word == "limit":
                    limit = float(value)
            status = process.wait()
        finally:
            for timer in timers:
                timer.cancel()
            kill_session(process.pid)
            process.wait()
            process.stdout.close()
        end = time.perf_counter()
        if len(laps) == contestant.rounds and status == 0:
            return Measurement(first - start, tuple(laps), None, limit)
        if laps and contestant.stop_after and end - first >= contestant.stop_after:
            return Measurement(first - start, tuple(laps), end - last, limit)
        errors.seek(0)
        tail = "\n".join(line.rstrip() for line in errors.readlines()[-SHOWN_LINES:])
    ended = f"exit status {status}" if end - start < TIMEOUT else f"not ready after {TIMEOUT:g} s"
    raise ContestantError(f"{ended}, {len(laps)} of {contestant.rounds} rounds\n{tail}")


def _kill_after(seconds: float, leader: int) -> threading.Timer:
    timer = threading.Timer(seconds, kill_session, (leader,))
    timer.start()
    return timer


def kill_session(leader: int) -> None:
    """Kill every process of a session, in whichever process group; returns when all are gone."""
    while pids := session(leader):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, leader_of_it = path.read_text().rpartition(")")[2].split()[:4]
            if int(leader_of_it) == leader and state not in "ZX":
                pids.append(int(path.parent.name))
    return pids
