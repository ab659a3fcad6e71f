"""FedNova where its path has a closed form: linear losses, quadratic losses with unlike steps, and buffers."""

import pickle

import numpy as np
import pytest
import torch
from federations import ask, canned, client_app, grid_of, holdout, initial_model, numbers, one_round, record, tiny
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratics import clients_of, play, point

from clients.federation import federation
from fedwsa import messages
from fedwsa.arrays import pack
from fedwsa.config import ConfigError, parse
from fedwsa.momentum import accumulated
from fedwsa.simulation.folding import Tree
from strategies import FedAvg, WeightScopeAlignment
from strategies.fednova import FedNova
from strategies.gate import Gate

CURVATURES, CENTRES, STEPS = (1.0, 4.0), ([1.0, -2.0], [3.0, 0.5]), (2, 17)
OPTIMUM = np.array([[1.0, -2.0], [12.0, 2.0]]).sum(0) / 5  # Σ h c/Σ h, of equal shares


# ---- how long the way is


@given(steps=st.integers(1, 60), momentum=st.floats(0, 0.999))
def test_accumulated_is_how_far_sgd_goes(steps, momentum):
    """Under a gradient that is always 1, at a learning rate of 1."""
    weight = torch.zeros(1, dtype=torch.float64)
    weight.grad = torch.ones(1, dtype=torch.float64)
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=momentum)
    for _ in range(steps):
        optimizer.step()
    assert accumulated(steps, momentum) == pytest.approx(-weight.item(), rel=1e-10)


def test_accumulated_by_hand():
    """Momentum ½: the steps go 1, 1.5, 1.75."""
    assert [accumulated(steps, 0.5) for steps in (1, 2, 3)] == [1, 2.5, 4.25]
    assert accumulated(7, 0.0) == 7


# ---- the step


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("examples", [(1, 1, 1), (10, 40, 50)])
def test_linear_losses_move_by_the_mean_gradient_whatever_the_steps(momentum, examples):
    """Δ = −η τ_eff Σ p_k g_k; the momentum's weights are summed here one by one."""
    steps, slopes = (1, 4, 30), ([1.0, 0.0], [-2.0, 0.5], [0.0, 3.0])
    app = clients_of((1,) * 3, slopes, steps=steps, slopes=True, examples=examples, momentum=momentum)
    found = play(FedNova(3, momentum=momentum, seed=0), app, 3, 1, point(5.0, -5.0))
    shares = np.array(examples) / sum(examples)
    ways = [sum(momentum**j for last in range(number) for j in range(last + 1)) for number in steps]
    expected = np.array([5.0, -5.0]) - 0.1 * (shares @ ways) * (shares @ np.array(slopes))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def fixed_point(rate: float, *, normalised: bool) -> np.ndarray:
    """Client k ends at c_k + r_k (x − c_k), r_k = (1 − ηh_k)^τ_k: Σ (1 − r_k)/τ_k (x − c_k) = 0, or without the τ_k."""
    pulls = 1 - (1 - rate * np.array(CURVATURES)) ** np.array(STEPS)
    pulls = pulls / np.array(STEPS) if normalised else pulls
    return pulls @ np.array(CENTRES) / pulls.sum()


@pytest.mark.parametrize("rate", [0.1, 0.01])
def test_fixed_point_with_unlike_steps(rate):
    app = clients_of(CURVATURES, CENTRES, steps=STEPS, learning_rate=rate)
    for strategy, normalised in ((FedNova(2, seed=0), True), (FedAvg(2, seed=0), False)):
        found = play(strategy, app, 2, 100 if rate == 0.1 else 400, point(5.0, 5.0))
        np.testing.assert_allclose(found, fixed_point(rate, normalised=normalised), rtol=1e-6)


def test_with_small_steps_the_optimum_is_reached_where_fedavg_stays_biased():
    """By the closed forms that the test above holds the strategies against."""
    nova, avg = (
        [np.linalg.norm(fixed_point(rate, normalised=normalised) - OPTIMUM) for rate in (1e-2, 1e-3, 1e-4)]
        for normalised in (True, False)
    )
    assert nova[1] < 0.2 * nova[0]
    assert nova[2] < 0.2 * nova[1] < 0.01
    assert min(avg) > 0.4  # the limit: pulls τ_k h_k, 2 and 68 instead of 1 and 4


@pytest.mark.parametrize("examples", [(1, 1), (30, 10)])
def test_equal_steps_are_fedavg_but_for_rounding(examples):
    app = clients_of(CURVATURES, CENTRES, steps=7, examples=examples, momentum=0.5)
    plain, ours = (play(s, app, 2, 3, point(5.0, 5.0)) for s in (FedAvg(2, seed=0), FedNova(2, momentum=0.5, seed=0)))
    np.testing.assert_allclose(ours, plain, rtol=1e-13)


MODELS = (
    {"w": np.float32([2]), "norm.running": np.float32([1]), "norm.count": np.asarray(10)},
    {"w": np.float32([6]), "norm.running": np.float32([5]), "norm.count": np.asarray(30)},
)
START = {"w": np.float32([0]), "norm.running": np.float32([100]), "norm.count": np.asarray(0)}


def of_models(*metrics: dict[str, float]):
    return grid_of(canned(*zip(MODELS, metrics, strict=True)), 2)


