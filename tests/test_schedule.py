"""Who computes what when: sizes of units, what is known of the clients' times, and how long a round then takes."""

import math
from collections import deque
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from hypothesis import given
from hypothesis import strategies as st

from fedwsa.simulation import simulate
from fedwsa.simulation.engine import Answer, Outcome, Population, Task, identify, perform
from fedwsa.simulation.folding import BLOCK
from fedwsa.simulation.grid import SimulationGrid
from fedwsa.simulation.ray_engine import RayEngine, _Actor
from fedwsa.simulation.schedule import ENOUGH, SHARE, UNIT_SECONDS, Durations, units
from fedwsa.simulation.sending import FEED, HELD, Sending

TRAIN, EVALUATE = "train", "evaluate"

# ---- units

some_seconds = st.lists(
    st.one_of(st.none(), st.just(0.0), st.floats(1e-6, 2e-2), st.floats(1e-6, 10.0)), max_size=5 * BLOCK
)
equal_seconds = st.builds(lambda each, n: [each] * n, st.floats(1e-6, UNIT_SECONDS), st.integers(0, 5 * BLOCK))


@given(st.one_of(some_seconds, equal_seconds), st.integers(1, 8))
def test_units_fit_a_tree_and_are_short(seconds, workers):
    sizes = units(seconds, workers)
    assert sum(sizes) == len(seconds)
    position, left = 0, math.fsum(each for each in seconds if each is not None)
    for size in sizes:
        unit = seconds[position : position + size]
        assert size in {2**k for k in range(BLOCK.bit_length())}
        assert position % size == 0
        if size > 1:
            assert None not in unit
            assert math.fsum(unit) <= UNIT_SECONDS * (1 + 1e-9)
            assert math.fsum(unit) <= left / (SHARE * workers) * (1 + 1e-9) + 1e-12
        position += size
        left -= math.fsum(each for each in unit if each is not None)


@given(some_seconds, st.integers(1, 8))
def test_units_are_as_large_as_they_may_be(seconds, workers):
    """A unit with the next of its size would be too long, or does not fit."""
    position, left = 0, math.fsum(each for each in seconds if each is not None)
    for size in units(seconds, workers):
        larger = seconds[position : position + 2 * size]
        if 2 * size <= BLOCK and position % (2 * size) == 0 and len(larger) == 2 * size and None not in larger:
            assert math.fsum(larger) >= min(UNIT_SECONDS, left / (SHARE * workers)) * (1 - 1e-9) - 1e-12
        left -= math.fsum(each for each in seconds[position : position + size] if each is not None)
        position += size


def test_quick_clients_travel_together_and_unknown_ones_alone():
    assert units([1e-4] * 400, 2)[:4] == [BLOCK] * 4
    assert units([None] * 5, 2) == [1] * 5
    assert units([UNIT_SECONDS / 3] * 400, 2)[:3] == [2, 2, 2]
    assert units([], 2) == []


def test_units_become_small_towards_the_end():
    sizes = units([1e-4] * 64, 2)
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (BLOCK, 1)


# ---- what is known of the clients


def test_what_was_learnt_goes_over_sizes_and_those_over_nothing():
    blank, sized = Durations(), Durations([1, 2, 4])
    for durations in (blank, sized):
        assert durations.seconds(2, TRAIN) is None
        durations.learn(1, TRAIN, 3.0)
        assert durations.seconds(1, TRAIN) == 3.0
        assert durations.seconds(1, EVALUATE) is None
    assert blank.seconds(2, TRAIN) is None
    assert sized.seconds(2, TRAIN) == pytest.approx(6.0)  # 3 s for 2 samples
    sized.learn(0, TRAIN, 4.5)
    assert sized.seconds(2, TRAIN) == pytest.approx(10.0)  # 7.5 s for 3
    assert sized.seconds(1, TRAIN) == 3.0
    assert sized.seconds(0, EVALUATE) is None


def test_where_sizes_are_not_known_enough_others_stand_for_a_client():
    durations = Durations()
    for client in range(ENOUGH):
        assert durations.seconds(99, TRAIN) is None
        durations.learn(client, TRAIN, 1.0 + client)
    assert durations.seconds(99, TRAIN) == pytest.approx((ENOUGH + 1) / 2)
    assert durations.seconds(3, TRAIN) == 4.0
    assert durations.seconds(99, EVALUATE) is None


