"""FedAvg, and what every registered strategy has to keep."""

import math
import random
import shutil
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import federations
import flwr.serverapp.strategy as flower
import numpy as np
import pytest
import torch
from federations import (
    Seen,
    canned,
    digest,
    grid_of,
    holdout,
    initial_model,
    lines,
    numbers,
    one_round,
    record,
    run,
    spying,
    tiny,
)
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays
from safetensors.torch import load_file

from fedwsa import messages
from fedwsa.arrays import NumpyArray, pack
from fedwsa.errors import RunError
from fedwsa.seeding import torch_seed
from strategies import STRATEGIES, FedAvg, WeightScopeAlignment, build
from strategies.aggregation import MeanMetrics, MeanModel
from strategies.gate import Gate
from strategies.sampling import TooFewClientsError, draw

NAMES = [*STRATEGIES, "fedavg-wsa"]
COHORT = {"central": 1}  # clients that train; 3 for all others
AT_ONCE = {"fedmedian", "fedtrimmedavg", "krum"}  # they need all models at the same time
MODEL_NUMBERS = 64 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10


# ---- the mean


def test_fedavg_by_hand():
    clients = canned(
        ({"w": np.float32([[1, 2], [3, 4]]), "b": np.float32([10])}, {"num-examples": 1, "loss": 2.0}),
        ({"w": np.float32([[5, 6], [7, 8]]), "b": np.float32([-2])}, {"num-examples": 3, "loss": 4.0}),
    )
    start = record({"w": np.zeros((2, 2), np.float32), "b": np.zeros(1, np.float32)})
    arrays, metrics = one_round(FedAvg(2, seed=0), grid_of(clients, 2), start)
    assert numbers(arrays)["w"].tolist() == [[4, 5], [6, 7]]
    assert numbers(arrays)["b"].tolist() == [1]
    assert list(arrays) == ["w", "b"]
    assert arrays["w"].numpy().dtype == np.float32
    assert dict(metrics) == {"loss": 3.5}


def test_metrics_of_an_evaluation_by_hand():
    strategy = FedAvg(2, seed=0, evaluation_cohort=2)
    clients = canned(({}, {"num-examples": 1, "accuracy": 0.5, "loss": 1.0}), ({}, {"num-examples": 4, "loss": 2.0}))
    grid = grid_of(clients, 2)
    outgoing = strategy.configure_evaluate(3, record({}), ConfigRecord(), grid)
    metrics = strategy.aggregate_evaluate(3, grid.send_and_receive(outgoing))
    assert dict(metrics) == {"accuracy": 0.5, "loss": 1.8}  # of those that report it


@given(data=st.data(), clients=st.integers(1, 8), dtype=st.sampled_from([np.float32, np.float64]))
def test_mean_is_the_weighted_mean_in_float64(data, clients, dtype):
    values = data.draw(numpy_arrays(dtype, (clients, 3, 2), elements=st.floats(-1e3, 1e3, width=32)))
    weights = data.draw(st.lists(st.integers(1, 10**9), min_size=clients, max_size=clients))
    mean = MeanModel()
    for value, weight in zip(values, weights, strict=True):
        mean.add(pack({"w": torch.from_numpy(value)}), weight)
    result = mean.record()["w"].numpy()
    expected = np.average(values.astype(np.float64), axis=0, weights=np.float64(weights))
    assert result.dtype == dtype
    info = np.finfo(dtype)  # among the smallest numbers the last digit is more than eps of a number
    atol = max(1e-12 * np.abs(values).max(), info.smallest_subnormal)
    np.testing.assert_allclose(result, expected, rtol=1.01 * info.eps, atol=atol)


def test_mean_of_float32_is_summed_in_float64():
    mean = MeanModel()
    for value in (2.0**24, 1.0, 1.0):  # float32 sums would lose the ones
        mean.add(record({"w": np.float32([value])}), 1)
    assert mean.record()["w"].numpy()[0] == np.float32((2**24 + 2) / 3)


