"""A grid that several threads use, and pushed messages: clients go on while the ServerApp does something else."""

import queue
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp
from test_simulation import federate, messages, name, value

from fedwsa.simulation import open_engine, simulate
from fedwsa.simulation.engine import InProcessEngine
from fedwsa.simulation.turns import Turns

LIMIT = 60.0  # seconds for what takes a moment


@pytest.fixture(scope="module", params=["inprocess", pytest.param("ray", marks=pytest.mark.process)])
def engine(request):
    with open_engine(request.param, **({"workers": 2} if request.param == "ray" else {})) as opened:
        yield opened


# ---- Flower's older servers, which send each message from a thread of its own


class Adding(NumPyClient):
    """Adds its number to each weight, and has that many examples."""

    def __init__(self, number):
        self.number = number

    def fit(self, parameters, config):
        return [weights + self.number for weights in parameters], self.number, {}

    def evaluate(self, parameters, config):
        return float(parameters[0][0]), self.number, {}


class Watching(FedAvg):
    """Flower's older FedAvg, and what it got."""

    def __init__(self, clients):
        start = ndarrays_to_parameters([np.zeros(5000, np.float32), np.zeros((2, 3))])
        super().__init__(min_fit_clients=clients, min_available_clients=clients, initial_parameters=start)
        self.rounds = []

    def aggregate_fit(self, server_round, results, failures):
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        self.rounds.append((len(results), failures, parameters_to_ndarrays(parameters)))
        return parameters, metrics


def test_an_app_of_flowers_older_kind_trains(engine):
    clients = 12
    watching = Watching(clients)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        client = ClientApp(client_fn=lambda context: Adding(1 + context.node_config["partition-id"]).to_client())
        components = ServerAppComponents(strategy=watching, config=ServerConfig(num_rounds=3))
        simulate(ServerApp(server_fn=lambda context: components), client, clients, engine=engine)
    numbers = np.arange(1, clients + 1)
    step = (numbers * numbers).sum() / numbers.sum()
    assert [(results, failures) for results, failures, _ in watching.rounds] == [(clients, [])] * 3
    for server_round, (_, _, weights) in enumerate(watching.rounds, 1):
        np.testing.assert_allclose(weights[0], np.full(5000, server_round * step), rtol=1e-5)
        np.testing.assert_allclose(weights[1], np.full((2, 3), server_round * step), rtol=1e-5)


@pytest.mark.parametrize("array", [Array("bfloat16", (2,), "torch-bf16", b"abcd"), Array("", (), "bytes", b"xy")])
def test_arrays_whose_type_is_the_apps_own_affair_travel(array, engine):
    def echo(message, context):
        return Message(RecordDict({"back": message.content["there"]}), reply_to=message)

    def main(grid):
        content = RecordDict({"there": ArrayRecord({"w": array})})
        return [answer.content["back"]["w"] for answer in grid.send_and_receive(messages(grid, content))]

    assert federate(main, echo, engine=engine) == [array] * 4


def test_each_thread_gets_the_replies_to_its_own_messages(engine):
    def main(grid):
        def ask(node):
            return [value(answer) for answer in grid.send_and_receive(messages(grid, nodes=[node, 1000]))]

        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, node) for node in range(1001, 1020)]
            own = [value(answer) for answer in grid.send_and_receive(messages(grid))]
            return own, [each.result(LIMIT) for each in asked]

    own, others = federate(main, name, num_clients=20, engine=engine)
    assert own == list(range(20))
    assert others == [[node, 0] for node in range(1, 20)]


@pytest.mark.process
@pytest.mark.parametrize("engine", ["ray"], indirect=True)
def test_messages_may_be_made_by_what_waits_for_another_thread(engine):
    def main(grid):
        made = queue.SimpleQueue()

        def make():
            for answer in grid.send_and_receive(messages(grid, nodes=[1002])):
                made.put(messages(grid, nodes=[1000 + value(answer)])[0])
            made.put(None)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(make)
            ids = grid.push_messages(iter(lambda: made.get(timeout=LIMIT), None))
            return [value(answer) for answer in grid.send_and_receive(messages(grid, nodes=[1001]))], len(ids)

    assert federate(main, name, engine=engine) == ([1], 1)


