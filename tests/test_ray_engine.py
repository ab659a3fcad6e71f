"""The engine on Ray's actors: the same bits as in one process, whatever dies on the way."""

import gc
import os
import random
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import Pipe
from pathlib import Path

import apps
import numpy as np
import pytest
import ray
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from ray import cloudpickle

from fedwsa import tracing
from fedwsa.arrays import NumpyArray
from fedwsa.simulation import open_engine, simulate
from fedwsa.simulation.engine import Population, snapshot
from fedwsa.simulation.lending import LENT_BYTES, Expected, Pool
from fedwsa.simulation.links import Recent
from fedwsa.simulation.schedule import Durations
from fedwsa.simulation.shared_memory import ServerEnd, WorkerEnd
from fedwsa.simulation.worker import Packed, Worker

pytestmark = [pytest.mark.process, pytest.mark.timeout(60)]

LOAD, RAISED, CRASHED = 1, 2, 8  # Flower's error codes
CLIENTS = 7
APPS = {"quickstart": apps.quickstart_client, "stateful": apps.stateful_client}


def bits(app, engine):
    """Everything that a simulation of one of the apps ends with, as one hash."""
    run = {"num-rounds": 3, "local-epochs": 2}
    return simulate(apps.server, app, CLIENTS, engine=engine, run_config=run).state.object_id


def descend(grid):
    """The quickstart app by hand, in the order of the clients; the model after each of three rounds."""
    weights, models = np.zeros(apps.FEATURES), []
    for _ in range(3):
        content = RecordDict({"arrays": ArrayRecord([weights]), "config": ConfigRecord({"lr": 0.05})})
        replies = grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()])
        weights = sum(each.content["arrays"].to_numpy_ndarrays()[0] for each in replies) / CLIENTS
        models.append(weights.tolist())
    return models


def federate(main, train, num_clients, engine, **run_config):
    """What `main(grid)` returns in a federation whose clients answer by `train(message, context)`."""
    server, client, results = ServerApp(), ClientApp(), []
    client.train()(train)
    server.main()(lambda grid, context: results.append(main(grid)))
    simulate(server, client, num_clients, engine=engine, run_config=run_config)
    return results[0]


def messages(grid, nodes=None, **values):
    content = RecordDict({"config": ConfigRecord(values)})
    return [Message(content, node, "train") for node in (grid.get_node_ids() if nodes is None else nodes)]


def reply(message, **values):
    return Message(RecordDict({"config": ConfigRecord(values)}), reply_to=message)


def values(replies, key="value"):
    return [each.content["config"][key] for each in replies]


def who(message, context):
    """A client that says which it is, in which process."""
    return reply(message, value=context.node_config["partition-id"], pid=os.getpid())


