"""Flower's own strategies from a config: each step by hand, and what is ours about them."""

from math import sqrt

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
import torch
from federations import canned, grid_of, holdout, lines, numbers, one_round, record, run, tiny
from flwr.app import Array, ConfigRecord
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from clients.client_app import evaluate_message, train_message
from fedwsa.config import ConfigError, parse
from strategies import FedAvg, build
from strategies.flowers import KrumRule, RobustRule, ServerOptimizer

OPTIMIZERS = ["fedavgm", "fedadam", "fedyogi", "fedadagrad"]
RULES = ["fedmedian", "fedtrimmedavg", "krum"]


def clients(*models: dict, examples: tuple[int, ...] | None = None):
    sizes = examples or (1,) * len(models)
    return canned(*[(model, {"num-examples": n, "loss": float(n)}) for model, n in zip(models, sizes, strict=True)])


def play(strategy, app, num_clients: int, start: dict, rounds: int = 2, first: int = 1) -> dict[str, np.ndarray]:
    grid, arrays = grid_of(app, num_clients), record(start)
    for server_round in range(first, first + rounds):
        arrays, _ = one_round(strategy, grid, arrays, server_round)
    return numbers(arrays)


# ---- the server's step; the mean of 1 and 5, weighed 1 to 3, is 4 in every round

TWO = clients({"w": np.array([1.0])}, {"w": np.array([5.0])}, examples=(1, 3))
AT_ZERO = {"w": np.array([0.0])}
MOMENTS = {"beta-1": 0.5, "beta-2": 0.75, "tau": 0.1, "server-learning-rate": 0.5}


def optimizer(name: str, **options) -> ServerOptimizer:
    strategy = build(name, tiny(cohort=2, strategies=(name,), **{name: options}), holdout())
    strategy.parameters = None
    return strategy


def test_fedavgm_by_hand():
    """v = −4, x = 2; v = −4/2 + 2 − 4 = −4, x = 4."""
    strategy = optimizer("fedavgm", **{"server-learning-rate": 0.5, "server-momentum": 0.5})
    assert play(strategy, TWO, 2, AT_ZERO)["w"] == [4.0]


def test_fedadam_by_hand():
    m, v = 0.5 * 4, 0.25 * 16
    x = 0.5 * sqrt(1 - 0.75**2) / (1 - 0.5**2) * m / (sqrt(v) + 0.1)
    m, v = 0.5 * m + 0.5 * (4 - x), 0.75 * v + 0.25 * (4 - x) ** 2
    x += 0.5 * sqrt(1 - 0.75**3) / (1 - 0.5**3) * m / (sqrt(v) + 0.1)
    np.testing.assert_allclose(play(optimizer("fedadam", **MOMENTS), TWO, 2, AT_ZERO)["w"], [x], rtol=1e-14)


def test_fedyogi_by_hand():
    """v = 4 after Δ² = 16; then Δ² is above v again, so that v grows by a quarter of it, whatever v is."""
    m, v = 0.5 * 4, 0.25 * 16
    x = 0.5 * m / (sqrt(v) + 0.1)
    assert (4 - x) ** 2 > v
    m, v = 0.5 * m + 0.5 * (4 - x), v + 0.25 * (4 - x) ** 2
    x += 0.5 * m / (sqrt(v) + 0.1)
    np.testing.assert_allclose(play(optimizer("fedyogi", **MOMENTS), TWO, 2, AT_ZERO)["w"], [x], rtol=1e-14)


def test_fedadagrad_by_hand():
    x = 0.5 * 4 / (4 + 0.1)
    x += 0.5 * (4 - x) / (sqrt(16 + (4 - x) ** 2) + 0.1)
    options = {key: MOMENTS[key] for key in ("tau", "server-learning-rate")}
    np.testing.assert_allclose(play(optimizer("fedadagrad", **options), TWO, 2, AT_ZERO)["w"], [x], rtol=1e-14)


THEIRS = {
    "fedavgm": flower.FedAvgM(server_momentum=0.9),
    "fedadam": flower.FedAdam(),
    "fedyogi": flower.FedYogi(),
    "fedadagrad": flower.FedAdagrad(),
    "fedmedian": flower.FedMedian(),
    "fedtrimmedavg": flower.FedTrimmedAvg(),
    "krum": flower.Krum(),
}