@pytest.mark.parametrize("make", [record, lambda arrays: pack({k: torch.from_numpy(v) for k, v in arrays.items()})])
def test_counters_are_averaged_and_rounded_in_their_own_type(make: Callable[[dict[str, np.ndarray]], ArrayRecord]):
    mean = MeanModel()
    mean.add(make({"steps": np.asarray(10), "large": np.array([2**40])}), 1)
    mean.add(make({"steps": np.asarray(20), "large": np.array([2**40])}), 2)
    result = numbers(mean.record())
    assert result["steps"].shape == ()
    assert (result["steps"].item(), result["steps"].dtype) == (17, np.int64)  # 50/3 = 16.7
    assert result["large"].tolist() == [2**40]
    mean.add(make({"steps": np.asarray(20), "large": np.array([2**40])}), 3)
    assert mean.record()["steps"].numpy().item() == 18  # 110/6 = 18.3


def test_only_the_order_of_the_clients_matters_not_that_of_their_arrays():
    rng = np.random.default_rng(0)
    models = [{"a": rng.normal(size=7), "b": rng.normal(size=(2, 3))} for _ in range(5)]
    one, other = MeanModel(), MeanModel()
    for weight, model in enumerate(models, start=1):
        one.add(record(model), weight)
        turned = weight > 1
        other.add(record(dict(reversed(model.items())) if turned else model), weight)
    assert digest(numbers(one.record())) == digest(numbers(other.record()))


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"a": np.zeros(2)}, r"\['b'\]"),
        ({"a": np.zeros(2), "b": np.zeros(1), "c": np.zeros(1)}, r"\['c'\]"),
        ({"a": np.zeros(1), "b": np.zeros(1)}, r"a: shape \(1,\), others have \(2,\)"),
    ],
)
def test_unlike_models_are_refused_by_name(arrays, named):
    mean = MeanModel()
    mean.add(record({"a": np.zeros(2), "b": np.zeros(1)}), 1)
    with pytest.raises(ValueError, match=named):
        mean.add(record(arrays), 1)


def test_complex_numbers_have_no_mean_in_float64():
    mean = MeanModel()
    mean.add(record({"a": np.array([1 + 2j])}), 1)
    with pytest.raises(TypeError, match="same_kind"):
        mean.record()


def test_a_model_without_arrays_has_a_weight():
    mean = MeanModel()
    assert (mean.weight, dict(mean.record())) == (0, {})
    for weight in (1, 2):
        mean.add(record({}), weight)
    assert (mean.weight, dict(mean.record())) == (3, {})


def test_lists_and_the_weight_are_no_metrics():
    mean = MeanMetrics()
    mean.add(MetricRecord({"num-examples": 5, "scope-means": [1.0, 2.0], "loss": 0.25}), 5)
    assert dict(mean.record()) == {"loss": 0.25}


def test_fedavg_agrees_with_flowers_own():
    rng = np.random.default_rng(3)
    replies = [
        (
            {"w": rng.normal(size=(30, 20)).astype(np.float32), "b": rng.normal(size=5)},
            {"num-examples": n, "loss": n / 7},
        )
        for n in (1, 7, 30, 4)
    ]
    start = record(replies[0][0])
    ours, our_metrics = one_round(FedAvg(4, seed=0), grid_of(canned(*replies), 4), start)
    theirs, their_metrics = one_round(flower.FedAvg(), grid_of(canned(*replies), 4), start)
    for name, values in numbers(theirs).items():
        np.testing.assert_allclose(numbers(ours)[name], values, rtol=1e-6, atol=1e-6)
    assert dict(our_metrics) == pytest.approx(dict(their_metrics), abs=1e-6)


# ---- the cohort


@dataclass
class Nodes:
    """A grid as far as a draw looks; more connect at each look."""

    looks: list[list[int]]

    def get_node_ids(self) -> list[int]:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


def drawn(nodes: list[int], size: int = 20, seed: int = 0, purpose: str = "cohort", server_round: int = 1) -> list[int]:
    grid = Nodes([nodes])
    return draw(grid, size, seed=seed, purpose=purpose, server_round=server_round, timeout=1)


THOUSAND = list(range(5000, 6000))


@given(size=st.integers(1, 60), seed=st.integers(0, 2**32 - 1), server_round=st.integers(1, 10**6))
def test_cohort_has_its_size_without_repetition(size, seed, server_round):
    nodes = list(range(100, 160))
    cohort = drawn(nodes, size, seed, "cohort", server_round)
    assert len(set(cohort)) == len(cohort) == size
    assert set(cohort) <= set(nodes)
    assert cohort == sorted(cohort)


