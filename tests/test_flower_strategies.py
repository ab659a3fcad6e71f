"""Flower's own strategies, unchanged over our engine and behind our gate, against what plain NumPy makes of them."""

import gc
import random
from collections.abc import Callable, Iterator
from math import exp, sqrt
from typing import NamedTuple

import apps
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)
from numpy.typing import NDArray

from fedwsa.simulation import Engine, open_engine, simulate
from strategies.gate import Gate

Numbers = NDArray[np.float64]  # one model [FEATURES + 1], the bias last, or one a row
Clients = NDArray[np.int64]  # partition ids
Reference = Callable[[Numbers, Clients], Numbers]  # the last model of the first and of whose replies count

CLIENTS, ROUNDS = 8, 3  # Bulyan asks for 4 f + 3 replies; here f = 1, and one reply may be lost
BAD = 5  # the client that replies NaN, where one does
START = np.linspace(-1.0, 1.0, apps.FEATURES + 1)
SIZES = np.array([len(apps.samples(client)[0]) for client in range(CLIENTS)])


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """Bulyan and QFedAvg collect garbage for each array that they read: seconds, where PyTorch is searched too."""
    gc.freeze()
    yield
    gc.unfreeze()


# ---- the federation


def gradient(model: Numbers, client: int) -> tuple[Numbers, float]:
    """Of the client's mean squared error, and that error."""
    points, targets = apps.samples(client)
    points = np.column_stack([points, np.ones(len(points))])
    residuals = points @ model - targets
    return 2 / len(points) * points.T @ residuals, float(np.mean(residuals**2))


def local(model: Numbers, client: int, mu: float = 0.0) -> Numbers:
    """Two steps on the client's loss + μ/2 ‖w − model‖²."""
    weights = model
    for _ in range(2):
        weights = weights - 0.05 * (gradient(weights, client)[0] + mu * (weights - model))
    return weights


def pack(model: Numbers) -> ArrayRecord:
    return ArrayRecord({"weights": Array(model[:-1].reshape(2, -1)), "bias": Array(model[-1:])})


def unpack(arrays: ArrayRecord) -> Numbers:
    return np.concatenate([arrays[name].numpy().ravel() for name in ("weights", "bias")])


