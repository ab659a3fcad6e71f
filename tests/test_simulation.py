"""The grid and its replies, the engine in this process, `simulate`, and the seeds."""

import gc
import os
import random
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import apps
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from hypothesis import assume, given
from hypothesis.strategies import integers, sampled_from, tuples

from fedwsa import seeding
from fedwsa.simulation import open_engine, simulate
from fedwsa.simulation.engine import perform, without

RAISED, UNAVAILABLE = 2, 3  # Flower's codes: a client app raised; there is no such message


def federate(main, train, num_clients=4, engine="inprocess", **run_config):
    """What `main(grid)` returns in a federation whose clients answer by `train(message, context)`."""
    server, client, results = ServerApp(), ClientApp(), []
    client.train()(train)
    server.main()(lambda grid, context: results.append(main(grid)))
    simulate(server, client, num_clients, engine=engine, run_config=run_config)
    return results[0]


def messages(grid, content=None, nodes=None):
    """One for each node (default: all of them), all with the same content."""
    content = RecordDict() if content is None else content
    return [Message(content, node, "train") for node in (grid.get_node_ids() if nodes is None else nodes)]


def config(**values):
    return RecordDict({"config": ConfigRecord(values)})


def reply(message, **values):
    return Message(config(**values), reply_to=message)


def value(message):
    return message.content["config"]["value"]


def name(message, context):
    """A client that says which it is."""
    return reply(message, value=context.node_config["partition-id"])


def remember(message, context):
    """A client that counts its messages."""
    seen = context.state["seen"]["count"] + 1 if "seen" in context.state else 1
    context.state["seen"] = ConfigRecord({"count": seen})
    return reply(message, value=seen)


class Scripted:
    """An engine with two workers that does the newest task first, writes down what it gets, and can be deaf."""

    workers, workers_elsewhere = 2, False

    def __init__(self, deaf_to=(), sleep=time.sleep):
        self.sleep = sleep
        self.deaf_to, self.tasks, self.submitted, self.cancelled = deaf_to, [], [], set()
        self.idle = []  # how many had been submitted whenever there was nothing to do

    def begin(self, population):
        self.population = population

    def submit(self, task):
        self.tasks.append(task)
        self.submitted.extend(job.partition_id for job in task.jobs)

    def collect(self, timeout):
        for task in reversed(self.tasks):
            if all(job.partition_id not in self.deaf_to for job in task.jobs):
                self.tasks.remove(task)
                return [perform(self.population, task)]
        assert timeout is not None, "would wait for ever"
        self.idle.append(len(self.submitted))
        self.sleep(timeout)
        return []

    def wake(self):
        pass

    def cancel(self, message_ids):
        self.cancelled |= message_ids
        self.tasks = [left for task in self.tasks if (left := without(task, message_ids)).jobs]

    def close(self):
        pass


ENGINES = ["inprocess", pytest.param("ray", marks=pytest.mark.process)]


@pytest.fixture(scope="module")
def engine(request):
    with open_engine(request.param, **({"workers": 2} if request.param == "ray" else {})) as opened:
        yield opened


# ---- nodes and messages


def test_every_client_is_a_node():
    def main(grid):
        assert [node.node_id for node in grid.get_nodes()] == list(grid.get_node_ids())
        return list(grid.get_node_ids())

    nodes = federate(main, name, num_clients=5)
    assert len(set(nodes)) == 5
    assert nodes == sorted(nodes)


def test_a_client_knows_who_it_is_and_what_the_run_is():
    def client(message, context):
        assert context.node_id == message.metadata.dst_node_id
        return reply(message, **context.node_config, **context.run_config)

    def main(grid):
        return [dict(answer.content["config"]) for answer in grid.send_and_receive(messages(grid))]

    told = federate(main, client, num_clients=3, rate=0.5, name="x")
    assert told == [{"partition-id": i, "num-partitions": 3, "rate": 0.5, "name": "x"} for i in range(3)]


def test_create_message_is_the_constructor():
    def main(grid):
        node = grid.get_node_ids()[1]
        message = grid.create_message(config(value=3), "train", node, "round-1", ttl=60.0)
        metadata = message.metadata
        assert (metadata.dst_node_id, metadata.message_type, metadata.group_id) == (node, "train", "round-1")
        assert metadata.ttl == 60.0
        assert value(message) == 3

    federate(main, name)


