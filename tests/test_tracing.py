"""Where time goes: slices follow one another, say what was innermost, and are kept only where somebody asked."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from hypothesis import given
from hypothesis import strategies as st

from fedwsa import tracing
from fedwsa.simulation import simulate
from fedwsa.simulation.engine import InProcessEngine, Outcome
from fedwsa.simulation.worker import Worker


class Clock:
    """Seconds pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _off_afterwards() -> Iterator[None]:
    yield
    tracing.stop()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("fedwsa.tracing.time", clock)
    return clock


# What a process may do, by hypothesis: a list is a span of what it contains, a number is seconds of work.
work = st.recursive(
    st.one_of(st.integers(1, 5), st.sampled_from(["take", "mark"])),
    lambda inner: st.tuples(st.sampled_from("abc"), st.lists(inner, max_size=4)),
    max_leaves=25,
)


@given(st.lists(work, max_size=8))
def test_at_each_moment_the_innermost_span_is_what_was_done(steps):
    clock, taken, marks = Clock(), [], []
    done: list[tuple[str, float]] = []  # each second, and what was done in it

    def do(step: Any, doing: str) -> None:
        if step == "take":
            taken.extend(tracing.take())
        elif step == "mark":
            tracing.mark("here")
            marks.append(clock.now)
        elif isinstance(step, int):
            done.extend((doing, clock.now + second) for second in range(step) if doing)
            clock.now += step
        else:
            what, inner = step
            with tracing.span(what):
                for each in inner:
                    do(each, what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedwsa.tracing.time", clock)
        tracing.start()
        for step in steps:
            do(step, "")
        taken += tracing.take()
        assert tracing.take() == []
    assert all(earlier[2] <= later[1] for earlier, later in pairwise(taken))
    assert [(what, since + k) for what, since, until in taken for k in range(int(until - since))] == done
    assert [since for what, since, _ in taken if what == "here"] == marks


def test_a_span_is_cut_by_those_inside_it(clock):
    tracing.start()
    clock.now += 1
    with tracing.span("outer"):
        clock.now += 2
        with tracing.span("inner"):
            clock.now += 3
        clock.now += 4
        assert tracing.take() == [("outer", 101.0, 103.0), ("inner", 103.0, 106.0), ("outer", 106.0, 110.0)]
        clock.now += 5
    clock.now += 6
    assert tracing.take() == [("outer", 110.0, 115.0)]


def test_what_is_raised_ends_a_span(clock):
    def fails() -> None:
        with tracing.span("inner"):
            clock.now += 1
            raise KeyError

    tracing.start()
    with tracing.span("outer"):
        with pytest.raises(KeyError):
            fails()
        clock.now += 2
    assert tracing.take() == [("outer", 100.0, 100.0), ("inner", 100.0, 101.0), ("outer", 101.0, 103.0)]


def test_nothing_is_kept_and_no_clock_is_read_unless_somebody_asked(monkeypatch):
    monkeypatch.setattr("fedwsa.tracing.time", None)
    assert not tracing.is_on()
    with tracing.span("outer"), tracing.span("inner"):
        tracing.mark("here")
        tracing.keep("a worker", [("train", 0.0, 1.0)])
    assert tracing.take() == []
    assert tracing.take_others() == {}


def test_it_may_begin_and_end_inside_a_span(clock):
    with tracing.span("before"):
        tracing.start()
        assert tracing.is_on()
        clock.now += 1
        with tracing.span("inside"):
            clock.now += 2
    assert tracing.take() == [("inside", 101.0, 103.0)]
    with tracing.span("outer"):
        tracing.stop()
        assert not tracing.is_on()
    assert tracing.take() == []
    tracing.start()
    assert tracing.take() == []


def test_a_new_start_forgets_what_was_kept(clock):
    tracing.start()
    tracing.keep("a worker", [("train", 0.0, 1.0)])
    with tracing.span("old"):
        clock.now += 1
        tracing.start()
        clock.now += 1
    assert tracing.take() == []
    assert tracing.take_others() == {}


def test_what_the_workers_say_is_kept_by_their_names():
    tracing.start()
    slices = [("train", float(k), k + 1.0) for k in range(3)]
    tracing.keep("one", slices[:2])
    tracing.keep("two", slices[:1])
    tracing.keep("one", slices[2:])
    tracing.keep("idle", [])
    assert tracing.take_others() == {"one": slices, "two": slices[:1]}
    assert tracing.take_others() == {}
    assert tracing.take() == []


class Telling(InProcessEngine):
    """Says with each outcome what its worker did."""

    def collect(self, timeout: float | None) -> list[Outcome]:
        outcomes = super().collect(timeout)
        for outcome in outcomes:
            outcome.worker, outcome.slices = "the worker", [("train", 1.0, 2.0)]
        return outcomes


@pytest.mark.parametrize("on", [True, False])
def test_a_simulation_keeps_what_its_processes_did(on):
    server, client = ServerApp(), ClientApp()
    client.train()(lambda message, context: Message(RecordDict(), reply_to=message))

    @server.main()
    def main(grid: Any, context: Any) -> None:
        assert len(grid.send_and_receive([Message(RecordDict(), node, "train") for node in grid.get_node_ids()])) == 3

    if on:
        tracing.start()
    simulate(server, client, 3, engine=Telling())
    kinds = [what for what, _, _ in tracing.take()]
    assert kinds.count("train") == (3 if on else 0)
    assert ("dispatch" in kinds) == on
    assert tracing.take_others() == ({"the worker": [("train", 1.0, 2.0)] * 3} if on else {})


def test_a_worker_keeps_slices_for_those_populations_that_want_them():
    """It outlives a run, and the next one may not want any."""
    worker = Worker(threads=1)
    for wanted in (True, False, True):
        worker.begin(b"", [], wanted)
        assert tracing.is_on() == wanted


def test_a_worker_goes_on_with_its_slices_in_the_next_federation(clock):
    """Between the two it waited, and that is told too."""
    worker = Worker(threads=1)
    worker.begin(b"", [], True)
    with tracing.span("wait"):
        clock.now += 1
    worker.begin(b"", [], True)
    assert tracing.take() == [("wait", 100.0, 101.0)]