@pytest.mark.process
@pytest.mark.parametrize("engine", ["ray"], indirect=True)
def test_a_thread_waits_no_longer_than_it_said(engine):
    def client(message, context):
        if context.node_config["partition-id"]:
            time.sleep(LIMIT)
        return name(message, context)

    def main(grid):
        with ThreadPoolExecutor(2) as pool:
            start = time.monotonic()
            hangs = pool.submit(lambda: list(grid.send_and_receive(messages(grid, nodes=[1000, 1001]), timeout=3)))
            answers = [value(answer) for answer in hangs.result(LIMIT)]
            return answers, time.monotonic() - start, value(grid.send_and_receive(messages(grid, nodes=[1000]))[0])

    answers, seconds, again = federate(main, client, num_clients=2, engine=engine)
    assert answers == [0]
    assert 3 <= seconds < LIMIT / 2
    assert again == 0


@pytest.mark.process
@pytest.mark.parametrize("engine", ["ray"], indirect=True)
def test_a_thread_need_not_wait_for_what_the_servers_own_waits_for(engine, tmp_path):
    """The reply that the ServerApp waits for comes when another thread has had its own."""
    done = tmp_path / "done"

    def client(message, context):
        while context.node_config["partition-id"] and not done.exists():
            time.sleep(0.01)
        return name(message, context)

    def main(grid):
        def ask():
            waiting.wait(LIMIT)
            time.sleep(0.2)  # for the ServerApp to wait
            answers = [value(answer) for answer in grid.send_and_receive(messages(grid, nodes=[1000]), timeout=LIMIT)]
            pushed = grid.push_messages(messages(grid, nodes=[1000]))
            while not (pulled := grid.pull_messages(pushed)):
                time.sleep(0.01)
            done.touch()
            return answers + [value(answer) for answer in pulled]

        waiting = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask)
            replies = grid.send_and_receive(messages(grid, nodes=[1001]), timeout=LIMIT / 2)
            waiting.set()
            return [value(answer) for answer in replies], asked.result(LIMIT)

    assert federate(main, client, num_clients=2, engine=engine) == ([1], [0, 0])


# ---- push, and look later


@pytest.mark.process
@pytest.mark.parametrize("engine", ["ray"], indirect=True)
def test_pushed_messages_are_answered_though_nobody_pulls(engine, tmp_path):
    def client(message, context):
        (tmp_path / str(context.node_config["partition-id"])).touch()
        return name(message, context)

    def main(grid):
        ids = grid.push_messages(messages(grid))
        until = time.monotonic() + LIMIT
        while len(list(tmp_path.iterdir())) < 10 and time.monotonic() < until:
            time.sleep(0.01)
        answers = []
        while len(answers) < 10 and time.monotonic() < until:  # they are on their way
            answers += [value(answer) for answer in grid.pull_messages(ids) if answer.has_content()]
        return sorted(answers)

    assert federate(main, client, num_clients=10, engine=engine) == list(range(10))


def test_here_the_first_pull_runs_them():
    def main(grid):
        ids = grid.push_messages(messages(grid))
        return [value(answer) for answer in grid.pull_messages(ids)]

    assert federate(main, name, num_clients=10) == list(range(10))


def test_pushed_and_sent_messages_do_not_get_into_each_others_way(engine):
    def main(grid):
        ids, sums = [], 0
        for _ in range(5):
            ids += grid.push_messages(messages(grid))
            sums += sum(value(answer) for answer in grid.send_and_receive(messages(grid)))
        pulled, until = [], time.monotonic() + LIMIT
        while len(pulled) < len(ids) and time.monotonic() < until:
            pulled += [answer for answer in grid.pull_messages(ids) if answer.has_content()]
        return sums, sorted(value(answer) for answer in pulled)

    assert federate(main, name, engine=engine) == (5 * 6, sorted([0, 1, 2, 3] * 5))


def test_a_run_that_leaves_pushed_messages_behind_ends_and_so_does_its_feeder(engine):
    for _ in range(3):
        federate(lambda grid: grid.push_messages(messages(grid)), name, num_clients=30, engine=engine)
    assert not [thread for thread in threading.enumerate() if thread.name == "fedwsa-feeder"]
    assert federate(lambda grid: len(grid.send_and_receive(messages(grid))), name, engine=engine) == 4


# ---- turns


