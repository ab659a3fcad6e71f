"""One bad client neither ends nor poisons a run, whatever it replies and whichever strategy is behind the gate."""

import io
import random
import re
from collections.abc import Callable
from typing import Any

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
import torch
from federations import client_app, grid_of, holdout, lines, numbers, record, run, tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from fedwsa.errors import RunError
from strategies import FedAvg, NPMerge, WeightScopeAlignment
from strategies.gate import Gate, NoUsableReplyError

START = {"w": np.zeros((2, 2), np.float32), "b": np.zeros(3, np.float32), "steps": np.asarray(0)}
MODELS = [
    {"w": np.full((2, 2), value, np.float32), "b": np.arange(3, dtype=np.float32), "steps": np.asarray(value)}
    for value in (1, 100, 4)
]
WEIGHTS = (1, 50, 2)
MEAN_OF_THE_GOOD = {"w": [[3, 3], [3, 3]], "b": [0, 1, 2], "steps": 3}  # weights 1 and 2

Spoil = Callable[[Message], Message | None]


def federation(spoil: Spoil | None = None, bad: tuple[int, ...] = (1,)) -> ClientApp:
    """Three stock Flower clients; what the bad ones reply is spoiled."""
    app = ClientApp()

    def reply(message: Message, content: RecordDict, client: int) -> Message:
        given = Message(content, reply_to=message)
        return (spoil(given) or given) if spoil and client in bad else given

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": WEIGHTS[client], "loss": float(client)})
        return reply(message, RecordDict({"arrays": record(MODELS[client]), "metrics": metrics}), client)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": WEIGHTS[client], "loss": float(client), "accuracy": client / 2})
        return reply(message, RecordDict({"metrics": metrics}), client)

    return app


def ours() -> FedAvg:
    return FedAvg(3, seed=0, evaluation_cohort=3)


def aligned() -> WeightScopeAlignment:
    return WeightScopeAlignment(ours())


def wrapped_flower() -> WeightScopeAlignment:
    return WeightScopeAlignment(flower.FedAvg())


STRATEGIES = {"ours": ours, "flower's": flower.FedAvg, "aligned": aligned, "flower's, aligned": wrapped_flower}


def train(gate: Gate, app: ClientApp, server_round: int = 1) -> tuple[ArrayRecord | None, MetricRecord | None]:
    random.seed(0)
    grid = grid_of(app, 3)
    outgoing = gate.configure_train(server_round, record(START), ConfigRecord(), grid)
    return gate.aggregate_train(server_round, grid.send_and_receive(outgoing))


def evaluate(gate: Gate, app: ClientApp, server_round: int = 1) -> MetricRecord | None:
    grid = grid_of(app, 3)
    outgoing = gate.configure_evaluate(server_round, record(START), ConfigRecord(), grid)
    return gate.aggregate_evaluate(server_round, grid.send_and_receive(outgoing))


# ---- bad replies


def array(name: str, values: Any) -> Spoil:
    """Another array in the place of one."""

    def spoil(reply: Message) -> None:
        reply.content["arrays"][name] = values if isinstance(values, Array) else Array(np.asarray(values))

    return spoil


def metric(name: str, value: Any) -> Spoil:
    def spoil(reply: Message) -> None:
        reply.content["metrics"][name] = value

    return spoil


def without(record_name: str, name: str) -> Spoil:
    def spoil(reply: Message) -> None:
        del reply.content[record_name][name]

    return spoil


def content(change: Callable[[RecordDict], Any]) -> Spoil:
    def spoil(reply: Message) -> None:
        change(reply.content)

    return spoil


def to_another_round(reply: Message) -> None:
    reply.metadata.group_id = "7"


def failing(reply: Message) -> Message:
    raise RuntimeError("out of memory")


def pickled() -> Array:
    buffer = io.BytesIO()
    np.save(buffer, np.array([[print, 1], [2, 3]], dtype=object), allow_pickle=True)
    return Array(dtype="float32", shape=(2, 2), stype="numpy.ndarray", data=buffer.getvalue())