def test_cohort_depends_on_seed_purpose_and_round_alone():
    expected = drawn(THOUSAND)
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    assert drawn(THOUSAND) == expected
    assert drawn(random.sample(THOUSAND, 1000)) == expected  # in whatever order they connected
    others = [drawn(THOUSAND, seed=1), drawn(THOUSAND, purpose="evaluation-cohort"), drawn(THOUSAND, server_round=2)]
    assert all(other != expected for other in others)


def test_every_client_is_drawn_some_time():
    cohorts = [drawn(list(range(10)), 3, server_round=server_round) for server_round in range(1, 101)]
    counts = np.bincount(np.concatenate(cohorts), minlength=10)
    assert counts.min() > 15  # 30 expected, standard deviation 4.6


def test_draw_leaves_the_global_random_states_alone():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    one_round(FedAvg(1, seed=0), grid_of(canned(({}, {"num-examples": 1})), 1), record({}))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_too_few_clients_is_said_within_the_timeout():
    start = time.monotonic()
    with pytest.raises(TooFewClientsError, match=r"2 clients connected after 0\.3 s, the cohort needs 3"):
        draw(Nodes([[1, 2]]), 3, seed=0, purpose="cohort", server_round=1, timeout=0.3)
    assert 0.3 <= time.monotonic() - start < 0.6
    assert issubclass(TooFewClientsError, RunError)


def test_last_wait_ends_with_the_timeout(monkeypatch):
    monkeypatch.setattr("strategies.sampling.POLL", 0.25)
    start = time.monotonic()
    with pytest.raises(TooFewClientsError):
        draw(Nodes([[1]]), 2, seed=0, purpose="cohort", server_round=1, timeout=0.3)
    assert 0.3 <= time.monotonic() - start < 0.45


def test_draw_waits_until_enough_are_connected(monkeypatch):
    monkeypatch.setattr("strategies.sampling.POLL", 0.01)
    late = Nodes([[], [7], [9, 7], [9, 7, 8]])
    assert draw(late, 3, seed=0, purpose="cohort", server_round=1, timeout=5) == [7, 8, 9]


# ---- what goes out


@pytest.mark.parametrize("make", [lambda inner: inner, lambda inner: Gate(inner)], ids=["bare", "gated"])
@pytest.mark.parametrize("name", NAMES)
def test_callers_config_is_left_as_it_is(name, make):
    strategy = make(build(name, tiny(num_clients=3), holdout(10)))
    grid = grid_of(canned(*[({}, {})] * 3), 3)
    config = ConfigRecord({"lr": 0.5})
    train = list(strategy.configure_train(4, pack(initial_model()), config, grid))
    evaluate = list(strategy.configure_evaluate(4, pack(initial_model()), config, grid))
    assert dict(config) == {"lr": 0.5}
    assert [len(train), len(evaluate)] == [COHORT.get(name, 3), 2]
    for message in train + evaluate:
        sent = message.content.config_records["config"]
        assert (sent["lr"], sent["server-round"], sent["schema-version"]) == (0.5, 4, 1)


def test_evaluation_has_a_cohort_of_its_own():
    strategy, grid = FedAvg(20, seed=0, evaluation_cohort=20), grid_of(canned(), 1000)
    cohorts = [
        [message.metadata.dst_node_id for message in configure(1, record({}), ConfigRecord(), grid)]
        for configure in (strategy.configure_train, strategy.configure_evaluate)
    ]
    assert cohorts[0] == drawn(grid.get_node_ids())
    assert cohorts[1] == drawn(grid.get_node_ids(), purpose="evaluation-cohort")


def test_nobody_evaluates_where_the_evaluation_cohort_is_zero():
    assert list(FedAvg(1, seed=0).configure_evaluate(1, record({}), ConfigRecord(), grid_of(canned(), 1))) == []


# ---- memory