class Broken(InProcessEngine):
    """Fails while the feeder waits."""

    workers_elsewhere = True

    def collect(self, timeout):
        raise RuntimeError("the cluster is gone")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_the_feeder_meets_is_raised_to_who_waits(elsewhere):
    def main(grid):
        if elsewhere:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(lambda: grid.send_and_receive(messages(grid))).result(LIMIT)
        else:
            until = time.monotonic() + LIMIT
            while time.monotonic() < until:  # the first may be before the feeder has met it
                grid.push_messages(messages(grid))
                time.sleep(0.01)

    with pytest.raises(RuntimeError, match="the cluster is gone"):
        federate(main, name, engine=Broken())


def test_nobody_waits_for_a_feeder_that_has_ended():
    turns = Turns(lambda: time.sleep(0.01), lambda: True, lambda: None)
    turns.feed()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(turns.wait_for, lambda: False, None)
        turns.close()
        assert waiting.result(LIMIT) is None


def test_who_waits_at_its_turn_gives_way_and_has_it_again():
    turns, inside, woken = Turns(lambda: None, lambda: False, lambda: woken.set()), [], threading.Event()

    def other():
        with turns:
            inside.append("other")

    with turns, turns:
        thread = threading.Thread(target=other)

        def step():
            thread.start()
            assert woken.wait(LIMIT)
            inside.append("waited")

        turns.wait(step)
        inside.append("again")
    thread.join(LIMIT)
    assert inside == ["waited", "other", "again"]


def test_who_would_wait_gives_way_first_to_who_came_before():
    turns, inside, started = Turns(lambda: None, lambda: False, lambda: None), [], threading.Event()

    def other():
        started.set()
        with turns:
            inside.append("other")

    with turns:
        thread = threading.Thread(target=other)
        thread.start()
        assert started.wait(LIMIT)
        while not turns._wanting:
            time.sleep(0.001)
        turns.wait(lambda: inside.append("waited too long"))
    thread.join(LIMIT)
    assert inside == ["other"]


def test_what_another_thread_brings_about_is_seen_while_somebody_waits_at_its_turn():
    woken, ended, there = threading.Event(), threading.Event(), []
    turns = Turns(lambda: None, lambda: False, woken.set)
    with ThreadPoolExecutor(3) as pool:

        def wait_at_ones_turn():
            with turns:
                turns.wait(lambda: woken.wait(LIMIT))
                turns.wait(lambda: ended.wait(LIMIT))

        waiting = pool.submit(wait_at_ones_turn)
        while not turns._waiting:
            time.sleep(0.001)
        seen = pool.submit(turns.wait_for, lambda: bool(there), LIMIT / 2)
        while not turns._changed._waiters:
            time.sleep(0.001)
        start = time.monotonic()
        with turns:  # what wakes the one that waits, and has its notice of changes before there is any
            there.append(1)
        seen.result(LIMIT)
        assert time.monotonic() - start < LIMIT / 4
        ended.set()
        waiting.result(LIMIT)


def test_who_gives_way_is_not_kept_from_its_turn_for_ever():
    woken, stop = threading.Event(), threading.Event()
    turns = Turns(lambda: None, lambda: False, woken.set)

    def again_and_again():
        while not stop.is_set():
            with turns:
                pass

    def wait_often():
        with turns:
            for _ in range(50):
                turns.wait(lambda: woken.wait(0.001))

    with ThreadPoolExecutor(3) as pool:
        busy = [pool.submit(again_and_again) for _ in range(2)]
        try:
            pool.submit(wait_often).result(LIMIT / 2)
        finally:
            stop.set()
        assert [each.result(LIMIT) for each in busy] == [None, None]


def test_one_at_a_time_and_the_feeder_gives_way_at_once():
    inside, woken, worked = [], threading.Event(), [0] * 5

    def step():
        inside.append(1)
        woken.wait(LIMIT)
        woken.clear()
        inside.pop()

    turns = Turns(step, lambda: True, woken.set)
    turns.feed()

    def work(number):
        for _ in range(200):
            with turns, turns:
                assert not inside
                worked[number] += 1
        return True

    start = time.monotonic()
    with ThreadPoolExecutor(5) as pool:
        assert all(each.result(LIMIT) for each in [pool.submit(work, number) for number in range(5)])
    turns.close()
    assert worked == [200] * 5
    assert time.monotonic() - start < LIMIT / 2