def write(path, text):
    """The whole text or no file."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.rename(path)


def wait_until(condition, seconds=20, pause=0.02):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(pause)
    return result


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # ended, and only waits for its parent


def descendants(pid):
    """Processes that this one started, and those that they started."""
    children = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, set()).add(int(entry.parent.name))
    found, left = set(), [pid]
    while left:
        new = children.get(left.pop(), set()) - found
        found |= new
        left += new
    return found


@dataclass
class Alone:
    """What an engine with one worker left behind, from before its worker was up and from after."""

    here: set[int]
    models_here: list[list[float]]
    there: set[int]
    models_there: list[list[float]]
    bits: dict[str, str]
    after_a_death: set[int]
    processes: set[int]
    random_kept: bool = False  # through closing


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """`start_here`: the first messages are answered in this process, until the worker is there."""
    earlier = descendants(os.getpid())

    def main(grid):
        return set(values(grid.send_and_receive(messages(grid)), "pid"))

    server, died = os.getpid(), tmp_path_factory.mktemp("alone") / "died"

    def dies_once(message, context):
        if os.getpid() != server and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return reply(message, pid=os.getpid())

    def quickstart(engine):
        return federate(descend, apps.quickstart_train, CLIENTS, engine, **{"local-epochs": 2})

    with open_engine("ray", workers=1, start_here=True) as engine:
        assert engine.workers == 1
        left = Alone(
            here=federate(main, who, 2, engine),
            models_here=quickstart(engine),
            there=wait_until(lambda: federate(main, who, 2, engine) - {os.getpid()}, seconds=50, pause=0.2),
            models_there=quickstart(engine),
            bits={name: bits(app, engine) for name, app in APPS.items()},
            after_a_death=federate(main, dies_once, 1, engine),
            processes=descendants(os.getpid()) - earlier,
        )
        state = random.getstate()
    left.random_kept = random.getstate() == state
    return left


@pytest.fixture(scope="module")
def opened(alone):
    """An engine with two workers, and whether its start left the global `random` alone.

    The engine with one worker is closed by then: Ray is there once a process.
    """
    state = random.getstate()
    with open_engine("ray", workers=2) as engine:
        yield engine, random.getstate() == state


@pytest.fixture
def engine(opened):
    return opened[0]


# ---- the same results


@pytest.mark.parametrize("name", APPS)
def test_one_worker_gives_the_bits_of_this_process(alone, name):
    assert alone.bits[name] == bits(APPS[name], "inprocess")


@pytest.mark.parametrize("name", APPS)
def test_two_workers_give_the_bits_of_this_process(engine, name):
    assert bits(APPS[name], engine) == bits(APPS[name], "inprocess")


def test_start_here_begins_in_this_process_and_moves_to_the_worker(alone):
    assert alone.here == {os.getpid()}
    assert len(alone.there) == 1
    assert os.getpid() not in alone.there
    assert alone.models_here == alone.models_there


def test_a_client_whose_worker_died_does_not_come_into_this_process(alone):
    """It could kill it too."""
    assert alone.after_a_death
    assert os.getpid() not in alone.after_a_death


def test_closing_leaves_no_process_behind(alone):
    assert len(alone.processes) >= 3  # Ray's own, and the worker
    wait_until(lambda: not any(map(is_running, alone.processes)), seconds=10)


def test_ray_draws_nothing_from_the_global_random(alone, opened):
    """From which Flower's strategies draw their cohorts."""
    assert opened[1]
    assert alone.random_kept


def test_replies_come_in_the_order_of_the_messages_though_the_first_takes_longest(engine):
    def client(message, context):
        time.sleep(0.3 if context.node_config["partition-id"] == 0 else 0.0)
        return who(message, context)

    def main(grid):
        replies = list(grid.send_and_receive(messages(grid)))
        return values(replies), len(set(values(replies, "pid")))

    assert federate(main, client, 12, engine) == (list(range(12)), 2)


def test_pull_does_not_wait_for_a_client(engine):
    def client(message, context):
        time.sleep(1.0)
        return who(message, context)

    def main(grid):
        ids = grid.push_messages(messages(grid))
        start = time.monotonic()
        assert grid.pull_messages(ids) == []
        assert time.monotonic() - start < 0.5
        return values(wait_until(lambda: grid.pull_messages(ids)))

    assert federate(main, client, 1, engine) == [0]


def test_a_worker_keeps_the_memory_that_a_client_frees_for_the_next(engine):
    """To give it back and to get it anew is a page fault each 4 KiB."""

    def train(message, context):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        kept = [np.ones(100_000) for _ in range(16)]
        del kept
        return reply(message, value=resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, pid=os.getpid())

    def main(grid):
        return [each.content["config"] for _ in range(3) for each in grid.send_and_receive(messages(grid))]

    by_worker = {}
    for told in federate(main, train, 8, engine):
        by_worker.setdefault(told["pid"], []).append(told["value"])
    for faults in by_worker.values():
        assert max(faults[2:]) < 1000, "of 3,125 pages"


def test_a_worker_s_garbage_collector_looks_at_what_was_imported_no_more(engine):
    """A full pass over PyTorch's modules takes 0.1 s, in the middle of a round."""

    def train(message, context):
        return reply(message, value=len(gc.get_objects()), frozen=gc.get_freeze_count(), pid=os.getpid())

    def main(grid):
        return [each.content["config"] for _ in range(3) for each in grid.send_and_receive(messages(grid))]

    last = {told["pid"]: told for told in federate(main, train, 8, engine)}
    for told in last.values():
        assert told["frozen"] > 10 * told["value"]