def test_a_reply_says_from_whom_and_to_what():
    def main(grid):
        sent = messages(grid) + messages(grid)
        replies = list(grid.send_and_receive(sent))
        ids = [message.metadata.message_id for message in sent]
        assert len({"", *ids}) == 9
        assert [answer.metadata.reply_to_message_id for answer in replies] == ids
        assert [answer.metadata.src_node_id for answer in replies] == grid.get_node_ids() * 2
        assert len({"", *ids, *(answer.metadata.message_id for answer in replies)}) == 17

    federate(main, name)


@pytest.mark.parametrize("node", [1, 999, 1004])
@pytest.mark.parametrize("way", ["push_messages", "send_and_receive"])
def test_an_unknown_node_is_an_error_and_nothing_is_sent(node, way):
    engine = Scripted()

    def main(grid):
        with pytest.raises(ValueError, match=f"node {node}: no such node"):
            getattr(grid, way)(messages(grid, nodes=[1000, node]))

    federate(main, name, engine=engine)
    assert engine.submitted == []


# ---- push and pull


def test_pull_gives_each_reply_once_and_then_an_error_as_for_an_unknown_message():
    def main(grid):
        ids = grid.push_messages(messages(grid))
        assert len(set(ids)) == 4
        assert [answer.metadata.reply_to_message_id for answer in grid.pull_messages(ids)] == ids
        again = grid.pull_messages([*ids, "message-of-nobody", ids[0]])
        assert [answer.metadata.reply_to_message_id for answer in again] == [*ids, "message-of-nobody"]
        assert {answer.error.code for answer in again} == {UNAVAILABLE}

    federate(main, name)


def test_pull_gives_only_what_it_was_asked_for():
    def main(grid):
        first, second = grid.push_messages(messages(grid, nodes=[1000, 1001]))
        (seconds,) = grid.pull_messages([second])
        (firsts,) = grid.pull_messages([first])
        return value(firsts), value(seconds)

    assert federate(main, name) == (0, 1)


# ---- whose is what


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_what_a_client_uses_again_for_its_next_reply_stays_in_the_one_before(engine):
    """Clients of one worker, of whose messages several travel together from the second round on."""

    def client(message, context):
        shared["config"]["value"] = context.node_config["partition-id"]
        return Message(shared, reply_to=message)

    shared = config(value=-1)

    def main(grid):
        return [[value(answer) for answer in grid.send_and_receive(messages(grid))] for _ in range(3)]

    assert federate(main, client, num_clients=20, engine=engine) == [list(range(20))] * 3


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_what_a_client_keeps_is_not_what_it_replied_with(engine):
    def client(message, context):
        if "config" not in context.state:
            context.state["config"] = ConfigRecord({"seen": [0]})
        return Message(RecordDict({"config": context.state["config"]}), reply_to=message)

    def main(grid):
        for answer in grid.send_and_receive(messages(grid)):
            answer.content["config"]["seen"].append(1)
        return [answer.content["config"]["seen"] for answer in grid.send_and_receive(messages(grid))]

    assert federate(main, client, engine=engine) == [[0]] * 4


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_threads_that_a_client_takes_are_not_the_next_ones(engine):
    def client(message, context):
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        return reply(message, value=before)

    def main(grid):
        return [value(answer) for _ in range(3) for answer in grid.send_and_receive(messages(grid))]

    assert federate(main, client, num_clients=20, engine=engine) == [1] * 60


def test_an_interrupted_client_is_asked_again():
    """Ctrl-C that the ServerApp catches, for one."""
    raised = []

    def client(message, context):
        if not raised:
            raised.append(1)
            raise KeyboardInterrupt
        return name(message, context)

    def main(grid):
        replies = grid.send_and_receive(messages(grid))
        with pytest.raises(KeyboardInterrupt):
            list(replies)
        return [value(answer) for answer in grid.send_and_receive(messages(grid))]

    assert federate(main, client) == [0, 1, 2, 3]