@pytest.mark.parametrize("name", THEIRS)
def test_defaults_and_arithmetic_are_flowers(name):
    """Flower's class by itself, which sees every reply, over three rounds; only FedAvgM has another default."""
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3), "b": (3,), "scale": ()}
    start, *models = [{key: np.asarray(rng.normal(size=shape)) for key, shape in shapes.items()} for _ in range(7)]
    app = clients(*models, examples=(1, 5, 2, 2, 9, 4))
    strategy = build(name, tiny(cohort=6), holdout())
    strategy.parameters = None
    ours, theirs = play(strategy, app, 6, start, 3), play(THEIRS[name], app, 6, start, 3)
    for key in shapes:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_on_from_a_state_is_bit_identical_and_needs_it(name):
    rng = np.random.default_rng(1)
    one, other, start = ({"b": rng.normal(size=3), "a": rng.normal(size=()), "10": rng.normal(size=2)} for _ in "123")
    app = clients(*[{key: np.float32(value) for key, value in model.items()} for model in (one, other)])
    start = {key: np.float32(value) for key, value in start.items()}
    whole = play(optimizer(name), app, 2, start, 4)
    before, after, forgetful = optimizer(name), optimizer(name), optimizer(name)
    middle = play(before, app, 2, start, 2)
    after.load_state(before.state())
    forgetful.load_state({})
    ends = [play(strategy, app, 2, middle, 2, first=3) for strategy in (after, forgetful)]
    for key in whole:
        assert ends[0][key].dtype == np.float32
        assert ends[0][key].tobytes() == whole[key].tobytes()
        assert ends[1][key].tobytes() != whole[key].tobytes()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_statistics_and_counters_are_averaged_and_the_rest_is_stepped(name, tmp_path):
    config = tiny(model="federations:NormNet", rounds=1, fedavgm={"server-learning-rate": 0.5})
    run(config.model_copy(update={"strategies": ("fedavg", name)}), tmp_path)
    mean, stepped = (load_file(tmp_path / each / "final.safetensors") for each in ("fedavg", name))
    same = {key for key in mean if torch.equal(mean[key], stepped[key])}
    assert same - {"1.bias"} == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}  # BatchNorm undoes a bias


def test_a_weight_under_two_names_is_stepped_under_both(tmp_path):
    """The client loads both into one tensor: the later name would undo the server's step."""
    run(tiny(strategies=("fedavg", "fedyogi"), model="federations:TiedNet", rounds=1), tmp_path)
    mean, stepped = (load_file(tmp_path / name / "final.safetensors") for name in ("fedavg", "fedyogi"))
    assert torch.equal(stepped["body.weight"], stepped["again.weight"])
    assert not torch.equal(stepped["again.weight"], mean["again.weight"])


def test_momentum_makes_fedavgm_another_in_the_second_round(tmp_path):
    run(tiny(strategies=("fedavg", "fedavgm"), fedavgm={"server-momentum": 0.0}), tmp_path / "none")
    run(tiny(strategies=("fedavgm",)), tmp_path / "some")
    files = ("none/fedavg", "none/fedavgm", "some/fedavgm")
    models = [(tmp_path / name / "final.safetensors").read_bytes() for name in files]
    assert models[0] == models[1]
    assert models[1] != models[2]


# ---- rules that withstand bad clients


def rule(name: str, cohort: int, **options) -> RobustRule:
    strategy = build(name, tiny(num_clients=9, cohort=cohort, strategies=(name,), **options), holdout())
    strategy.parameters = None  # of Krum; the hold-out's model is another
    return strategy


def one(*values: float) -> list[dict]:
    return [{"w": np.float32([value]), "steps": np.asarray(int(value))} for value in values]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("fedmedian", (3, 1, 1e6), 3),
        ("fedmedian", (3, 1, 1e6, 4), 3.5),
        ("fedtrimmedavg", (3, 1, 1e6, 4, 8), 5),  # 20 % of five at either end
        ("fedtrimmedavg", (3, 1, 8, 4), 4),  # of four none
        ("krum", (4, 1, 1e6, 3, 4.5), 3),  # of three squares: 1 + 4 + 2.25; of 4 it is 0.25 + 1 + 9
    ],
)
def test_rules_by_hand(name, values, expected):
    """Whatever a client says that it holds: the first says a hundred."""
    app = clients(*one(*values), examples=(100,) + (1,) * (len(values) - 1))
    arrays = play(rule(name, len(values)), app, len(values), one(0)[0], rounds=1)
    assert arrays["w"].tolist() == [expected]
    assert (arrays["w"].dtype, arrays["steps"].dtype) == (np.float32, np.int64)
    assert arrays["steps"] == round(expected)


def test_krum_is_the_least_sum_over_the_nearest():
    """K = 6, f = 1: three nearest others each; spelled out pair by pair."""
    points = np.random.default_rng(3).normal(size=(6, 4))
    squares = np.array([[((a - b) ** 2).sum() for b in points] for a in points])
    sums = [sorted(np.delete(row, k))[:3] for k, row in enumerate(squares)]
    best = int(np.argmin([sum(each) for each in sums]))
    app = clients(*[{"w": point} for point in points])
    strategy = KrumRule(6, flower.Krum(num_malicious_nodes=1), seed=0)
    assert play(strategy, app, 6, {"w": np.zeros(4)}, rounds=1)["w"].tobytes() == points[best].tobytes()