def test_a_client_without_samples_is_no_error():
    durations = Durations([0, 0])
    durations.learn(0, TRAIN, 1.0)
    assert durations.seconds(1, TRAIN) == 0.0


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20))
def test_newer_times_count_for_more(times):
    durations = Durations()
    for each in times:
        before = durations.seconds(0, TRAIN)
        durations.learn(0, TRAIN, each)
        low, high = sorted((each, each if before is None else before))
        assert low <= durations.seconds(0, TRAIN) <= high
    for _ in range(20):
        durations.learn(0, TRAIN, 7.0)
    assert durations.seconds(0, TRAIN) == pytest.approx(7.0, abs=1e-3)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20), st.booleans())
def test_clients_rank_by_their_sizes_before_and_after_a_time_is_known(sizes, one_is_known):
    durations = Durations(sizes)
    if one_is_known:
        durations.learn(0, TRAIN, 0.5 * max(1, sizes[0]))
    others = range(1, len(sizes)) if one_is_known else range(len(sizes))
    ranks = {client: durations.rank(client, TRAIN) for client in others}
    for one in others:
        for other in others:
            if sizes[one] < sizes[other]:
                assert ranks[one] < ranks[other]


def test_without_sizes_all_clients_rank_alike_and_unknown_ones_first():
    durations = Durations()
    assert durations.rank(0, TRAIN) == durations.rank(1, TRAIN)
    durations.learn(0, TRAIN, 1000.0)
    assert durations.rank(0, TRAIN) < durations.rank(1, TRAIN)


def replies_of(grid: SimulationGrid) -> list[Message]:
    content = RecordDict({"config": ConfigRecord()})
    return list(grid.send_and_receive([Message(content, node, TRAIN) for node in grid.get_node_ids()]))


class Dying:
    """An engine whose workers die over everything."""

    workers, workers_elsewhere = 2, False

    def __init__(self) -> None:
        self.tasks: deque[Task] = deque()

    def wake(self) -> None:
        pass

    def submit(self, task: Task) -> None:
        self.tasks.append(task)

    def collect(self, timeout: float | None) -> list[Outcome]:
        return [
            Outcome([Answer(job.message.metadata.message_id, Message(Error(8, "dead"), reply_to=job.message), None)])
            for job in self.tasks.popleft().jobs
        ]

    def cancel(self, message_ids: set[str]) -> None:
        pass


def test_a_client_that_was_given_up_is_not_taken_for_a_quick_one():
    """It would travel with others, whose worker it kills."""
    identify()
    grid = SimulationGrid(Dying(), 3)
    assert all(each.has_error() for each in replies_of(grid))
    assert [grid.durations.seconds(client, TRAIN) for client in range(3)] == [None] * 3


# ---- the order in which messages go out


class Newest:
    """Two workers; the newest task is done first, and what was submitted is written down."""

    workers, workers_elsewhere = 2, False

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.submitted: list[list[int]] = []

    def wake(self) -> None:
        pass

    def begin(self, population: Population) -> None:
        self.population = population

    def submit(self, task: Task) -> None:
        self.tasks.append(task)
        self.submitted.append([job.partition_id for job in task.jobs])

    def collect(self, timeout: float | None) -> list[Outcome]:
        return [perform(self.population, self.tasks.pop())]

    def cancel(self, message_ids: set[str]) -> None:
        assert not message_ids

    def close(self) -> None:
        pass


def submitted(sizes: list[int] | None, num_clients: int, rounds: int = 1, seconds: Any = None) -> list[list[int]]:
    """Clients of each task of the last round, in the order in which the engine got them."""
    server, client, engine = ServerApp(), ClientApp(), Newest()
    client.train()(lambda message, context: Message(RecordDict(), reply_to=message))

    @server.main()
    def main(grid: SimulationGrid, context: Any) -> None:
        for _ in range(rounds):
            engine.submitted.clear()
            if seconds:
                for each in range(num_clients):
                    grid.durations.learn(each, TRAIN, seconds(each))
            assert len(replies_of(grid)) == num_clients

    simulate(server, client, num_clients, engine=engine, client_sizes=sizes)
    return engine.submitted


def test_the_first_round_begins_with_the_clients_that_hold_most():
    sizes = [2 ** (7 * k % 19) for k in range(19)]
    longest_first = sorted(range(19), key=lambda k: -sizes[k])
    assert submitted(sizes, 19) == [[k] for k in longest_first]


@given(st.lists(st.integers(1, 8), min_size=1, max_size=30))
def test_clients_of_one_size_go_in_their_order(sizes):
    order = list(chain(*submitted(sizes, len(sizes))))
    assert order == sorted(range(len(sizes)), key=lambda client: (-sizes[client], client))