@pytest.mark.parametrize("state", [None, {}, {"config": 1}])
def test_a_state_that_is_none_is_the_clients_error(state):
    def client(message, context):
        context.state = state
        return name(message, context)

    def main(grid):
        return [answer.error.code for answer in grid.send_and_receive(messages(grid))]

    assert federate(main, client) == [RAISED] * 4


# ---- send and receive


def test_replies_come_in_the_order_of_the_messages():
    def main(grid):
        nodes = grid.get_node_ids()
        random.Random(2).shuffle(nodes)
        return nodes, [1000 + value(answer) for answer in grid.send_and_receive(messages(grid, nodes=nodes))]

    engine = Scripted()
    nodes, answered = federate(main, name, num_clients=30, engine=engine)
    assert answered == nodes


def test_no_message_no_reply():
    assert list(federate(lambda grid: grid.send_and_receive([]), name)) == []


def test_replies_are_a_sequence():
    def main(grid):
        replies = grid.send_and_receive(messages(grid))
        assert replies
        assert value(replies[0]) == 0
        assert value(replies[-1]) == 3
        assert [value(answer) for answer in replies[1:3]] == [1, 2]
        assert len(replies) == 4
        assert [value(answer) for answer in replies] == [value(answer) for answer in replies] == [0, 1, 2, 3]
        assert replies
        assert replies[2] in replies
        with pytest.raises(IndexError):
            replies[4]
        assert len(grid.send_and_receive(messages(grid))) == 4
        assert not grid.send_and_receive([])

    federate(main, name)


def test_iterating_gives_a_reply_before_the_last_one_is_there():
    ran = []

    def client(message, context):
        ran.append(context.node_config["partition-id"])
        return reply(message, value=0)

    def main(grid):
        for position, _ in enumerate(grid.send_and_receive(messages(grid))):
            assert ran == list(range(position + 1))

    federate(main, client)


def test_stream_keeps_no_reply():
    def main(grid):
        replies = grid.send_and_receive(messages(grid))
        seen = []
        for each in replies.stream():
            seen.append(weakref.ref(each))
            del each
            gc.collect()
            assert sum(reference() is not None for reference in seen) <= 1
        assert len(seen) == 4
        assert len(replies) == 0
        assert not replies

    federate(main, name)


def test_a_stream_goes_on_after_other_messages():
    def main(grid):
        stream = grid.send_and_receive(messages(grid)).stream()
        first = [value(answer) for answer in islice(stream, 2)]
        grid.push_messages(messages(grid))
        return first + [value(answer) for answer in stream]

    assert federate(main, name) == [0, 1, 2, 3]


@pytest.mark.parametrize("look", [lambda replies: None, lambda replies: next(iter(replies)), bool])
def test_messages_reach_the_clients_though_nobody_looks_at_the_replies(look):
    """One batch before the next, and the last one before the run ends."""
    reached = []

    def client(message, context):
        reached.append((value(message), context.node_config["partition-id"]))
        return reply(message, value=0)

    def main(grid):
        look(grid.send_and_receive(messages(grid, config(value=1))))
        grid.push_messages([])
        assert reached == [(1, k) for k in range(12)]
        look(grid.send_and_receive(messages(grid, config(value=2))))
        look(grid.send_and_receive(messages(grid, config(value=3))))

    federate(main, client, num_clients=12)
    assert reached == [(number, k) for number in (1, 2, 3) for k in range(12)]


def test_replies_of_the_rounds_before_are_not_kept():
    def main(grid):
        first = weakref.ref(grid.send_and_receive(messages(grid))[0])
        second = grid.send_and_receive(messages(grid))
        gc.collect()
        assert first() is None
        assert len(second) == 4

    federate(main, name)


def test_the_engine_gets_what_keeps_it_busy():
    engine = Scripted()

    def main(grid):
        replies = grid.send_and_receive(messages(grid))
        assert engine.submitted == list(range(6))  # 3 × 2 workers
        for _ in replies:
            assert len(engine.tasks) <= 6
        assert sorted(engine.submitted) == list(range(30))

    federate(main, name, num_clients=30, engine=engine)


# ---- what does not come