def truncated() -> Array:
    whole = Array(np.ones((2, 2), np.float32))
    return Array(dtype="float32", shape=(2, 2), stype="numpy.ndarray", data=whole.data[:-5])


def archive() -> Array:
    buffer = io.BytesIO()
    np.savez(buffer, np.ones((2, 2), np.float32))
    return Array(dtype="float32", shape=(2, 2), stype="numpy.ndarray", data=buffer.getvalue())


def claiming_another_shape() -> Array:
    one = Array(np.ones(1, np.float32))
    return Array(dtype="float32", shape=(2, 2), stype="numpy.ndarray", data=one.data)


def of_a_tensor() -> Array:
    buffer = io.BytesIO()
    torch.save(torch.ones(2, 2), buffer)
    return Array(dtype="float32", shape=(2, 2), stype="torch.Tensor", data=buffer.getvalue())


def reversed_arrays(content: RecordDict) -> None:
    content["arrays"] = ArrayRecord(dict(reversed(list(content["arrays"].items()))))


NOT_A_NUMBER = r"num-examples is .*, not a number in \(0, 1000000000\]"

OF_METRICS: dict[str, tuple[Spoil, str]] = {
    "error": (failing, "error 2: RuntimeError: out of memory"),
    "other round": (to_another_round, "answers round '7', not 1"),
    "no weight": (without("metrics", "num-examples"), NOT_A_NUMBER.replace(".*", "None")),
    "NaN weight": (metric("num-examples", float("nan")), NOT_A_NUMBER.replace(".*", "nan")),
    "infinite weight": (metric("num-examples", float("inf")), NOT_A_NUMBER.replace(".*", "inf")),
    "negative weight": (metric("num-examples", -1000), NOT_A_NUMBER.replace(".*", "-1000")),
    "huge weight": (metric("num-examples", 10**15), NOT_A_NUMBER.replace(".*", "10{15}")),
    "zero weight": (metric("num-examples", 0), NOT_A_NUMBER.replace(".*", "0")),
    "list of weights": (metric("num-examples", [1, 2]), NOT_A_NUMBER.replace(".*", r"\[1, 2\]")),
    "bool weight": (metric("num-examples", True), "error 2: TypeError: .*bool"),  # Flower's own record refuses it
    "NaN metric": (metric("loss", float("nan")), "metric 'loss' is not finite"),
    "infinite in a list": (metric("more", [1.0, -float("inf")]), "metric 'more' is not finite"),
    "no metrics": (content(lambda c: c.pop("metrics")), r"metric records are \[\], not \['metrics'\]"),
    "two metric records": (
        content(lambda c: c.update(more=MetricRecord({"num-examples": 1}))),
        r"metric records are \['metrics', 'more'\], not \['metrics'\]",
    ),
    "metrics elsewhere": (
        content(lambda c: c.update(others=c.pop("metrics"))),
        r"metric records are \['others'\], not \['metrics'\]",
    ),
}
OF_ARRAYS: dict[str, tuple[Spoil, str]] = {
    "NaN": (array("w", np.full((2, 2), np.nan, np.float32)), "w: not finite"),
    "one infinite": (array("b", np.float32([0, np.inf, 0])), "b: not finite"),
    "one number": (array("w", np.float32(9)), r"w: float32 \(\), sent was float32 \(2, 2\)"),
    "one number in a list": (array("w", np.float32([9])), r"w: float32 \(1,\), sent was float32 \(2, 2\)"),
    "wrong shape": (array("w", np.zeros((2, 3), np.float32)), r"w: float32 \(2, 3\), sent was float32 \(2, 2\)"),
    "transposed": (array("b", np.zeros((3, 1), np.float32)), r"b: float32 \(3, 1\), sent was float32 \(3,\)"),
    "integers": (array("w", np.zeros((2, 2), np.int64)), r"w: int64 \(2, 2\), sent was float32 \(2, 2\)"),
    "doubles": (array("w", np.zeros((2, 2))), r"w: float64 \(2, 2\), sent was float32 \(2, 2\)"),
    "other byte order": (array("w", np.zeros((2, 2), ">f4")), r"w: >f4 \(2, 2\), sent was float32 \(2, 2\)"),
    "texts": (array("w", np.full((2, 2), "x")), r"w: <U1 \(2, 2\), sent was float32 \(2, 2\)"),
    "float counter": (array("steps", np.asarray(9.0)), r"steps: float64 \(\), sent was int64 \(\)"),
    "pickle": (array("w", pickled()), "w: not a readable array .*allow_pickle=False"),
    "cut bytes": (array("w", truncated()), "w: not a readable array"),
    "archive": (array("w", archive()), r"w: not a readable array \(NpzFile\)"),
    "false shape": (array("w", claiming_another_shape()), r"w: float32 \(1,\), sent was float32 \(2, 2\)"),
    "other serialisation": (array("w", of_a_tensor()), "w: not a readable array"),
    "missing array": (without("arrays", "b"), r"array names differ: \['b'\]"),
    "one array more": (array("extra", [1.0]), r"array names differ: \['extra'\]"),
    "other order": (content(reversed_arrays), r"arrays are not in the order .*: \['steps', 'b', 'w'\]"),
    "no arrays": (content(lambda c: c.pop("arrays")), r"array records are \[\], not \['arrays'\]"),
    "two array records": (
        content(lambda c: c.update(more=record(START))),
        r"array records are \['arrays', 'more'\], not \['arrays'\]",
    ),
    "arrays elsewhere": (
        content(lambda c: c.update(model=c.pop("arrays"))),
        r"array records are \['model'\], not \['arrays'\]",
    ),
}


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize(
    ("spoil", "reason"), [*OF_METRICS.values(), *OF_ARRAYS.values()], ids=[*OF_METRICS, *OF_ARRAYS]
)
def test_bad_reply_is_left_out_and_the_round_goes_on_with_the_others(make, spoil, reason):
    gate = Gate(make())
    arrays, metrics = train(gate, federation(spoil))
    assert gate.usable == 2
    (failure,) = gate.failures
    assert re.match(f"node 1001: {reason}", failure), failure
    assert "\n" not in failure
    for name, expected in MEAN_OF_THE_GOOD.items():
        np.testing.assert_allclose(numbers(arrays)[name], expected, rtol=1e-6)
    assert dict(metrics) == {"loss": pytest.approx(4 / 3)}


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize(("spoil", "reason"), OF_METRICS.values(), ids=OF_METRICS)
def test_bad_evaluation_is_left_out(make, spoil, reason):
    gate = Gate(make())
    metrics = evaluate(gate, federation(spoil))
    assert gate.usable == 2
    (failure,) = gate.failures
    assert re.match(f"node 1001: {reason}", failure), failure
    assert dict(metrics) == {"loss": pytest.approx(4 / 3), "accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
def test_stock_clients_pass(make):
    gate = Gate(make())
    arrays, metrics = train(gate, federation())
    total = sum(WEIGHTS)
    assert (gate.usable, gate.failures) == (3, [])
    np.testing.assert_allclose(numbers(arrays)["w"], np.full((2, 2), (1 + 5000 + 8) / total), rtol=1e-6)
    assert dict(metrics) == {"loss": pytest.approx((50 + 4) / total)}
    assert dict(evaluate(gate, federation())) == {
        "loss": pytest.approx((50 + 4) / total),
        "accuracy": pytest.approx((25 + 2) / total),
    }
    assert (gate.usable, gate.failures) == (3, [])


@pytest.mark.parametrize("weight", [1, 1e-3, 2.5, 10**9])
def test_any_positive_bounded_weight_passes(weight):
    gate = Gate(ours())
    train(gate, federation(metric("num-examples", weight)))
    assert gate.failures == []


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize(
    "spoil",
    [metric("mood", 3.0), metric("loss", [1.0, 2.0]), without("metrics", "loss")],
    ids=["one more", "a list", "missing"],
)
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_unlike_metrics_cost_nobody_the_model(make, spoil, bad):
    """Flower's strategies would skip the aggregation, and so the run."""
    gate = Gate(make())
    arrays, metrics = train(gate, federation(spoil, (bad,)))
    assert (gate.usable, gate.failures) == (3, [])
    np.testing.assert_allclose(numbers(arrays)["w"], np.full((2, 2), 5009 / 53), rtol=1e-6)
    assert "num-examples" not in metrics
    assert evaluate(gate, federation(spoil, (bad,)))["accuracy"] == pytest.approx(27 / 53)


@pytest.mark.parametrize(
    "make",
    [*STRATEGIES.values(), lambda: NPMerge(3, holdout(4), tiny().np_merge, seed=0)],
    ids=[*STRATEGIES, "np-merge"],
)
def test_all_bad_ends_the_run_with_the_first_reason(make):
    gate = Gate(make())
    first = r"round 5: none of 3 clients gave a usable reply; node 1000: num-examples is -1, "
    replies = federation(metric("num-examples", -1), (0, 1, 2))
    random.seed(2)
    grid = grid_of(replies, 3)
    outgoing = sorted(
        gate.configure_train(5, record(START), ConfigRecord(), grid), key=lambda message: message.metadata.dst_node_id
    )
    with pytest.raises(NoUsableReplyError, match=first):
        gate.aggregate_train(5, grid.send_and_receive(outgoing))
    assert len(gate.failures) == 3
    assert issubclass(NoUsableReplyError, RunError)


def test_a_strategy_that_asks_too_few_is_told_how_many_are_needed():
    gate = Gate(FedAvg(1, seed=0, evaluation_cohort=0), min_replies=2)
    with pytest.raises(NoUsableReplyError, match=r"^round 1: 1 of 1 clients gave a usable reply, 2 are needed$"):
        train(gate, federation())


@pytest.mark.parametrize(("key", "value", "told"), [("loss", float("nan"), True), ("num-examples", -1, False)])
def test_a_run_that_diverges_is_told_what_helps(key, value, told):
    with pytest.raises(NoUsableReplyError) as raised:
        train(Gate(ours()), federation(metric(key, value), (0, 1, 2)))
    assert ("with a smaller learning-rate" in str(raised.value)) == told


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
def test_all_evaluations_bad_is_no_metrics(make):
    gate = Gate(make())
    assert evaluate(gate, federation(metric("loss", float("nan")), (0, 1, 2))) is None
    assert (gate.usable, len(gate.failures)) == (0, 3)


def test_missing_replies_are_reported():
    gate, grid = Gate(ours()), grid_of(federation(), 3)
    outgoing = gate.configure_train(1, record(START), ConfigRecord(), grid)
    replies = list(grid.send_and_receive(outgoing))
    arrays, _ = gate.aggregate_train(1, [replies[0], replies[2]])
    assert gate.failures == ["1 of 3 clients did not reply in time"]
    assert numbers(arrays)["w"].tolist() == MEAN_OF_THE_GOOD["w"]


def test_nobody_in_time_ends_the_run():
    gate, grid = Gate(ours()), grid_of(federation(), 3)
    outgoing = gate.configure_train(1, record(START), ConfigRecord(), grid)
    with pytest.raises(NoUsableReplyError, match=r"none of 3 .*; 3 of 3 clients did not reply in time"):
        gate.aggregate_train(1, grid.send_and_receive(outgoing, timeout=0))


def test_a_late_reply_to_the_round_before_is_left_out():
    gate, grid = Gate(ours()), grid_of(federation(), 3)
    outgoing = gate.configure_train(1, record(START), ConfigRecord(), grid)
    late = list(grid.send_and_receive(outgoing))[1]
    outgoing = gate.configure_train(2, record(START), ConfigRecord(), grid)
    first, _, last = grid.send_and_receive(outgoing)
    gate.aggregate_train(2, [first, late, last])
    assert gate.failures == ["node 1001: answers round '1', not 2"]


@pytest.mark.parametrize("reason", ["Node Unavailable - gone", None])
def test_error_in_a_dead_nodes_name_is_reported_for_that_node(reason):
    """Flower's SuperLink answers for a node that died, with its own node id as the sender."""
    gate, grid = Gate(ours()), grid_of(federation(), 3)
    outgoing = list(gate.configure_train(1, record(START), ConfigRecord(), grid))
    replies = list(grid.send_and_receive(outgoing))
    replies[1] = Message(Error(5, reason), reply_to=outgoing[1])
    replies[1].metadata.__dict__["_src_node_id"] = 1
    gate.aggregate_train(1, replies)
    assert gate.failures == [f"node 1001: error 5: {reason or 'no reason given'}"]


def test_failures_are_those_of_the_phase_that_ended_last():
    gate = Gate(ours())
    train(gate, federation(failing))
    evaluate(gate, federation())
    assert gate.failures == []
    train(gate, federation(failing))
    train(gate, federation(), 2)
    assert (gate.usable, gate.failures) == (3, [])


def test_model_keeps_the_types_that_were_sent():
    """FedAdam's own arithmetic is float64, FedAvg's of counters too; a client that loads them holds other types."""
    for strategy in (flower.FedAdam(), flower.FedAvg(), flower.FedMedian()):
        arrays, _ = train(Gate(strategy), federation())
        assert {name: values.dtype.name for name, values in numbers(arrays).items()} == {
            "w": "float32",
            "b": "float32",
            "steps": "int64",
        }
    assert numbers(arrays)["steps"] == 4  # the median of 1, 100 and 4


# ---- in our ServerApp


def test_a_run_goes_on_without_its_bad_client_and_says_so(tmp_path):
    """Client 1 sends NaN, then an array of no known type, and fails at every evaluation."""
    app = ClientApp()

    def is_bad(context: Context) -> bool:
        return context.node_config["partition-id"] == 1

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if is_bad(context):
            nan = Array(np.full(200, np.nan, np.float32))
            unknown = Array(dtype="bfloat16", shape=(200,), stype="numpy.ndarray", data=bytes(400))
            first = message.content["config"]["server-round"] == 1
            reply.content["arrays"]["layers.0.bias"] = nan if first else unknown
        return reply

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        if is_bad(context):
            raise RuntimeError("no disk")
        return client_app(message, context)

    config = tiny(strategies=("fedavg", "fedavg-wsa", "np-merge"), num_clients=3, cohort=3, evaluation_cohort=3)
    run(config, tmp_path, app)
    for name in config.strategies:
        assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / name / "final.safetensors").values())
        events = lines(tmp_path / name / "metrics.jsonl")
        for event in events:
            if event["phase"] == "evaluate-server":
                assert "failures" not in event
                continue
            reason = "error 2: RuntimeError: no disk"
            if event["phase"] == "train":
                reason = "layers.0.bias: not finite" if event["round"] == 1 else "layers.0.bias: not a readable array"
            assert (event["num_clients"], event["num_failed"]) == (3, 1)
            (failure,) = event["failures"]
            assert failure.startswith(f"node 1001: {reason}")


def test_run_ends_where_nobody_can_be_used_and_keeps_what_was_written(tmp_path):
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if message.content["config"]["server-round"] == 2:
            raise RuntimeError("out of memory")
        return client_app(message, context)

    config = tiny(strategies=("fedavg",), evaluation_cohort=0)
    with pytest.raises(NoUsableReplyError, match=r"round 2: none of 3 .* error 2: RuntimeError: out of memory"):
        run(config, tmp_path, app)
    assert not (tmp_path / "fedavg" / "final.safetensors").exists()
    assert [event["round"] for event in lines(tmp_path / "fedavg" / "metrics.jsonl")] == [0, 1, 1]
    assert (tmp_path / "fedavg" / "checkpoints" / "round-000001.safetensors").exists()