def test_a_message_arrives_as_it_was_sent(engine):
    def client(message, context):
        content = message.content
        numbers = content["arrays"]["ours"].numpy()
        numbers += 1  # a copy, whatever memory the message lies in
        told = "|".join([*content, *content["arrays"], str(content["config"]), str(content["metrics"])])
        sums = [float(array.numpy().sum()) for array in content["arrays"].values()]
        return reply(
            message, value=told, sums=sums, object=content["arrays"].object_id, group=message.metadata.group_id
        )

    def main(grid):
        arrays = ArrayRecord({"flowers": Array(np.arange(5.0))})
        arrays["ours"] = NumpyArray(np.full((300, 300), 2.0))
        content = RecordDict({"config": ConfigRecord({"rate": 0.5, "sizes": [1, 2]}), "arrays": arrays})
        content["metrics"] = apps.MetricRecord({"loss": 0.25})
        sent = [Message(content, node, "train", group_id="g") for node in grid.get_node_ids()]
        return [dict(each.content["config"]) for each in grid.send_and_receive(sent)], arrays.object_id

    (expected, _), (told, object_id) = (federate(main, client, 6, where) for where in ("inprocess", engine))
    assert told == expected
    assert {each["object"] for each in told} == {object_id}
    assert told[0]["sums"] == [10.0, 180_000.0]


@pytest.mark.parametrize("size", [1, 5000], ids=["small", "large"])
def test_a_message_may_carry_many_array_records(engine, size):
    def client(message, context):
        sums = [float(array.numpy().sum()) for record in message.content.values() for array in record.values()]
        return reply(message, value=sums)

    def main(grid):
        content = RecordDict({str(k): ArrayRecord([np.full(size, float(k))]) for k in range(20)})
        return values(grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()]))

    assert federate(main, client, 4, engine) == [[float(size * k) for k in range(20)]] * 4


def test_what_a_client_changes_in_its_message_reaches_nobody_else(engine):
    def client(message, context):
        arrays = message.content["arrays"]
        told = reply(message, value=message.content.object_id)
        for array in arrays.values():
            array.data = Array(np.ones(1)).data
        arrays["new"] = arrays.pop("ours")
        message.content["config"]["sizes"].append(3)
        return told

    def main(grid):
        arrays = ArrayRecord({"flowers": Array(np.arange(5000.0))})
        arrays["ours"] = NumpyArray(np.arange(5000.0))
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"sizes": [1, 2]})})
        sent = [Message(content, node, "train") for node in grid.get_node_ids()]
        return set(values(grid.send_and_receive(sent))), content.object_id

    told, object_id = federate(main, client, 8, engine)
    assert told == {object_id}


def test_replies_that_the_server_keeps_stay_as_they_came(engine):
    """They lie in memory that is lent for the next ones when nobody looks at these any more."""

    def client(message, context):
        arrays = ArrayRecord()
        number = message.content["config"]["number"] + context.node_config["partition-id"]
        arrays["weight"] = NumpyArray(np.full(5000, float(number)))
        return Message(RecordDict({"arrays": arrays}), reply_to=message)

    def main(grid):
        kept = [each for n in (0, 100, 200) for each in grid.send_and_receive(messages(grid, number=n))]
        return [set(each.content["arrays"]["weight"].numpy().tolist()) for each in kept]

    assert federate(main, client, 20, engine) == [{n + k} for n in (0.0, 100.0, 200.0) for k in range(20)]


def test_each_round_brings_the_model_of_that_round(engine):
    """Whether the ServerApp makes a new record, puts a new array into it, new bytes, or another name."""

    def client(message, context):
        ((name, array),) = message.content["arrays"].items()
        return reply(message, value=f"{name} {array.numpy()[0]}")

    def main(grid):
        arrays = ArrayRecord({"a": Array(np.zeros(1))})
        content, told = RecordDict({"arrays": arrays}), []

        def round_of_two():
            told.append(values(grid.send_and_receive([Message(content, node, "train") for node in (1000, 1001)])))

        round_of_two()
        arrays["a"].data = Array(np.ones(1)).data
        round_of_two()
        arrays["a"] = NumpyArray(np.full(1, 2.0))
        round_of_two()
        arrays["a"].data = Array(np.full(1, 3.0)).data
        round_of_two()
        arrays["b"] = arrays.pop("a")
        round_of_two()
        content["arrays"] = ArrayRecord([np.full(1, 4.0)])
        round_of_two()
        return told

    expected = [[text] * 2 for text in ("a 0.0", "a 1.0", "a 2.0", "a 3.0", "b 3.0", "0 4.0")]
    assert federate(main, client, 2, engine) == expected