def client_app(mods: list[Mod], bad: int | None = None) -> ClientApp:
    app = ClientApp()

    @app.train(mods=mods)
    def train(message: Message, context: Context) -> Message:
        client, model = int(context.node_config["partition-id"]), unpack(message.content["arrays"])
        trained = local(model, client, message.content["config"].get("proximal-mu", 0.0))
        if client == bad:
            trained[0] = np.nan
        metrics = {"num-examples": int(SIZES[client]), "train_loss": gradient(model, client)[1]}
        return Message(RecordDict({"arrays": pack(trained), "metrics": MetricRecord(metrics)}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        loss = gradient(unpack(message.content["arrays"]), client)[1]
        metrics = MetricRecord({"num-examples": int(SIZES[client]), "loss": loss})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def seed() -> None:
    """Flower draws cohorts from the one and noise from the other."""
    random.seed(5)
    np.random.seed(5)


def run(strategy: Strategy, app: ClientApp, engine: Engine | str = "inprocess") -> RecordDict:
    """The last model and evaluation."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        seed()
        result = strategy.start(grid=grid, initial_arrays=pack(START), num_rounds=ROUNDS)
        context.state["arrays"] = result.arrays
        context.state["evaluate"] = result.evaluate_metrics_clientapp[ROUNDS]

    return simulate(server, app, CLIENTS, engine=engine).state


# ---- what the strategies should give


def train(model: Numbers, clients: Clients, mu: float = 0.0) -> Numbers:
    return np.stack([local(model, client, mu) for client in clients])


def mean(values: Numbers, clients: Clients) -> Numbers:
    """By the clients' number of samples."""
    return SIZES[clients] @ values / SIZES[clients].sum()


def fedavg(model: Numbers, clients: Clients) -> Numbers:
    """With half of the clients in each round."""
    for _ in range(ROUNDS):
        cohort = np.intersect1d(random.sample(range(CLIENTS), CLIENTS // 2), clients)
        model = mean(train(model, cohort), cohort)
        random.sample(range(CLIENTS), CLIENTS)  # who evaluates
    return model


def fedprox(model: Numbers, clients: Clients) -> Numbers:
    for _ in range(ROUNDS):
        model = mean(train(model, clients, mu=2.0), clients)
    return model


def fedavgm(model: Numbers, clients: Clients) -> Numbers:
    velocity = np.zeros_like(model)
    for _ in range(ROUNDS):
        velocity = 0.9 * velocity + model - mean(train(model, clients), clients)
        model = model - 0.7 * velocity
    return model


def adaptive(
    second_moment: Callable[[Numbers, Numbers], Numbers], beta: float, rate: Callable[[int], float]
) -> Reference:
    """FedOpt of arXiv 2003.00295; second_moment: the next v of v and Δ², rate: η of the round."""

    def reference(model: Numbers, clients: Clients) -> Numbers:
        m, v = np.zeros_like(model), np.zeros_like(model)
        for server_round in range(1, ROUNDS + 1):
            delta = mean(train(model, clients), clients) - model
            m, v = beta * m + (1 - beta) * delta, second_moment(v, delta**2)
            model = model + rate(server_round) * m / (np.sqrt(v) + 0.01)
        return model

    return reference


fedadagrad = adaptive(lambda v, square: v + square, beta=0.0, rate=lambda t: 0.3)
fedyogi = adaptive(lambda v, square: v - 0.05 * square * np.sign(v - square), beta=0.8, rate=lambda t: 0.3)
fedadam = adaptive(  # the exponent of Flower's bias correction is one more than that of arXiv 1412.6980
    lambda v, square: 0.95 * v + 0.05 * square,
    beta=0.8,
    rate=lambda t: 0.3 * sqrt(1 - 0.95 ** (t + 1)) / (1 - 0.8 ** (t + 1)),
)


def fedmedian(model: Numbers, clients: Clients) -> Numbers:
    middle = slice((len(clients) - 1) // 2, len(clients) // 2 + 1)  # one of an odd number, two of an even one
    for _ in range(ROUNDS):
        model = np.sort(train(model, clients), axis=0)[middle].mean(axis=0)
    return model


def fedtrimmedavg(model: Numbers, clients: Clients) -> Numbers:
    cut = len(clients) // 4
    for _ in range(ROUNDS):
        model = np.sort(train(model, clients), axis=0)[cut:-cut].mean(axis=0)
    return model


def by_krum(models: Numbers) -> Clients:
    """Positions, the one with the smallest sum of squared distances to its n − f − 2 nearest others first; f = 1."""
    squares = [np.sort(((models - each) ** 2).sum(axis=1)) for each in models]  # the first is to itself
    return np.argsort([distances[1 : len(models) - 2].sum() for distances in squares])


def multikrum(selected: int) -> Reference:
    def reference(model: Numbers, clients: Clients) -> Numbers:
        for _ in range(ROUNDS):
            models = train(model, clients)
            chosen = by_krum(models)[:selected]
            model = mean(models[chosen], clients[chosen])
        return model

    return reference


def bulyan(model: Numbers, clients: Clients) -> Numbers:
    """θ = n − 2 f chosen at once (arXiv 1802.07927 chooses them one by one); then θ − 2 f about each median; f = 1."""
    for _ in range(ROUNDS):
        models = train(model, clients)
        chosen = models[by_krum(models)[: len(models) - 2]]
        nearest = np.argsort(np.abs(chosen - np.median(chosen, axis=0)), axis=0)[: len(chosen) - 2]
        model = np.take_along_axis(chosen, nearest, axis=0).mean(axis=0)
    return model


def qfedavg(model: Numbers, clients: Clients) -> Numbers:
    """Algorithm 2 of arXiv 1905.10497; q = 0.5, L = 1 / 0.05."""
    for _ in range(ROUNDS):
        losses = np.array([gradient(model, client)[1] for client in clients])
        deltas = (model - train(model, clients)) / 0.05
        h = 0.5 * losses**-0.5 * (deltas**2).sum(axis=1) + losses**0.5 / 0.05
        model = model - losses**0.5 @ deltas / h.sum()
    return model


NORM, NOISE = 1.4, 0.3  # with this norm some steps are clipped in each round, and some are not


def clip(steps: Numbers, norm: float) -> Numbers:
    return np.stack([step * min(1.0, norm / np.linalg.norm(step)) for step in steps])


def fixed_clipping(model: Numbers, clients: Clients) -> Numbers:
    for _ in range(ROUNDS):
        steps = clip(train(model, clients) - model, NORM)
        model = model + mean(steps, clients) + np.random.normal(0.0, NOISE * NORM / CLIENTS, len(model))
    return model


def adaptive_clipping(model: Numbers, clients: Clients) -> Numbers:
    """Algorithm 1 of arXiv 1905.03871, but Flower takes the share of clipped steps where that takes the others'."""
    norm, spread = NORM, CLIENTS / 20
    noise = (NOISE**-2 - (2 * spread) ** -2) ** -0.5
    for _ in range(ROUNDS):
        steps = train(model, clients) - model
        clipped = sum(np.linalg.norm(step) > norm for step in steps)
        model = model + mean(clip(steps, norm), clients)
        norm *= exp(-0.2 * (np.random.normal(clipped, spread) / len(clients) - 0.5))
        model = model + np.random.normal(0.0, noise * norm / CLIENTS, len(model))
    return model


# ---- the strategies


class Row(NamedTuple):
    make: Callable[[], Strategy]
    reference: Reference
    mods: tuple[Mod, ...] = ()


FEDOPT = {"eta": 0.3, "tau": 0.01}
MOMENTS = {"beta_1": 0.8, "beta_2": 0.95}

ROWS = {
    "FedAvg": Row(lambda: FedAvg(fraction_train=0.5), fedavg),
    "FedAvgM": Row(lambda: FedAvgM(server_learning_rate=0.7, server_momentum=0.9), fedavgm),
    "FedAdam": Row(lambda: FedAdam(**FEDOPT, **MOMENTS), fedadam),
    "FedYogi": Row(lambda: FedYogi(**FEDOPT, **MOMENTS), fedyogi),
    "FedAdagrad": Row(lambda: FedAdagrad(**FEDOPT), fedadagrad),
    "FedProx": Row(lambda: FedProx(proximal_mu=2.0), fedprox),
    "FedMedian": Row(FedMedian, fedmedian),
    "FedTrimmedAvg": Row(lambda: FedTrimmedAvg(beta=0.25), fedtrimmedavg),
    "Krum": Row(lambda: Krum(num_malicious_nodes=1), multikrum(selected=1)),
    "MultiKrum": Row(lambda: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3), multikrum(selected=3)),
    "Bulyan": Row(lambda: Bulyan(num_malicious_nodes=1), bulyan),
    "QFedAvg": Row(lambda: QFedAvg(client_learning_rate=0.05, q=0.5), qfedavg),
    "fixed clipping by the server": Row(
        lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), NOISE, NORM, CLIENTS), fixed_clipping
    ),
    "fixed clipping by the clients": Row(
        lambda: DifferentialPrivacyClientSideFixedClipping(FedAvg(), NOISE, NORM, CLIENTS),
        fixed_clipping,
        (fixedclipping_mod,),
    ),
    "adaptive clipping by the server": Row(
        lambda: DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), NOISE, CLIENTS, NORM), adaptive_clipping
    ),
    "adaptive clipping by the clients": Row(
        lambda: DifferentialPrivacyClientSideAdaptiveClipping(FedAvg(), NOISE, CLIENTS, NORM),
        adaptive_clipping,
        (adaptiveclipping_mod,),
    ),
}