@pytest.mark.parametrize("name", [name for name in NAMES if name not in {*AT_ONCE, "central"}])
def test_server_keeps_no_replies(name):
    clients = 12
    given_out: list[weakref.ref] = []
    alive: list[int] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        alive.append(sum(reference() is not None for reference in given_out))
        state = {key: array.numpy() for key, array in message.content.array_records["arrays"].items()}
        given_out.extend(weakref.ref(values) for values in state.values())
        arrays = ArrayRecord({key: NumpyArray(values) for key, values in state.items()})
        scope = {messages.SCOPE_MEANS: [0.0] * 3, messages.SCOPE_VARIANCES: [1.0] * 3}
        metrics = MetricRecord({"num-examples": 1, "local-steps": 1, **scope})
        replied = RecordDict({**message.content.array_records, "arrays": arrays, "metrics": metrics})
        return Message(replied, reply_to=message)

    config = tiny(num_clients=clients, cohort=clients, np_merge={"steps": 0, "align": False})
    model = pack(initial_model())
    arrays, metrics = one_round(Gate(build(name, config, holdout(10))), grid_of(app, clients), model)
    assert len(alive) == clients
    assert max(alive) <= 2 * len(model)  # the one that is being added, and the one before it
    assert not any(reference() is not None for reference in given_out)
    assert metrics["scope-distance"] == [0.0] * 3
    assert list(arrays) == list(model)


# ---- every registered strategy