def test_state_goes_with_the_client_from_worker_to_worker(engine):
    def client(message, context):
        seen = [*context.state["seen"]["pids"], os.getpid()] if "seen" in context.state else [os.getpid()]
        context.state["seen"] = ConfigRecord({"pids": seen})
        return reply(message, value=seen)

    def main(grid):
        grid.send_and_receive(messages(grid, nodes=[1000]))
        (_, other) = grid.send_and_receive(messages(grid, nodes=[1001, 1000]))
        return values([other])[0]

    pids = federate(main, client, 2, engine)
    assert len(pids) == len(set(pids)) == 2


def test_a_client_gets_its_messages_one_after_another(engine):
    def client(message, context):
        seen = context.state["seen"]["count"] + 1 if "seen" in context.state else 1
        context.state["seen"] = ConfigRecord({"count": seen})
        return reply(message, value=seen)

    def main(grid):
        return values(grid.send_and_receive(messages(grid, nodes=[1000, 1000, 1001, 1000])))

    assert federate(main, client, 2, engine) == [1, 2, 1, 3]


def test_workers_say_what_they_did_as_long_as_somebody_asks(engine, monkeypatch):
    told = []
    monkeypatch.setattr(tracing, "keep", lambda worker, slices: told.append((worker, slices)))

    def client(message, context):
        time.sleep(0.02)
        return who(message, context)

    def main(grid):
        return len(grid.send_and_receive(messages(grid)))

    start = time.perf_counter()
    tracing.start()
    try:
        assert federate(main, client, 12, engine) == 12
    finally:
        tracing.stop()
    end = time.perf_counter()
    by_worker = {}
    for worker, slices in told:
        by_worker.setdefault(worker, []).extend(slices)
    assert len(by_worker) == 2
    for slices in by_worker.values():
        assert {what for what, _, _ in slices} == {"wait", "transfer", "train"}
        assert start <= slices[0][1]
        assert slices[-1][2] <= end
        assert all(0 <= later[1] - earlier[2] < 0.1 for earlier, later in pairwise(slices))
    trained = sum(until - since for slices in by_worker.values() for what, since, until in slices if what == "train")
    assert 12 * 0.02 <= trained <= 2 * (end - start)

    told.clear()
    assert federate(main, client, 4, engine) == 4
    assert [slices for _, slices in told] == [[]] * 4


# ---- what goes wrong in a client


def test_a_client_that_raises_gives_an_error_reply_with_its_traceback(engine):
    def client(message, context):
        if context.node_config["partition-id"] == 1:
            raise KeyError("the-missing-thing")
        if context.node_config["partition-id"] == 2:
            sys.exit(3)
        return who(message, context)

    def main(grid):
        fine, raised, left = grid.send_and_receive(messages(grid))
        assert values([fine]) == [0]
        assert (raised.error.code, left.error.code) == (RAISED, RAISED)
        assert "in client\n" in raised.error.reason
        assert "KeyError: 'the-missing-thing'" in raised.error.reason
        assert "SystemExit: 3" in left.error.reason
        assert left.metadata.src_node_id == 1002

    federate(main, client, 3, engine)


def test_an_app_that_cannot_be_sent_is_an_error_that_says_so(engine):
    lock = threading.Lock()

    def client(message, context):
        with lock:
            return who(message, context)

    def main(grid):
        return values(grid.send_and_receive(messages(grid)))

    with pytest.raises(ValueError, match=r"the client app cannot be sent to the workers: .*lock"):
        federate(main, client, 2, engine)
    assert federate(main, who, 2, engine) == [0, 1]


class Unloadable:
    """Goes out and does not come in."""

    def __reduce__(self):
        return refuse, ()


def refuse():
    raise ImportError("there is no such module here")


def test_an_app_that_a_worker_cannot_load_gives_error_replies(engine):
    thing = Unloadable()

    def main(grid):
        return [(each.error.code, each.error.reason) for each in grid.send_and_receive(messages(grid))]

    for code, reason in federate(main, lambda message, context: thing, 2, engine):
        assert code == LOAD
        assert "ImportError: there is no such module here" in reason


# ---- what dies