class Clock:
    """Seconds pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("fedwsa.simulation.sending.time", clock)
    return clock


def test_after_the_timeout_the_missing_replies_are_given_up(clock):
    ran = []

    def client(message, context):
        ran.append(context.node_config["partition-id"])
        clock.now += message.content["config"]["seconds"]
        return name(message, context)

    def main(grid):
        replies = grid.send_and_receive(messages(grid, config(seconds=10.0)), timeout=25)
        assert [value(each) for each in replies] == [0, 1, 2]
        return [value(each) for each in grid.send_and_receive(messages(grid, config(seconds=1.0)), timeout=25)]

    assert federate(main, client, num_clients=20) == list(range(20))
    assert ran == [0, 1, 2, *range(20)]


def test_a_client_that_hangs_costs_only_its_own_reply(clock):
    engine = Scripted(deaf_to=[2], sleep=clock.sleep)

    def main(grid):
        sent = messages(grid)
        replies = grid.send_and_receive(sent, timeout=0.1)
        assert [value(answer) for answer in replies] == [k for k in range(200) if k != 2]
        assert sent[2].metadata.message_id in engine.cancelled
        assert engine.tasks == []

    federate(main, name, num_clients=200, engine=engine)
    # until half of the time is over few go ahead of the answer that is due, then all do
    assert engine.idle[0] < 50 < engine.idle[-1] == 200


def test_clients_that_hang_one_after_another_cost_only_their_own_replies(clock):
    engine = Scripted(deaf_to=[2, 150], sleep=clock.sleep)

    def main(grid):
        return [value(answer) for answer in grid.send_and_receive(messages(grid), timeout=0.1)]

    assert federate(main, name, num_clients=200, engine=engine) == [k for k in range(200) if k not in {2, 150}]


def test_a_message_whose_time_to_live_is_over_is_answered_by_an_error():
    """How Flower's older servers say `round_timeout`."""
    engine = Scripted(deaf_to=[1])

    def main(grid):
        sent = messages(grid)
        for message in sent:
            message.metadata.ttl = 0.2
        fine, late, *others = grid.send_and_receive(sent)
        assert [value(answer) for answer in (fine, *others)] == [0, 2, 3]
        assert (late.error.code, late.error.reason) == (UNAVAILABLE, "its time to live is over")
        assert late.metadata.reply_to_message_id == sent[1].metadata.message_id

    federate(main, name, engine=engine)


@pytest.mark.parametrize("timeout", [float("inf"), 1e12, None])
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_as_long_as_you_like(timeout, engine):
    def main(grid):
        with ThreadPoolExecutor(1) as pool:
            there = pool.submit(lambda: list(grid.send_and_receive(messages(grid), timeout=timeout))).result(60)
        return [value(answer) for answer in [*there, *grid.send_and_receive(messages(grid), timeout=timeout)]]

    assert federate(main, name, engine=engine) == [*range(4), *range(4)]


def test_nobody_uses_an_engine_after_the_end_of_his_simulation():
    """Else a thread left behind would take another's replies: replies kept and not looked at, for one."""
    kept = []

    def main(grid):
        kept.extend((grid, grid.send_and_receive(messages(grid))))
        raise LookupError

    engine = Scripted(deaf_to=range(4))
    with pytest.raises(LookupError):
        federate(main, name, engine=engine)
    grid, replies = kept
    submitted = list(engine.submitted)
    for use in (
        lambda: list(replies),
        lambda: grid.pull_messages(["message-1"]),
        lambda: grid.push_messages(messages(grid)),
        lambda: grid.send_and_receive(messages(grid)),
    ):
        with pytest.raises(RuntimeError, match="the simulation has ended"):
            use()
    assert engine.submitted == submitted


def test_messages_of_two_simulations_have_other_ids():
    def main(grid):
        sent = messages(grid)
        list(grid.send_and_receive(sent))
        return {message.metadata.message_id for message in sent}

    assert federate(main, name).isdisjoint(federate(main, name))