def test_among_short_units_the_first_goes_first():
    """Else their answers would only wait."""
    tasks = submitted(None, 20, seconds=lambda client: 0.001 * (40 + client % 3))
    assert tasks == [[client] for client in range(20)]


def test_of_clients_of_whom_nothing_is_known_the_first_goes_first():
    assert submitted(None, 12) == [[k] for k in range(12)]


def test_a_slow_client_goes_before_units_of_quick_ones():
    tasks = submitted(None, 65, seconds=lambda client: 1.0 if client == 64 else 0.002)
    assert tasks[0] == [64]
    assert sorted(chain(*tasks)) == list(range(65))
    assert max(map(len, tasks)) == BLOCK


def test_a_long_client_goes_before_a_unit():
    tasks = submitted(None, 65, seconds=lambda client: 0.06 if client == 16 else 0.003)
    assert tasks[:2] == [[16], list(range(16))]


def test_to_one_worker_all_goes_in_order():
    """Nothing is to be gained there, and answers would wait."""
    with patch.object(Newest, "workers", 1):
        assert submitted([2**k for k in range(12)], 12) == [[k] for k in range(12)]


def test_at_the_limit_of_answers_that_wait_messages_go_in_order():
    """Large models: each worker may have two that wait."""
    with patch("fedwsa.simulation.sending.HELD_BYTES", 1):
        order = list(chain(*submitted([2**k for k in range(30)], 30)))
    by_size = FEED * 2 + HELD[0] * 2 - 1  # when the limit is reached, so many have gone
    assert order == [*range(29, 29 - by_size, -1), *range(30 - by_size)]


# ---- how long a round takes: real plans and Ray's dispatch on a clock that does not tick


@dataclass
class Going:
    """A task as the engine knows it, and what the clock knows."""

    seconds: float
    position: int
    size: int
    takes: float


@dataclass(eq=False)
class Part:
    """An answer: the fold of those to `size` messages from a position on."""

    position: int
    size: int

    def merge(self, later: "Part") -> None:
        assert (later.position, later.size) == (self.position + self.size, self.size)
        self.size *= 2


class Machines:
    """A carrier whose workers take exactly as long as they are said to take.

    at_once: tasks wait until a worker is free, as nothing real can have it; else `RayEngine` hands them out, which
    sends a worker its next task before it is done with one.
    slow: how much longer the first worker takes for everything than was known.
    """

    def __init__(
        self, seconds: list[float], workers: int, *, known: bool = True, at_once: bool = False, slow: float = 1.0
    ) -> None:
        self.workers, self.takes, self.at_once, self.slow = workers, seconds, at_once, slow
        self.durations = Durations()
        if known:
            for client, each in enumerate(seconds):
                self.durations.learn(client, TRAIN, each)
        self.now, self.begun = 0.0, [0.0] * workers
        self.waiting: WeakSet[Part] = WeakSet()
        self.most_waiting = 0
        self.engine = RayEngine.__new__(RayEngine)  # without Ray
        self.engine._queue = deque()
        link: Any = SimpleNamespace(send=lambda task, busy: True)
        self.actors = self.engine._actors = [_Actor(handle=None, link=link) for _ in range(workers)]

    def partition_of(self, message: Any) -> int:
        return message.metadata.dst_node_id

    def send(self, messages: list[Any], make: Any, sending: Sending, position: int) -> None:
        clients = [self.partition_of(message) for message in messages]
        known = sum(self.durations.seconds(client, TRAIN) or 0.0 for client in clients)
        going = Going(known, position, len(clients), sum(self.takes[client] for client in clients))
        self.engine._queue.append(SimpleNamespace(task=going, sending=sending))
        self._dispatch()

    def wait(self, timeout: float | None) -> None:
        takes = {k: actor.tasks[0].task.takes for k, actor in enumerate(self.actors) if actor.tasks}
        ends = [(self.begun[k] + seconds * (1.0 if k else self.slow), k) for k, seconds in takes.items()]
        self.now, first = min(ends)
        sent = self.actors[first].tasks.popleft()
        self.begun[first] = self.now
        part = Part(sent.task.position, sent.task.size)
        self.waiting.add(part)
        sent.sending.arrived(part.position, part.size, part)
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        self._dispatch()

    def give_up(self, message_ids: set[str]) -> None:
        pass

    def _dispatch(self) -> None:
        idle = [not actor.tasks for actor in self.actors]
        if self.at_once:
            for actor in self.actors:
                if not actor.tasks and self.engine._queue:
                    actor.tasks.append(self.engine._queue.popleft())
        else:
            self.engine._dispatch()
        for number, actor in enumerate(self.actors):
            if actor.tasks and idle[number]:
                self.begun[number] = self.now

    def round(self) -> "Machines":
        """Everybody once; the answers are taken in order, as they come."""
        messages: Any = [
            SimpleNamespace(metadata=SimpleNamespace(message_id=str(k), dst_node_id=k, message_type=TRAIN), content={})
            for k in range(len(self.takes))
        ]
        position = 0
        for size, part in Sending(self, messages, Part, None):  # type: ignore[arg-type]
            assert (part.position, part.size) == (position, size)
            position += size
            del part
        assert position == len(self.takes)
        return self