def test_krum_compares_in_double_precision_and_no_buffers():
    """About 10⁴ float32 tells squares of distances below 1 from each other no more; a counter would outweigh them."""
    offsets, counters = (0.0, 0.25, 0.5, 5.0), (10, 500, 1, 10)
    models = [
        {"w": np.float32([1e4 + offset]), "steps": np.asarray(count), "var": np.float32([count])}
        for offset, count in zip(offsets, counters, strict=True)
    ]
    strategy = KrumRule(4, flower.Krum(), parameters={"w"}, seed=0)
    arrays = play(strategy, clients(*models), 4, models[0], rounds=1)
    assert arrays["w"] == np.float32(1e4 + 0.25)  # 0.25² twice
    assert (arrays["steps"], arrays["var"]) == (500, 500.0)  # and all else is that client's


@pytest.mark.parametrize("name", RULES)
def test_metrics_and_scopes_are_those_of_all_clients(name):
    """Metrics by examples as everywhere; scopes alike, as the rules take models."""
    w = np.zeros((2, 2), np.float32)
    replies = [
        ({"w": w}, {"num-examples": n, "loss": n, "scope-means": [float(n)], "scope-variances": [1.0]})
        for n in (1.0, 2.0, 5.0)
    ]
    _, metrics = one_round(rule(name, 3), grid_of(canned(*replies), 3), record({"w": w}))
    assert metrics["loss"] == 30 / 8
    assert metrics["scope-means"] == [pytest.approx(8 / 3)]


@pytest.mark.parametrize("name", RULES)
def test_one_bad_client_does_not_carry_the_run_away(name, tmp_path):
    """A client that sends 10⁶ times what it learned, in a run of our ServerApp."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        reply = train_message(message, context)
        if context.node_config["partition-id"] == 2:
            for key, array in list(reply.content["arrays"].items()):
                reply.content["arrays"][key] = Array(array.numpy() * np.float32(1e6))
        return reply

    app.evaluate()(evaluate_message)
    options = {"fedtrimmedavg": {"beta": 0.3}, "krum": {"num-malicious": 1}, "num_clients": 6, "cohort": 6}
    run(tiny(strategies=("fedavg", name), rounds=1, **options), tmp_path, app)
    widest = {each: max_of(tmp_path / each) for each in ("fedavg", name)}
    assert widest["fedavg"] > 1e3
    assert widest[name] < 1
    assert lines(tmp_path / name / "metrics.jsonl")[1]["num_failed"] == 0


def max_of(folder) -> float:
    return max(tensor.abs().max().item() for tensor in load_file(folder / "final.safetensors").values())


# ---- the config


def test_options_reach_flowers_classes():
    values = {"beta-1": 0.1, "beta-2": 0.2, "tau": 0.3, "server-learning-rate": 0.4}
    few = {key: values[key] for key in ("tau", "server-learning-rate")}
    config = tiny(fedadam=values, fedyogi=values, fedadagrad=few, fedtrimmedavg={"beta": 0.1})
    for name in ("fedadam", "fedyogi", "fedadagrad"):
        theirs = build(name, config, holdout()).flowers
        assert (theirs.tau, theirs.eta) == (0.3, 0.4)
        if name != "fedadagrad":
            assert (theirs.beta_1, theirs.beta_2) == (0.1, 0.2)
    assert build("fedtrimmedavg", config, holdout()).flowers.beta == 0.1


def test_krum_needs_a_cohort_of_2f_plus_3():
    values = {"strategies": "krum-wsa", "cohort": 6, "krum": {"num-malicious": 2}}
    line = r"^krum.num-malicious = 2: of a cohort of 6 fewer must be bad; allowed is at most \(cohort − 3\)/2$"
    with pytest.raises(ConfigError, match=line):
        parse(values)
    parse({**values, "cohort": 7})
    parse({**values, "strategies": "fedavg"})


def test_they_draw_the_cohorts_of_fedavg():
    def drawn(strategy) -> list[int]:
        outgoing = strategy.configure_train(3, record(AT_ZERO), ConfigRecord(), grid_of(clients(), 9))
        return [message.metadata.dst_node_id for message in outgoing]

    for name in (*OPTIMIZERS, *RULES):
        assert drawn(build(name, tiny(num_clients=9), holdout())) == drawn(FedAvg(3, seed=0))