def test_a_client_gets_the_messages_of_one_call_in_their_order(monkeypatch):
    """What it keeps after the first is what the second finds, although with two workers the longest go first."""
    clock, order, engine = Clock(), [], Scripted()
    monkeypatch.setattr("fedwsa.simulation.engine.time", clock)
    server, client = ServerApp(), ClientApp()

    def answer(message, context):
        number, kind = context.node_config["partition-id"], message.metadata.message_type
        order.append((number, kind))
        clock.now += {"train": 1, "evaluate": 100}[kind] * (1 + number)
        return reply(message, value=0)

    client.train()(answer)
    client.evaluate()(answer)

    @server.main()
    def main(grid, context):
        for _ in range(3):
            order.clear()
            engine.submitted.clear()
            sent = [Message(RecordDict(), node, kind) for node in grid.get_node_ids() for kind in ("train", "evaluate")]
            assert len(grid.send_and_receive(sent)) == 8
            for node in range(4):
                assert [kind for number, kind in order if number == node] == ["train", "evaluate"]

    simulate(server, client, 4, engine=engine)
    assert engine.submitted[0] == 3


def test_what_the_server_does_before_and_between_replies_is_no_waiting(clock):
    def main(grid):
        replies = grid.send_and_receive(messages(grid), timeout=1)
        clock.now += 100
        for _ in range(12):
            next(replies.stream())
            clock.now += 100

    federate(main, name, num_clients=12)


def test_a_client_that_raises_gives_an_error_reply_with_its_traceback():
    def client(message, context):
        if context.node_config["partition-id"] == 1:
            raise KeyError("the-missing-thing")
        return name(message, context)

    def main(grid):
        first, second, third = grid.send_and_receive(messages(grid))
        assert (value(first), value(third)) == (0, 2)
        assert second.has_error()
        assert not second.has_content()
        assert second.error.code == RAISED
        assert "in client\n" in second.error.reason
        assert "KeyError: 'the-missing-thing'" in second.error.reason
        assert second.metadata.src_node_id == 1001

    federate(main, client, num_clients=3)


@pytest.mark.parametrize(
    ("client", "reason"),
    [
        (lambda message, context: None, "TypeError: the client app returned NoneType, not a Message"),
        (lambda message, context: message.content, "TypeError: the client app returned RecordDict, not a Message"),
        (lambda message, context: sys.exit(3), "SystemExit: 3"),
    ],
    ids=["none", "records", "exit"],
)
def test_a_client_without_an_answer_gives_an_error_reply(client, reason):
    def main(grid):
        (answer,) = grid.send_and_receive(messages(grid))
        return answer.error

    error = federate(main, client, num_clients=1)
    assert error.code == RAISED
    assert reason in error.reason


def test_a_message_type_that_the_app_does_not_know_gives_an_error_reply():
    def main(grid):
        (answer,) = grid.send_and_receive([Message(RecordDict(), 1000, "evaluate")])
        return answer.error

    error = federate(main, name)
    assert error.code == RAISED
    assert "No evaluate function registered" in error.reason


# ---- state


def test_a_client_finds_its_state_again():
    def main(grid):
        rounds = [[1000, 1001], [1001], [1001, 1002]]
        return [[value(answer) for answer in grid.send_and_receive(messages(grid, nodes=n))] for n in rounds]

    assert federate(main, remember) == [[1, 1], [2], [3, 1]]


def test_a_client_that_raises_keeps_the_state_that_it_had():
    def count(message, context):
        counter = context.state.config_records.get("counter", ConfigRecord({"count": 0, "calls": [0]}))
        context.state["counter"] = counter
        counter["count"] += 1
        counter["calls"].append(1)
        if message.content["config"]["fail"]:
            raise RuntimeError("half-way")
        return reply(message, value=counter["count"], calls=len(counter["calls"]))

    def main(grid):
        answers = []
        for fail in (True, False, True, True, False):
            answers += grid.send_and_receive(messages(grid, config(fail=fail)))
        return [(value(answer), answer.content["config"]["calls"]) for answer in answers if answer.has_content()]

    assert federate(main, count, num_clients=1) == [(1, 2), (2, 3)]


def test_a_client_can_empty_its_state():
    def client(message, context):
        before = sorted(context.state)
        if before:
            context.state = RecordDict()
        else:
            context.state["a"] = ConfigRecord()
        return reply(message, value=len(before))

    def main(grid):
        return [value(grid.send_and_receive(messages(grid))[0]) for _ in range(4)]

    assert federate(main, client, num_clients=1) == [0, 1, 0, 1]