def check(state: RecordDict, row: Row, clients: Clients) -> None:
    """The model is that of the reference, and it is the one that all clients evaluated."""
    seed()
    model = row.reference(START, clients)
    np.testing.assert_allclose(unpack(state["arrays"]), model, rtol=1e-9)
    losses = np.array([gradient(model, client)[1] for client in range(CLIENTS)])
    assert state["evaluate"]["loss"] == pytest.approx(mean(losses, np.arange(CLIENTS)), rel=1e-9)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_it_computes_what_it_should(row: Row) -> None:
    check(run(row.make(), client_app(list(row.mods))), row, np.arange(CLIENTS))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_behind_the_gate_a_client_that_replies_nan_is_as_if_it_had_not_trained(row: Row) -> None:
    state = run(Gate(row.make()), client_app(list(row.mods), bad=BAD))
    check(state, row, np.delete(np.arange(CLIENTS), BAD))
    assert np.isfinite(unpack(state["arrays"])).all()


# ---- on Ray


@pytest.fixture(scope="module")
def ray_engine() -> Iterator[Engine]:
    with open_engine("ray", workers=2) as engine:
        yield engine


@pytest.mark.process
@pytest.mark.parametrize("name", ["FedAdam", "Krum", "adaptive clipping by the clients"])
def test_two_workers_give_the_bits_of_this_process(ray_engine: Engine, name: str) -> None:
    row = ROWS[name]
    there, here = (run(row.make(), client_app(list(row.mods)), engine) for engine in (ray_engine, "inprocess"))
    assert there.object_id == here.object_id