def unequal(seed: int, alpha: float, seconds: float, clients: int = 20) -> list[float]:
    """Seconds of each client, as a Dirichlet split with this α makes them; their sum is about `seconds`."""
    return (np.random.default_rng(seed).dirichlet([alpha] * clients) * seconds + 1e-6).tolist()


def least(seconds: list[float], workers: int) -> float:
    """No order takes less: one worker gets two of the workers + 1 longest."""
    longest = sorted(seconds, reverse=True)
    return max(sum(seconds) / workers, longest[0], longest[workers - 1] + longest[workers])


def excesses(alpha: float, total: float, workers: int, **how: Any) -> list[float]:
    """What rounds with cohorts of 20 take, over the least that is possible; sorted."""
    rounds = (unequal(seed, alpha, total) for seed in range(100))
    return sorted(Machines(each, workers, **how).round().now / least(each, workers) for each in rounds)


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("total", [2.0, 20.0])
def test_the_plan_wastes_little_of_a_round_whose_times_are_known(alpha, total, workers):
    found = excesses(alpha, total, workers, at_once=True)
    assert found[89] <= 1.1, "nine of ten rounds"
    assert found[-1] <= 4 / 3
    assert sum(found) / 100 <= 1.06


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0, 10.0])
def test_workers_waste_little_of_a_round_whose_times_are_known(alpha, workers):
    """No task waits at a worker that is busy for long."""
    found = excesses(alpha, 20.0, workers)
    assert found[89] <= 1.1, "nine of ten rounds"
    assert found[-1] <= 4 / 3
    assert sum(found) / 100 <= 1.06


@pytest.mark.parametrize(
    ("clients", "seconds", "slow", "spread", "most"),
    [(100, 0.002, 1.25, 0.2, 1.05), (100, 0.002, 1.0, 0.2, 1.03), (10, 0.01, 1.0, 0.5, 1.27)],
)
def test_workers_that_are_not_as_fast_as_was_known_are_not_left_with_the_last_tasks(
    clients, seconds, slow, spread, most
):
    """Four workers; most: mean of the round over what it takes where no worker ever waits."""
    found = []
    for seed in range(30):
        machines = Machines([seconds] * clients, 4, slow=slow)
        machines.takes = (seconds * np.exp(spread * np.random.default_rng(seed).standard_normal(clients))).tolist()
        found.append(machines.round().now / (sum(machines.takes) / (3 + 1 / slow)))
    assert np.mean(found) <= most


@pytest.mark.parametrize("workers", [2, 4])
def test_the_known_times_shorten_a_round(workers):
    """Else the tests above would not need the plan."""
    rounds = [unequal(seed, 0.3, 20.0) for seed in range(50)]
    by_knowledge = [
        sum(Machines(each, workers, known=known, at_once=True).round().now for each in rounds)
        for known in (False, True)
    ]
    assert by_knowledge[1] < 0.95 * by_knowledge[0]


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.sampled_from([0.05, 1.0]), st.booleans())
def test_every_answer_is_given_in_order_and_kept_by_nobody(seed, workers, alpha, known):
    machines = Machines(unequal(seed, alpha, 3.0, clients=60), workers, known=known).round()
    assert machines.now >= least(machines.takes, workers) * (1 - 1e-9)
    assert not machines.waiting


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("slow", [0, 7, 2000])
def test_the_answers_that_wait_their_turn_are_limited(slow, known, workers):
    """By their number for each worker, beside those that are at the engine, however long one client takes."""
    seconds = [1.0] * 3000
    seconds[slow] = 1200.0
    machines = Machines(seconds, workers, known=known).round()
    assert machines.most_waiting <= (HELD[1] + FEED) * workers