@pytest.mark.parametrize("engine", ["inprocess", Scripted()], ids=["inprocess", "scripted"])
def test_a_client_gets_its_messages_one_after_another(engine):
    def main(grid):
        ids = [*grid.push_messages(messages(grid)), *grid.push_messages(messages(grid))]
        nodes = [*grid.get_node_ids(), 1000, 1000]
        direct = [value(answer) for answer in grid.send_and_receive(messages(grid, nodes=nodes))]
        pulled = {}
        while len(pulled) < len(ids):
            pulled.update({a.metadata.reply_to_message_id: value(a) for a in grid.pull_messages(ids)})
        return [pulled[key] for key in ids], direct

    assert federate(main, remember, num_clients=2, engine=engine) == ([1, 1, 2, 2], [3, 3, 4, 5])


def test_giving_a_message_up_leaves_the_one_before_to_the_same_client_alone():
    engine = Scripted(deaf_to=[0])

    def main(grid):
        ids = grid.push_messages(messages(grid, nodes=[1000]))
        assert len(grid.send_and_receive(messages(grid, nodes=[1000, 1000]), timeout=0.05)) == 0
        engine.deaf_to = []
        return [value(each) for each in grid.pull_messages(ids)]

    assert federate(main, remember, engine=engine) == [1]
    assert engine.submitted == [0]


def test_a_message_behind_one_given_up_still_goes_out():
    engine = Scripted(deaf_to=[0])

    def main(grid):
        replies = grid.send_and_receive(messages(grid, nodes=[1000, 1000]), timeout=0.05)
        (late,) = grid.push_messages(messages(grid, nodes=[1000]))  # gives up the two before
        engine.deaf_to = []
        (answer,) = grid.pull_messages([late])
        return len(replies), value(answer)

    assert federate(main, remember, engine=engine) == (0, 1)
    assert engine.submitted == [0, 0]


# ---- nobody's changes reach anybody else


def untouched():
    return RecordDict(
        {
            "arrays": ArrayRecord({"weight": Array(np.zeros(2)), "bias": Array(np.ones(1))}),
            "config": ConfigRecord({"rate": 0.5, "sizes": [1, 2]}),
        }
    )


def spoil(content):
    content["arrays"]["weight"].data = Array(np.full(2, 9.0)).data
    content["arrays"]["new"] = content["arrays"].pop("bias")
    content["config"]["rate"] = 9.0
    content["config"]["sizes"].append(9)
    content["more"] = ConfigRecord()


def equal(content, other):
    return content == other and content.object_id == other.object_id


def test_what_a_client_changes_in_its_message_reaches_nobody_else():
    def client(message, context):
        told = reply(message, value=equal(message.content, untouched()))
        spoil(message.content)
        return told

    def main(grid):
        content = untouched()
        assert all(value(answer) for answer in grid.send_and_receive(messages(grid, content)))
        assert equal(content, untouched())

    federate(main, client)


def test_what_the_server_changes_after_sending_reaches_no_client():
    def client(message, context):
        return reply(message, value=equal(message.content, untouched()))

    def main(grid):
        content = untouched()
        sent = messages(grid, content)
        replies = grid.send_and_receive(sent)
        spoil(content)
        sent[19].content = RecordDict()
        return [value(answer) for answer in replies]

    assert federate(main, client, num_clients=20) == [True] * 20


def test_what_the_server_changes_in_a_reply_does_not_reach_the_clients_state():
    def client(message, context):
        kept = context.state.setdefault("config", untouched()["config"])
        return Message(RecordDict({"config": kept}), reply_to=message)

    def main(grid):
        for _ in range(2):
            (answered,) = grid.send_and_receive(messages(grid))
            assert answered.content["config"] == untouched()["config"]
            answered.content["config"]["sizes"].append(9)

    federate(main, client, num_clients=1)


def test_one_message_can_be_sent_twice():
    def main(grid):
        (message,) = messages(grid, config(value=0), nodes=[1000])
        return [value(answer) for answer in grid.send_and_receive([message, message])]

    assert federate(main, remember) == [1, 2]


def test_what_the_server_changes_in_its_run_config_reaches_no_client():
    server, client, seen = ServerApp(), ClientApp(), []
    client.train()(lambda message, context: reply(message, value=context.run_config["rate"]))

    @server.main()
    def main(grid, context):
        context.run_config["rate"] = 9.0
        seen.extend(value(answer) for answer in grid.send_and_receive(messages(grid)))

    given = {"rate": 0.5}
    simulate(server, client, 2, engine="inprocess", run_config=given)
    assert seen == [0.5, 0.5]
    assert given == {"rate": 0.5}