def test_by_hand_and_what_is_no_parameter_is_averaged_as_fedavg_does():
    """p = ¼, ¾; d = −2/1, −6/4; τ_eff = ¼·1 + ¾·4 = 3.25: 3.25 · (¼·2 + ¾·1.5) = 5.28125."""
    grid = of_models(
        {"num-examples": 1, "local-steps": 1, "loss": 2.0}, {"num-examples": 3, "local-steps": 4, "loss": 4.0}
    )
    arrays, metrics = one_round(FedNova(2, parameters={"w"}, seed=0), grid, record(START))
    assert {name: values.tolist() for name, values in numbers(arrays).items()} == {
        "w": [5.28125],
        "norm.running": [4],
        "norm.count": 25,
    }
    assert list(arrays) == list(START)
    assert arrays["norm.count"].numpy().dtype == np.int64
    assert dict(metrics) == {"loss": 3.5}  # the steps are no metric of the round


def test_without_names_every_floating_array_is_a_parameter():
    grid = of_models({"num-examples": 1, "local-steps": 1}, {"num-examples": 1, "local-steps": 2})
    arrays, _ = one_round(FedNova(2, seed=0), grid, record(START))
    assert numbers(arrays)["norm.running"].tolist() == [100 + 1.5 * 0.5 * (-99 - 95 / 2)]
    assert numbers(arrays)["norm.count"].tolist() == 20


# ---- in parts


@given(examples=st.lists(st.integers(1, 10**6), min_size=1, max_size=40))
@settings(max_examples=30)
def test_workers_parts_come_to_the_same_bits(examples):
    strategy = FedNova(1, momentum=0.9, parameters={"w"}, seed=0)
    strategy.configure_train(1, record(START), ConfigRecord(), grid_of(canned(({}, {})), 1))
    make = strategy.folding()

    def part(position: int):
        rng = np.random.default_rng(position)
        arrays = {"w": rng.normal(size=3), "norm.running": rng.normal(size=2), "norm.count": np.asarray(position)}
        metrics = MetricRecord({"num-examples": examples[position], "local-steps": int(rng.integers(1, 99))})
        one = make()
        one.add(Message(RecordDict({"arrays": record(arrays), "metrics": metrics}), 1, "train"))
        return one

    def total(sizes: list[int]):
        whole, position = Tree(), 0
        for size in sizes:
            piece = Tree()
            for _ in range(size):
                piece.push(1, part(position))
                position += 1
            whole.push(size, pickle.loads(pickle.dumps(piece.total())))
        folded = whole.total()
        parts = (folded.model.record(), folded.others.record())
        return folded.gradients, folded.model.weight, [numbers(each) for each in parts]

    pairs, odd = divmod(len(examples), 2)
    assert repr(total([1] * len(examples))) == repr(total([2] * pairs + [1] * odd))


# ---- the number of steps


def test_our_client_tells_its_steps():
    config = tiny(local_epochs=3, batch_size=16)
    _, metrics = ask(config, client=2, settings={messages.OBJECTIVE: "fednova"})
    assert metrics["local-steps"] == 3 * -(-len(federation(config).training_tensors(2)[1]) // 16)
    assert "local-steps" not in ask(config, client=2)[1]


@pytest.mark.parametrize("wrap", [lambda inner: inner, WeightScopeAlignment])
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("steps", [None, 0, -1, 0.5, 10**9 + 1, float("nan"), [4]])
def test_a_reply_without_usable_steps_is_left_out(steps, fold, wrap):
    bad = {"num-examples": 1} if steps is None else {"num-examples": 1, "local-steps": steps}
    grid = of_models({"num-examples": 3, "local-steps": 4}, bad)
    gate = Gate(wrap(FedNova(2, parameters={"w"}, seed=0)))
    outgoing = gate.configure_train(1, record(START), ConfigRecord(), grid)
    if fold:
        arrays, _ = gate.conclude_train(1, grid.fold(outgoing, gate.folding(1)))
    else:
        arrays, _ = gate.aggregate_train(1, grid.send_and_receive(outgoing))
    assert numbers(arrays)["w"].tolist() == [2]
    assert gate.failures == [f"node 1001: local-steps is {bad.get('local-steps')!r}, not a number in [1, 1000000000]"]


def test_others_need_not_tell_their_steps():
    gate, grid = Gate(FedAvg(2, seed=0)), of_models({"num-examples": 1}, {"num-examples": 1, "local-steps": 0})
    outgoing = gate.configure_train(1, record(START), ConfigRecord(), grid)
    gate.aggregate_train(1, grid.send_and_receive(outgoing))
    assert gate.failures == []


# ---- the config


def test_the_clients_momentum_is_the_configs():
    strategy = FedNova.from_config(tiny(momentum=0.9), holdout())
    assert strategy.momentum == 0.9
    assert strategy.weigh(MetricRecord({"num-examples": 29, "local-steps": 3})) == pytest.approx(29 / (1 + 1.9 + 2.71))


def test_other_optimizers_are_refused():
    line = 'optimizer = "adam": fednova knows how far steps of SGD go; allowed with it is "sgd"'
    with pytest.raises(ConfigError, match=line):
        parse({"strategies": "fednova-wsa", "optimizer": "adam"})
    parse({"strategies": "fedavg", "optimizer": "adam"})


def test_equal_steps_in_a_real_round_are_fedavg_but_for_rounding():
    """Two steps at each client, since one batch holds all of its samples."""
    config = tiny(batch_size=2000, momentum=0.9, local_epochs=2)
    plain, ours = (
        one_round(
            kind.from_config(config, holdout()), grid_of(client_app, 6, config.to_run_config()), pack(initial_model())
        )
        for kind in (FedAvg, FedNova)
    )
    for name, values in numbers(plain[0]).items():
        np.testing.assert_allclose(numbers(ours[0])[name], values, rtol=1e-6, atol=1e-7)
    assert ours[1]["loss"] == plain[1]["loss"]