def test_a_worker_killed_while_it_computes_costs_nothing(engine, tmp_path):
    running = tmp_path / "running"

    def client(message, context):
        if context.node_config["partition-id"] == 1 and not running.exists():
            write(running, str(os.getpid()))
            time.sleep(600)
        seen = context.state["seen"]["count"] + 1 if "seen" in context.state else 1
        context.state["seen"] = ConfigRecord({"count": seen})
        rng = np.random.default_rng([context.node_config["partition-id"], seen])
        return Message(RecordDict({"arrays": ArrayRecord([rng.normal(size=4)])}), reply_to=message)

    def main(grid, kill):
        replies = grid.send_and_receive(messages(grid))
        if kill:
            wait_until(running.exists)
            os.kill(int(running.read_text()), signal.SIGKILL)
        return [
            each.content.object_id for replies in (replies, grid.send_and_receive(messages(grid))) for each in replies
        ]

    disturbed = federate(partial(main, kill=True), client, 9, engine)
    assert len(set(disturbed)) == 18
    assert disturbed == federate(partial(main, kill=False), client, 9, "inprocess")


def test_a_client_that_always_kills_its_worker_fails_alone(engine, tmp_path):
    """A worker takes one message while it computes another: client 3 waits behind client 1, and is not to blame."""

    def client(message, context):
        attempts = tmp_path / str(context.node_config["partition-id"])
        with attempts.open("a") as file:
            file.write("x")
        if len(attempts.read_text()) < {1: 99, 3: 3}.get(context.node_config["partition-id"], 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return who(message, context)

    def main(grid):
        replies = list(grid.send_and_receive(messages(grid)))
        bad = replies.pop(1)
        assert bad.error.code == CRASHED
        assert "died 3 times" in bad.error.reason
        assert bad.metadata.src_node_id == 1001
        return values(replies)

    assert federate(main, client, 8, engine) == [0, 2, 3, 4, 5, 6, 7]
    assert [(tmp_path / name).read_text() for name in "13"] == ["xxx", "xxx"]


def test_a_client_that_hangs_past_the_timeout_is_given_up(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(Durations, "seconds", lambda *of: None)  # each travels alone: who travels with it is lost too
    hanging = tmp_path / "hanging"

    def client(message, context):
        if context.node_config["partition-id"] == 0 and message.content["config"]["hang"]:
            write(hanging, str(os.getpid()))
            time.sleep(600)
        return who(message, context)

    def main(grid):
        everybody = values(grid.send_and_receive(messages(grid, hang=False)))
        wait_until(lambda: engine._adopt() or all(actor.link for actor in engine._actors))  # also one of a test before
        some = values(grid.send_and_receive(messages(grid, hang=True), timeout=1))
        pid = int(hanging.read_text())
        wait_until(lambda: not is_running(pid))
        assert values(grid.send_and_receive(messages(grid, hang=False), timeout=50)) == everybody
        return some

    some = federate(main, client, 6, engine)
    assert len(some) >= 4  # the worker may have held one more message, behind the one that hangs
    assert set(some) <= {1, 2, 3, 4, 5}


def answers_by_id(grid, ids):
    return {answer.metadata.reply_to_message_id: answer for answer in grid.pull_messages(ids)}


def test_giving_a_message_up_leaves_the_others_of_its_worker_alone(engine):
    def client(message, context):
        time.sleep(1.0)
        return who(message, context)

    def main(grid):
        ids = set(grid.push_messages(messages(grid, nodes=[1000, 1001])))
        assert values(grid.send_and_receive(messages(grid, nodes=[1002]), timeout=0.3)) == []
        pulled = {}
        wait_until(lambda: pulled.update(answers_by_id(grid, ids - pulled.keys())) or len(pulled) == 2)
        return sorted(values(pulled.values()))

    assert federate(main, client, 3, engine) == [0, 1]


def test_a_run_gets_nothing_of_the_one_before_on_the_same_engine(engine):
    def client(message, context):
        time.sleep(message.content["config"]["seconds"])
        return reply(message, value=message.content["config"]["run"])

    def leave(grid):
        next(iter(grid.send_and_receive(messages(grid, run="old", seconds=0.2))))
        raise ZeroDivisionError

    def main(grid):
        return values(grid.send_and_receive(messages(grid, run="new", seconds=0.0)))

    with pytest.raises(ZeroDivisionError):
        federate(leave, client, 16, engine)
    assert federate(main, client, 16, engine) == ["new"] * 16


def test_a_ray_that_does_not_start_is_an_error_that_says_why(monkeypatch):
    def init(*args, **options):
        raise OSError("no room for the object store")

    ended = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray._private.worker, "_global_node", None)  # not that of the engine of other tests
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    with (
        pytest.raises(RuntimeError, match="Ray did not start: no room for the object store"),
        open_engine("ray", workers=1),
    ):
        pass
    assert ended


# ---- the connection to a worker, both ends in this process


def test_a_worker_that_cannot_send_its_answer_closes_the_connection():
    class Odd(Array):
        """A class that only this function knows."""

    worker, pool = Worker(threads=1), Pool()
    ours, worker.connection = Pipe()
    end = ServerEnd(ours, os.getpid(), pool)
    client = ClientApp()

    @client.train()
    def train(message, context):
        answer = reply(message, value=0)
        answer.content["odd"] = ArrayRecord()
        answer.content["odd"]["odd"] = Odd(np.zeros(1))
        return answer

    message = Message(RecordDict(), 1000, "train")
    end.send((cloudpickle.dumps(Population(client, 1, {})), [], False), {})
    end.send(Packed(None, [message.content], [(message.metadata, 0, 0, None, "")]), {}, Expected("one", 0))
    with pytest.raises(AttributeError, match="Can't pickle local object"):
        worker.serve()
    with pytest.raises(EOFError):
        end.receive()


def test_memory_lent_to_a_worker_that_was_given_up_is_not_lent_again():
    """It may be writing its answer there."""
    pool = Pool()

    def borrow():
        ours, theirs = Pipe()
        server, worker = ServerEnd(ours, os.getpid(), pool), WorkerEnd(theirs)
        server.send("a value", {}, Expected("large", 1 << 20))
        assert worker.receive() == ("a value", {})
        return server, worker.blocks[worker.block]

    server, given_up = borrow()
    server.close()
    _, other = borrow()
    given_up[:] = 7
    assert other.max() == 0


def test_blocks_fit_what_is_expected_or_what_came_before():
    pool = Pool()
    small, large = pool.borrow(Expected("small", 1 << 20)), pool.borrow(Expected("large", 1 << 24))
    assert [pool.blocks[number].size for number in (small, large)] == [1 << 20, 1 << 24]
    pool.give_back(large)
    pool.give_back(small)
    assert pool.borrow(Expected("small", 1 << 20)) == small
    assert pool.borrow(Expected("small", 1 << 20)) == large  # rather than a new one
    pool.give_back(small)
    pool.learn("small", 1 << 21)
    assert pool.blocks[pool.borrow(Expected("small", 1 << 20))].size == 1 << 21
    assert pool.borrow(Expected("none", 100)) is None  # it goes through the socket
    pool.learn("few", 100)  # a model went out, numbers came back
    assert pool.borrow(Expected("few", 1 << 24)) is None


def test_blocks_are_limited_and_answers_are_copied_where_they_are_used_up():
    pool, expected = Pool(least=1), Expected("half", LENT_BYTES // 2)
    first, second = pool.borrow(expected), pool.borrow(expected)
    assert pool.borrow(expected) is None
    kept = pool.take(first, 10)
    assert first in pool.free  # for the next one
    copied_from = pool.blocks[first].memory
    copied_from[:10] = 7
    assert kept.max() == 0
    assert pool.borrow(Expected("more", LENT_BYTES // 2 + 1)) is None
    pool.give_back(second)
    assert pool.borrow(Expected("all", LENT_BYTES)) is not None  # in place of the free ones
    assert len(pool.blocks) == 1
    assert pool.borrow(Expected("beyond", 2 * LENT_BYTES)) is None
    assert Pool(least=1).borrow(Expected("large", LENT_BYTES + 1)) is not None


def test_a_block_is_lent_again_when_nobody_looks_at_the_answer_any_more():
    pool = Pool()
    number = pool.borrow(Expected("answer", 1 << 20))
    view = pool.take(number, 10)[2:5]
    assert pool.free == []
    del view
    assert pool.free == [number]


def test_numbers_that_were_sent_a_moment_ago_are_not_prepared_again():
    record = ArrayRecord({"flowers": Array(np.zeros(3))})
    record["ours"] = NumpyArray(np.zeros(3))
    recent, made = Recent(), []
    for sent in (record, snapshot(record), snapshot(record)):
        assert recent.of(sent, lambda each: made.append(each) or len(made)) == 1
    record["ours"] = NumpyArray(np.zeros(3))
    assert recent.of(record, lambda each: 2) == 2
