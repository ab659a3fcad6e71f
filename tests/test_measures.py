"""What a run measures: each number against a plain computation, and nothing else changed by looking."""

import math
import shutil
import weakref
from pathlib import Path

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
import torch
from federations import (
    canned,
    client_app,
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
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

from fedwsa import messages
from fedwsa.arrays import NumpyArray, pack
from fedwsa.run_folder import StrategyFolder
from fedwsa.simulation import open_engine, simulate
from strategies import STRATEGIES, FedAvg, Holdout, WeightScopeAlignment
from strategies.gate import Gate
from strategies.measures import Directions, Measures, Updates, _averaging
from strategies.server_app import make_app

SCALARS = {"update-norm", "update-cosine", "round-barrier", "improvement-lost"}
LISTS = {"layer_update_norms", "layer_update_cosines"}
LAYERS = ("layers.0.weight", "layers.1.weight", "layers.2.weight")


# ---- directions


def pairwise(vectors: np.ndarray) -> float:
    """Mean cosine over all pairs of vectors that are not zero."""
    moved = [v for v in vectors if np.linalg.norm(v) > 0]
    cosines = [
        a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for i, a in enumerate(moved) for b in moved[:i]
    ]  # fmt: skip
    return float(np.mean(cosines)) if cosines else math.nan


@given(k=st.integers(0, 12), split=st.integers(0, 7), zeros=st.sets(st.integers(0, 11)), seed=st.integers(0, 2**32 - 1))
def test_streamed_cosine_and_norm_are_those_of_all_pairs(k, split, zeros, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(k, 7)) * 10.0 ** rng.integers(-6, 6, size=(k, 1)) + rng.normal()
    vectors[[each for each in zeros if each < k]] = 0
    directions = Directions()
    for vector in vectors:
        directions.add([vector[:split], vector[split:].reshape(1, -1)])
    assert directions.cosine() == pytest.approx(pairwise(vectors), abs=1e-12, nan_ok=True)
    norms = np.linalg.norm(vectors, axis=1)
    assert directions.norm() == pytest.approx(norms.mean() if k else math.nan, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize(
    ("vectors", "cosine"),
    [
        ([[3, 4], [3, 4]], 1),
        ([[3, 4], [-6, -8]], -1),
        ([[3, 4], [-4, 3]], 0),
        ([[2, 0], [0, 1], [5, 5]], math.sqrt(2) / 3),  # 0 and twice 1/√2
    ],
)
def test_cosines_by_hand(vectors, cosine):
    directions = Directions()
    for vector in vectors:
        directions.add([np.array(vector, float)])
    assert directions.cosine() == pytest.approx(cosine, abs=1e-15)


def test_the_whole_is_what_trains_and_a_layer_is_what_has_a_scope():
    start = {"w": np.zeros((1, 2)), "b": np.zeros(1), "table": np.zeros((1, 1)), "steps": np.asarray(0)}
    updates = Updates(record(start), {"w", "b"})
    updates.add(record({"w": np.array([[2.0, 0.0]]), "b": np.array([1.0]), "table": np.ones((1, 1)), "steps": 9}))
    updates.add(record({"w": np.array([[0.0, 2.0]]), "b": np.array([1.0]), "table": np.zeros((1, 1)), "steps": 9}))
    found = updates.metrics()
    assert found["update-norm"] == pytest.approx(math.sqrt(5))
    assert found["update-cosine"] == pytest.approx(1 / 5)
    assert found["layer-update-norms"] == [2.0, 0.5]  # w, and the table that is no parameter
    assert found["layer-update-cosines"] == [0.0, pytest.approx(math.nan, nan_ok=True)]


# ---- averaging


@pytest.mark.parametrize(
    ("before", "clients", "after", "lost"),
    [
        (2.0, 1.0, 1.0, 0.0),  # as good as the clients
        (2.0, 1.0, 1.25, 0.25),
        (2.0, 1.0, 2.0, 1.0),  # as if nobody had trained
        (2.0, 1.0, 0.5, -0.5),  # better than its parts
    ],
)
def test_what_averaging_destroys_by_hand(before, clients, after, lost):
    assert _averaging(before, clients, after) == {"round-barrier": after - clients, "improvement-lost": lost}


@pytest.mark.parametrize("clients", [2.0, 3.0, 2 - 1e-9, 1.9981, math.nan])
def test_of_a_gain_of_a_thousandth_of_the_loss_or_less_no_share_is_lost(clients):
    """It would be rounding, or hundreds."""
    assert math.isnan(_averaging(2.0, clients, 0.5)["improvement-lost"])


def test_a_gain_of_more_than_a_thousandth_of_the_loss_counts():
    assert _averaging(2.0, 1.9979, 2.0)["improvement-lost"] == pytest.approx(1.0)


class Linear(nn.Linear):
    """Three classes; BatchNorm's kind of array besides, and a weight that does not train."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.bias.requires_grad = False

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.flatten(1)) + self.seen


def loss_by_hand(model: dict[str, np.ndarray], images: torch.Tensor, labels: torch.Tensor) -> float:
    w, b, seen = (torch.from_numpy(model[name]) for name in ("weight", "bias", "seen"))
    return cross_entropy(images.flatten(1) @ w.T + b + seen, labels).item()


def linear_round(strategy: flower.Strategy, samples: int = 40, every: int = 1):
    """(new arrays, metrics; start and the clients' models; the samples)."""
    rng = np.random.default_rng(1)

    def model(scale: float) -> dict[str, np.ndarray]:
        shapes = {"weight": (3, 2), "bias": (3,), "seen": ()}
        return {name: np.asarray(scale * rng.normal(size=shape), np.float32) for name, shape in shapes.items()}

    start, clients = model(3.0), [model(0.3), model(1.0), model(0.5)]
    images = torch.from_numpy(rng.normal(size=(samples, 1, 1, 2)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, 3, samples))
    replies = [(m, {"num-examples": n, "loss": 0.5}) for m, n in zip(clients, (1, 2, 5), strict=True)]
    measures = Gate(Measures(strategy, Holdout(Linear(), images, labels), every))
    arrays, metrics = one_round(measures, grid_of(canned(*replies), 3), record(start))
    return numbers(arrays), dict(metrics), start, clients, (images, labels)


class Plain(FedAvg):
    weigh = staticmethod(lambda metrics: 1.0)


@pytest.mark.parametrize(
    ("strategy", "shares"),
    [
        (FedAvg(3, seed=0), [1 / 8, 2 / 8, 5 / 8]),
        (Plain(3, seed=0), [1 / 3] * 3),
        (WeightScopeAlignment(Plain(3, seed=0)), [1 / 3] * 3),
        (flower.FedAvg(fraction_evaluate=0.0), [1 / 8, 2 / 8, 5 / 8]),
        (flower.FedMedian(fraction_evaluate=0.0), [1 / 8, 2 / 8, 5 / 8]),
        (flower.Krum(fraction_evaluate=0.0), [1 / 8, 2 / 8, 5 / 8]),
    ],
    ids=["fedavg", "equal weights", "wsa", "flower's fedavg", "flower's median", "krum"],
)
def test_measures_of_a_round_by_plain_numpy(strategy, shares):
    end, metrics, start, clients, samples = linear_round(strategy)
    moves = np.array([(m["weight"] - start["weight"].astype(float)).ravel() for m in clients])  # alone trains
    assert metrics["update-norm"] == pytest.approx(np.linalg.norm(moves, axis=1).mean(), rel=1e-6)
    assert metrics["update-cosine"] == pytest.approx(pairwise(moves), rel=1e-6)
    assert metrics["layer-update-norms"] == [pytest.approx(metrics["update-norm"])]
    assert metrics["layer-update-cosines"] == [pytest.approx(metrics["update-cosine"])]
    before, after = (loss_by_hand(model, *samples) for model in (start, end))
    mean = np.dot(shares, [loss_by_hand(model, *samples) for model in clients])
    assert metrics["round-barrier"] == pytest.approx(after - mean, rel=1e-4)
    assert before > mean
    assert metrics["improvement-lost"] == pytest.approx((after - mean) / (before - mean), rel=1e-4)


def test_without_samples_there_is_no_barrier():
    _, metrics, *_ = linear_round(FedAvg(3, seed=0), samples=0)
    assert metrics.keys() == {"loss", "update-norm", "update-cosine", "layer-update-norms", "layer-update-cosines"}


def test_a_client_alone_has_a_norm_and_no_cosine():
    clients = canned(({"w": np.float32([[3, 4]])}, {"num-examples": 1}))
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(1, 2))
    measures = Gate(Measures(FedAvg(1, seed=0), holdout(model=model), 1))
    _, metrics = one_round(measures, grid_of(clients, 1), record({"w": np.zeros((1, 2), np.float32)}))
    assert metrics["update-norm"] == 5.0
    assert "update-cosine" not in metrics


def test_what_a_strategy_makes_of_a_reply_is_not_what_is_measured():
    """The clipping of Flower's DP wrapper writes into the replies."""
    clipped = flower.DifferentialPrivacyServerSideFixedClipping(
        flower.FedAvg(fraction_evaluate=0.0), noise_multiplier=0.0, clipping_norm=1e-3, num_sampled_clients=3
    )
    _, plain, *_ = linear_round(flower.FedAvg(fraction_evaluate=0.0))
    end, found, start, *_ = linear_round(clipped)
    assert np.linalg.norm(end["weight"] - start["weight"]) < 1.1e-3
    assert found["update-norm"] == plain["update-norm"]


# ---- when


def test_only_every_so_many_rounds_are_looked_at():
    measures = Gate(Measures(FedAvg(2, seed=0), holdout(10), 3))
    grid, arrays = grid_of(spying([]), 6, tiny().to_run_config()), pack(initial_model())
    for server_round in range(1, 7):
        outgoing = measures.configure_train(server_round, arrays, messages.ConfigRecord(), grid)
        is_measured = server_round % 3 == 0
        assert (measures.folding(server_round) is None) == is_measured  # else the workers may aggregate
        _, metrics = measures.aggregate_train(server_round, grid.send_and_receive(outgoing))
        assert (metrics.keys() >= {"update-norm", "round-barrier"}) == is_measured


def test_every_must_be_a_number_of_rounds():
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        Measures(FedAvg(1, seed=0), holdout(), 0)


def test_what_else_a_strategy_has_is_reached_through():
    class Own(FedAvg):
        note = "something"

    assert Measures(Own(1, seed=0), holdout(), 1).note == "something"
    with pytest.raises(AttributeError, match="'FedMedian' object has no attribute 'state'"):
        Measures(flower.FedMedian(), holdout(), 1).state()


def test_no_reply_is_kept():
    given_out: list[weakref.ref] = []
    alive: list[int] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        alive.append(sum(reference() is not None for reference in given_out))
        state = {key: array.numpy() for key, array in message.content.array_records["arrays"].items()}
        given_out.extend(weakref.ref(values) for values in state.values())
        arrays = ArrayRecord({key: NumpyArray(values) for key, values in state.items()})
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    model = pack(initial_model())
    one_round(Gate(Measures(FedAvg(20, seed=0), holdout(10), 1)), grid_of(app, 20), model)
    assert len(alive) == 20
    assert max(alive) <= 2 * len(model)  # the one that is looked at, and the one before it


# ---- whole runs


def unmeasured(events: list[dict]) -> list[dict]:
    """Events without what is measured."""
    for event in events:
        for key in LISTS:
            event.pop(key, None)
        event["metrics"] = {key: value for key, value in event["metrics"].items() if key not in SCALARS}
    return events


@pytest.mark.parametrize("name", [*STRATEGIES, "fedavg-wsa"])
def test_measuring_changes_neither_a_bit_of_the_model_nor_another_number(name, tmp_path):
    for every in (0, 1):
        run(tiny(strategies=(name,), measure_every=every), tmp_path / str(every))
    plain, measured = (tmp_path / str(every) / name for every in (0, 1))
    assert (measured / "final.safetensors").read_bytes() == (plain / "final.safetensors").read_bytes()
    events = lines(measured / "metrics.jsonl")
    for event in (each for each in events if each["phase"] == "train"):
        assert event["metrics"].keys() >= {"update-norm", "round-barrier"}
        assert len(event["layer_update_norms"]) == len(event["layer_update_cosines"]) == len(event["layers"])
    assert unmeasured(events) == lines(plain / "metrics.jsonl")


def test_norm_layers_are_measured_and_left_alone(tmp_path):
    """NP-Merge learns with the server's module, whose statistics a look must not touch."""
    changes = {"model": "federations:NormNet", "np_merge": {"steps": 2, "align": False}, "strategies": ("np-merge",)}
    for every in (0, 1):
        run(tiny(measure_every=every, **changes), tmp_path / str(every))
    one, other = (tmp_path / str(every) / "np-merge" / "final.safetensors" for every in (0, 1))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("policy", ["local", "local-statistics"])
def test_there_is_no_barrier_of_models_whose_batch_norm_nobody_uses(policy, tmp_path):
    run(tiny(measure_every=1, model="federations:NormNet", strategies=("fedavg",), batch_norm=policy), tmp_path)
    for event in (each for each in lines(tmp_path / "fedavg" / "metrics.jsonl") if each["phase"] == "train"):
        assert event["metrics"].keys() & SCALARS == {"update-norm", "update-cosine"}


def test_where_the_server_sees_no_update_nothing_is_lost(tmp_path):
    """Equal models, whose mean loss differs from theirs by rounding."""
    run(tiny(measure_every=1, strategies=("local-only",), rounds=3), tmp_path)
    events = [each for each in lines(tmp_path / "local-only" / "metrics.jsonl") if each["phase"] == "train"]
    assert len(events) == 3
    for event in events:
        assert event["metrics"].keys() & SCALARS == {"update-norm", "round-barrier"}
        assert event["metrics"]["update-norm"] == 0.0
        assert event["metrics"]["round-barrier"] == pytest.approx(0.0, abs=1e-12)


def test_a_measured_round_of_a_run_by_hand(tmp_path):
    """Updates from the clients' own models, the start of the round from its checkpoint."""
    seen = []
    run(tiny(strategies=("fedavg-wsa",), measure_every=2), tmp_path, spying(seen))
    folder = tmp_path / "fedavg-wsa"
    first, last = [event for event in lines(folder / "metrics.jsonl") if event["phase"] == "train"]
    assert not first["metrics"].keys() & SCALARS
    assert not first.keys() & LISTS
    start = {
        name.removeprefix("model/"): tensor.numpy()
        for name, tensor in load_file(folder / "checkpoints" / "round-000001.safetensors").items()
        if name.startswith("model/")
    }
    replies = [each.model for each in seen if (each.kind, each.server_round) == ("train", 2)]
    assert len(replies) == 3

    def moves(names: list[str]) -> np.ndarray:
        differences = [[(m[n] - start[n].astype(float)).ravel() for n in names] for m in replies]
        return np.array([np.concatenate(each) for each in differences])

    for moved, norm, cosine in (
        (moves(list(start)), last["metrics"]["update-norm"], last["metrics"]["update-cosine"]),
        *(
            (moves([layer]), last["layer_update_norms"][i], last["layer_update_cosines"][i])
            for i, layer in enumerate(LAYERS)
        ),
    ):
        assert norm == pytest.approx(np.linalg.norm(moved, axis=1).mean(), rel=1e-9)
        assert cosine == pytest.approx(pairwise(moved), rel=1e-9)


def test_numbers_that_are_not_there_are_null_in_the_events(tmp_path):
    run(tiny(strategies=("fedavg",), measure_every=1, model="test_measures:WithTable"), tmp_path)
    event = lines(tmp_path / "fedavg" / "metrics.jsonl")[1]
    norms = dict(zip(event["layers"], event["layer_update_norms"], strict=True))
    cosines = dict(zip(event["layers"], event["layer_update_cosines"], strict=True))
    assert (norms["table"], cosines["table"]) == (0.0, None)
    assert norms["1.weight"] > 0
    assert -1 < cosines["1.weight"] < 1


class WithTable(nn.Sequential):
    """An array with two dimensions that nobody trains."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))
        self.register_buffer("table", torch.ones(2, 2))


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    config = tiny(strategies=("fedavg-wsa",), rounds=4, measure_every=2)
    run(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (StrategyFolder(tmp_path / name / "fedavg-wsa") for name in ("whole", "parts"))
    parts.final.unlink()
    (parts.checkpoints / "round-000004.safetensors").unlink()
    run(config, tmp_path / "parts")
    assert parts.final.read_bytes() == whole.final.read_bytes()
    assert lines(parts.metrics) == lines(whole.metrics)


@pytest.mark.process
def test_workers_make_no_difference(tmp_path):
    config = tiny(strategies=("fedavg", "np-merge"), measure_every=2)
    run(config, tmp_path / "here")
    with open_engine("ray", workers=2) as engine:
        app = make_app(tmp_path / "ray", lambda strategy, event: None)
        simulate(app, client_app, config.num_clients, engine=engine, run_config=config.to_run_config())
    for name in config.strategies:
        one, other = (StrategyFolder(Path(tmp_path, where, name)) for where in ("here", "ray"))
        assert one.final.read_bytes() == other.final.read_bytes()
        assert lines(one.metrics) == lines(other.metrics)