# ---- simulate


@pytest.mark.parametrize("num_clients", [0, -1, float("nan")])
def test_there_must_be_clients(num_clients):
    with pytest.raises(ValueError, match=r"num_clients must be ≥ 1, got"):
        simulate(apps.server, apps.quickstart_client, num_clients, engine="inprocess")


def test_an_unknown_engine_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=r"engine = 'dask': allowed are inprocess, ray"):
        simulate(apps.server, apps.quickstart_client, 2, engine="dask")


@pytest.mark.parametrize("name", ["inprocess", "ray"])
@pytest.mark.parametrize(
    ("option", "value", "needed"),
    [
        ("workers", -1, "≥ 0"),
        ("workers", float("nan"), "≥ 0"),
        ("threads_per_client", 0, "≥ 1"),
        ("cpus_per_client", 0, "finite and > 0"),
        ("cpus_per_client", float("inf"), "finite and > 0"),
        ("gpus_per_client", -0.5, "finite and ≥ 0"),
        ("gpus_per_client", float("nan"), "finite and ≥ 0"),
    ],
)
def test_an_impossible_option_of_an_engine_is_said_at_once(monkeypatch, name, option, value, needed):
    monkeypatch.setitem(sys.modules, "fedwsa.simulation.ray_engine", None)  # it cannot be imported
    with (
        pytest.raises(ValueError, match=f"^{option} must be {needed}, got {value}$"),
        open_engine(name, **{option: value}),
    ):
        pass


def test_what_the_server_raises_is_raised_and_the_engine_closed(monkeypatch):
    closed = []
    monkeypatch.setattr("fedwsa.simulation.InProcessEngine.close", lambda engine: closed.append(engine))

    def main(grid):
        raise ZeroDivisionError("in the server")

    federate(lambda grid: None, name)
    assert len(closed) == 1
    with pytest.raises(ZeroDivisionError, match="in the server"):
        federate(main, name)
    assert len(closed) == 2


def test_a_run_gets_nothing_of_the_one_before_on_the_same_engine():
    ran = []

    def client(message, context):
        ran.append(value(message))
        return remember(message, context)

    def leave(grid):
        next(iter(grid.send_and_receive(messages(grid, config(value="old")))))
        raise ZeroDivisionError

    def main(grid):
        return [value(answer) for answer in grid.send_and_receive(messages(grid, config(value="new")))]

    with open_engine("inprocess") as engine:
        with pytest.raises(ZeroDivisionError):
            federate(leave, client, engine=engine)
        assert federate(main, client, engine=engine) == [1, 1, 1, 1]
        assert federate(main, client, engine=engine) == [1, 1, 1, 1]
    assert ran == ["old"] + ["new"] * 8


def test_an_engine_runs_one_simulation_at_a_time():
    """Another's clients would answer the first one's messages."""

    def main(grid):
        with pytest.raises(RuntimeError, match="this engine is running another simulation"):
            federate(lambda grid: None, name, engine=engine)
        return [value(answer) for answer in grid.send_and_receive(messages(grid))]

    with open_engine("inprocess") as engine:
        assert federate(main, name, engine=engine) == [0, 1, 2, 3]
        with pytest.raises(KeyError):
            federate(lambda grid: {}[0], name, engine=engine)
        assert federate(lambda grid: 7, name, engine=engine) == 7


def test_nothing_is_sent_after_the_end():
    """A thread that a ServerApp has left behind must not send into the next simulation on the engine."""
    grid = federate(lambda grid: grid, name)
    for send in (grid.push_messages, grid.send_and_receive):
        with pytest.raises(RuntimeError, match="the simulation has ended"):
            send(messages(grid))


def test_clients_compute_with_their_number_of_threads_and_the_server_with_its_own():
    def main(grid):
        torch.set_num_threads(1)
        told = {value(answer) for answer in grid.send_and_receive(messages(grid))}
        return told, torch.get_num_threads()

    with open_engine("inprocess", threads_per_client=2) as engine:
        told = federate(main, lambda message, context: reply(message, value=torch.get_num_threads()), engine=engine)
    assert told == ({2}, 1)