@dataclass(frozen=True)
class Run:
    folder: Path
    events: list[tuple[str, dict]]
    seen: list[Seen]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The tiny run of a strategy, done once."""
    done: dict[str, Run] = {}

    def get(name: str) -> Run:
        if name not in done:
            folder, events, seen = tmp_path_factory.mktemp(name), [], []
            run(tiny(strategies=(name,)), folder, spying(seen), events)
            done[name] = Run(folder / name, events, seen)
        return done[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_a_run_ends_with_another_finite_model(name, run_of):
    final = load_file(run_of(name).folder / "final.safetensors")
    start = initial_model_of_the_run()
    assert final.keys() == start.keys()
    for key, tensor in final.items():
        assert tensor.isfinite().all()
        assert (tensor.shape, tensor.dtype) == (start[key].shape, start[key].dtype)
        assert torch.equal(tensor, start[key]) == (name == "local-only")  # whose models are the clients'


def initial_model_of_the_run(seed: int = 0) -> dict[str, torch.Tensor]:
    return initial_model(torch_seed(seed, "model"))


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_are_bit_identical(name, run_of, tmp_path):
    torch.manual_seed(1)
    random.seed(1)
    run(tiny(strategies=(name,)), tmp_path)
    first = run_of(name).folder
    assert (tmp_path / name / "final.safetensors").read_bytes() == (first / "final.safetensors").read_bytes()
    assert lines(tmp_path / name / "metrics.jsonl") == lines(first / "metrics.jsonl")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(name, run_of, tmp_path):
    whole = run_of(name).folder
    shutil.copytree(whole, tmp_path / name)
    (tmp_path / name / "final.safetensors").unlink()
    (tmp_path / name / "checkpoints" / "round-000002.safetensors").unlink()
    events: list[tuple[str, dict]] = []
    run(tiny(strategies=(name,)), tmp_path, events=events)
    assert {event["round"] for _, event in events} == {2}  # it did not begin anew
    assert (tmp_path / name / "final.safetensors").read_bytes() == (whole / "final.safetensors").read_bytes()
    assert lines(tmp_path / name / "metrics.jsonl") == lines(whole / "metrics.jsonl")


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_strategy_is_left_as_it_is(name, run_of):
    done = run_of(name)
    before = (done.folder / "final.safetensors").stat().st_mtime_ns
    seen: list[Seen] = []
    run(tiny(strategies=(name,)), done.folder.parent, spying(seen))
    assert seen == []
    assert (done.folder / "final.safetensors").stat().st_mtime_ns == before


COMMON = {"round", "phase", "metrics", "seconds"}
OF_CLIENTS = COMMON | {"num_clients", "num_failed", "bytes_down", "bytes_up"}
SPREADS = {"scope_mean_spread", "scope_std_spread"}
KEYS = {
    "train": OF_CLIENTS | {"layers", "scope_distance", "scope_means", "scope_variances"} | SPREADS,
    "evaluate-clients": OF_CLIENTS,
    "evaluate-server": COMMON | {"num_examples"},
}
OF_SERVER = {"fedexp": {"server-step"}}  # metrics of a training that are no client's
METRICS = {"train": {"loss"}, "evaluate-clients": {"loss", "accuracy"}, "evaluate-server": {"loss", "accuracy"}}


@pytest.mark.parametrize("name", NAMES)
def test_every_event_has_the_documented_fields(name, run_of):
    done = run_of(name)
    events = [event for _, event in done.events]
    phases, trained = [(event["round"], event["phase"]) for event in events], COHORT.get(name, 3)
    a_round = ["train", "evaluate-clients", "evaluate-server"]
    assert phases == [(0, "evaluate-server"), *[(r, phase) for r in (1, 2) for phase in a_round]]
    assert {strategy for strategy, _ in done.events} == {name}
    assert lines(done.folder / "metrics.jsonl") == [
        {key: value for key, value in event.items() if key != "seconds"} for event in events
    ]
    for event in events:
        of_target = {"target_distance"} if event["phase"] == "train" and name.endswith("-wsa") else set()
        assert event.keys() == KEYS[event["phase"]] | of_target
        of_server = OF_SERVER.get(name, set()) if event["phase"] == "train" else set()
        assert event["metrics"].keys() == METRICS[event["phase"]] | of_server
        assert all(math.isfinite(value) for value in event["metrics"].values())
        assert 0 < event["seconds"] < 60
        if "num_failed" in event:
            assert (event["num_clients"], event["num_failed"]) == (trained if event["phase"] == "train" else 2, 0)
            assert min(event["bytes_down"], event["bytes_up"]) > 0
        if event["phase"] == "train":
            assert event["layers"] == ["layers.0.weight", "layers.1.weight", "layers.2.weight"]
            for key in ("scope_distance", "scope_means", "scope_variances", *SPREADS, *of_target):
                assert len(event[key]) == 3
            differences = [*event["scope_distance"], *event["scope_mean_spread"], *event["scope_std_spread"]]
            assert all((number > 0) == (trained > 1) for number in differences)
            assert min(event["scope_variances"]) > 0


@pytest.mark.parametrize("name", NAMES)
def test_recorded_metrics_are_the_clients_own(name, run_of):
    done = run_of(name)
    for _, event in done.events:
        if event["phase"] in ("train", "evaluate-clients"):
            kind = event["phase"].removesuffix("-clients")
            own = [s.metrics for s in done.seen if (s.kind, s.server_round) == (kind, event["round"])]
            weights = [metrics["num-examples"] for metrics in own]
            for key in event["metrics"].keys() - OF_SERVER.get(name, set()):
                value = event["metrics"][key]
                assert value == pytest.approx(np.average([m[key] for m in own], weights=weights), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_strategies_are_paired(name, run_of):
    """The same start and the same cohorts, so that nothing differs but the strategy."""
    one, other = run_of(name).seen, run_of("fedavg").seen
    for kind in ("train", "evaluate"):
        asked, expected = ([(s.server_round, s.client) for s in seen if s.kind == kind] for seen in (one, other))
        assert asked == (expected if (name, kind) != ("central", "train") else [(1, 0), (2, 0)])
    first = {s.sent for s in one if (s.kind, s.server_round) == ("train", 1)}
    assert first == {s.sent for s in other if (s.kind, s.server_round) == ("train", 1)}
    assert first == {digest({key: tensor.numpy() for key, tensor in initial_model_of_the_run().items()})}


def test_seed_decides_start_and_cohorts(run_of, tmp_path):
    seen: list[Seen] = []
    run(tiny(strategies=("fedavg",), seed=1), tmp_path, spying(seen))
    first = initial_model_of_the_run(seed=1)
    assert seen[0].sent == digest({key: tensor.numpy() for key, tensor in first.items()})
    assert [s.client for s in seen] != [s.client for s in run_of("fedavg").seen]


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trip_is_whole(name, run_of):
    config = tiny(strategies=(name,))
    one, other = (build(name, config, holdout(10)) for _ in range(2))
    one_round(one, grid_of(spying([]), 6, config.to_run_config()), pack(initial_model()))
    state = {key: tensor.clone() for key, tensor in one.state().items()}
    other.load_state(state)
    assert other.state().keys() == state.keys()
    assert all(torch.equal(other.state()[key], state[key]) for key in state)


def test_traffic_of_fedavg_by_hand(run_of):
    train, evaluate = (
        next(event for _, event in run_of("fedavg").events if event["phase"] == phase)
        for phase in ("train", "evaluate-clients")
    )
    down = 4 * MODEL_NUMBERS + 2 * 8 + len("fedavg")  # round, version and strategy
    assert train["bytes_down"] == 3 * down
    assert train["bytes_up"] == 3 * (4 * MODEL_NUMBERS + 2 * 8 + 2 * 3 * 8)  # weight, loss; scope of three layers
    assert (evaluate["bytes_down"], evaluate["bytes_up"]) == (2 * down, 2 * 3 * 8)


def test_integer_buffers_survive_a_run(tmp_path):
    run(tiny(strategies=NAMES, model="federations:NormNet", np_merge={"steps": 2, "align": False}), tmp_path)
    for name in NAMES:
        final = load_file(tmp_path / name / "final.safetensors")
        counter = final["2.num_batches_tracked"]
        assert counter.dtype == torch.int64
        assert (counter.item() > 0) == (name != "local-only")
        assert torch.equal(final["2.running_mean"], torch.zeros(16)) == (name == "local-only")
        assert lines(tmp_path / name / "metrics.jsonl")[-2]["num_failed"] == 0


def test_dropout_on_the_server_and_the_clients_is_repeatable(tmp_path):
    config = tiny(strategies=NAMES, model="federations:DropoutNet")
    for folder in ("one", "other"):
        torch.manual_seed(len(folder))
        run(config, tmp_path / folder)
    for name in NAMES:
        files = [tmp_path / folder / name / "final.safetensors" for folder in ("one", "other")]
        assert files[0].read_bytes() == files[1].read_bytes()


# ---- the registry


def test_strategy_by_import_path():
    assert build("test_strategies:two_clients", tiny(seed=5), holdout()).seed == 5


def two_clients(config, holdout):
    return FedAvg(2, seed=config.seed[0])


def test_unknown_strategy_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown strategy 'sgd': registered are central, fedadagrad, "):
        build("sgd", tiny(), holdout())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("fedavgg", "fedavg"),
        ("FedAvg", "fedavg"),
        ("np_merge", "np-merge"),
        ("np_merge-wsa", "np-merge-wsa"),
        ("fedavg-wsa-wsa", "fedavg-wsa"),
        ("fedavg-was", "fedavg-wsa"),
    ],
)
def test_unknown_strategy_is_named_as_typed_with_the_nearest_known(name, meant):
    with pytest.raises(
        ValueError, match=f"^unknown strategy '{name}': did you mean {meant}\\? registered are "
    ) as error:
        build(name, tiny(), holdout())
    assert ", scaffold, each also with -wsa behind it; or give an import path" in str(error.value)
    assert build(meant, tiny(), holdout(10))


def test_config_reaches_the_strategies():
    config = tiny(cohort=4, evaluation_cohort=5, seed=7, timeout=3.0, wsa={"strength": 5.0, "target": "initial"})
    for name in NAMES:
        strategy = build(name, config, holdout(10))
        plain = strategy.strategy if isinstance(strategy, WeightScopeAlignment) else strategy
        assert (plain.cohort, plain.evaluation_cohort, plain.seed, plain.timeout) == (4, 5, 7, 3.0)
    aligned = build("fedavg-wsa", config, holdout())
    assert (aligned.strength, aligned.follows_clients) == (5.0, False)


# ---- what clients keep


def checkpointed(folder: Path, client: ClientApp = federations.remembering, **changes: Any) -> dict[str, bytes]:
    """The final models of a run, by strategy."""
    config = tiny(strategies=("fedavg", "fedavg-wsa"), **changes)
    federations.run(config, folder, client)
    return {name: (folder / name / "final.safetensors").read_bytes() for name in config.strategies}


def test_what_clients_keep_is_in_the_checkpoint(tmp_path):
    whole = checkpointed(tmp_path / "whole", rounds=4)
    checkpointed(tmp_path / "parts", rounds=2)
    for name in whole:
        (tmp_path / "parts" / name / "final.safetensors").unlink()
    assert checkpointed(tmp_path / "parts", rounds=4) == whole
    forgetful = checkpointed(tmp_path / "forgetful", federations.client_app, rounds=4)
    assert all(forgetful[name] != whole[name] for name in whole)


def test_what_clients_keep_is_not_there_for_the_next_strategy(tmp_path):
    both = checkpointed(tmp_path / "both", wsa={"strength": 0.0})
    assert both["fedavg"] == both["fedavg-wsa"]