def mean(values, weights):
    """Σ w v / Σ w over clients."""
    return sum(w * v for v, w in zip(values, weights, strict=True)) / sum(weights)


def test_flowers_fedavg_computes_what_it_should_over_the_quickstart_app():
    run = {"num-rounds": 3, "local-epochs": 2}
    state = simulate(apps.server, apps.quickstart_client, 4, engine="inprocess", run_config=run).state
    sizes, weights = [len(apps.samples(k)[0]) for k in range(4)], np.zeros(apps.FEATURES)
    for _ in range(3):
        twice = [apps.descend(apps.descend(weights, k, 0.05), k, 0.05) for k in range(4)]
        weights = mean(twice, sizes)
    np.testing.assert_allclose(state["arrays"].to_numpy_ndarrays()[0], weights, rtol=1e-12)
    losses = [np.mean((x @ weights - y) ** 2) for x, y in map(apps.samples, range(4))]
    assert state["evaluate"]["loss"] == pytest.approx(mean(losses, sizes), rel=1e-12)


def test_flowers_fedavg_computes_what_it_should_over_the_app_with_state():
    state = simulate(apps.server, apps.stateful_client, 4, engine="inprocess", run_config={"num-rounds": 3}).state
    sizes, weights, momenta = [len(apps.samples(k)[0]) for k in range(4)], np.zeros(apps.FEATURES), [0.0] * 4
    for _ in range(3):
        momenta = [0.5 * momenta[k] + apps.descend(weights, k, 0.05) - weights for k in range(4)]
        weights = weights + mean(momenta, sizes)
    np.testing.assert_allclose(state["arrays"].to_numpy_ndarrays()[0], weights, rtol=1e-12)
    assert state["train"]["rounds"] == pytest.approx(3)


def test_a_repeated_simulation_gives_the_same_bits():
    def weights():
        run = {"num-rounds": 2, "local-epochs": 1}
        return simulate(apps.server, apps.quickstart_client, 4, engine="inprocess", run_config=run).state["arrays"]

    assert weights().object_id == weights().object_id


# ---- seeds

arguments = tuples(integers(0, 2**32), sampled_from(seeding.PURPOSES), integers(0, 1000), integers(0, 1000))


@given(arguments)
def test_equal_arguments_give_equal_streams(given_arguments):
    first, second = (seeding.generator(*given_arguments) for _ in range(2))
    assert first.integers(2**63, size=4).tolist() == second.integers(2**63, size=4).tolist()
    first, second = (seeding.torch_generator(*given_arguments) for _ in range(2))
    assert torch.equal(torch.randn(4, generator=first), torch.randn(4, generator=second))
    assert 0 <= seeding.torch_seed(*given_arguments) < 2**63
    assert seeding.torch_seed(*given_arguments) == seeding.generator(*given_arguments).integers(2**63)


@given(arguments, arguments, integers(0, 3))
def test_each_argument_changes_the_stream(some, others, position):
    assume(some[position] != others[position])
    changed = (*some[:position], others[position], *some[position + 1 :])
    draws = [seeding.generator(*a).integers(2**63, size=4).tolist() for a in (some, changed)]
    assert draws[0] != draws[1]
    assert seeding.torch_seed(*some) != seeding.torch_seed(*changed)
    draws = [torch.randn(4, generator=seeding.torch_generator(*a)).tolist() for a in (some, changed)]
    assert draws[0] != draws[1]


def test_the_arguments_are_not_interchangeable():
    """Round 1 of client 2 is not round 2 of client 1."""
    assert len({seeding.torch_seed(*a) for a in [(1, "client", 2, 3), (2, "client", 1, 3), (1, "client", 3, 2)]}) == 3
    with pytest.raises(ValueError, match="not in tuple"):
        seeding.generator(0, "no such purpose")


def test_streams_do_not_depend_on_the_global_generators():
    before = seeding.torch_seed(1, "client", 2, 3)
    np.random.seed(os.getpid())
    torch.manual_seed(os.getpid())
    assert seeding.torch_seed(1, "client", 2, 3) == before
