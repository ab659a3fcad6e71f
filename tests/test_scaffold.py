"""SCAFFOLD against its algorithm by hand, closed forms of quadratic losses, and autograd."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federations import (
    DIGITS,
    finals,
    grid_of,
    holdout,
    initial_model,
    numbers,
    record,
    run,
    tiny,
    train_one,
    usable,
)
from flwr.app import ConfigRecord, Context, Message, RecordDict
from quadratics import Point, clients_of, kept, play, point, watch
from safetensors.torch import load_file
from torch import nn

from clients.client_app import app as client_app
from clients.federation import federation
from clients.objectives import Scaffold as Objective
from clients.objectives import Task
from clients.training import mean_gradient
from fedwsa import messages, models
from fedwsa.arrays import pack, unpack
from fedwsa.config import ConfigError, parse
from fedwsa.run_folder import StrategyFolder
from fedwsa.seeding import torch_generator, torch_seed
from fedwsa.simulation import open_engine, simulate
from strategies import FedAvg, Scaffold, build
from strategies.gate import Gate
from strategies.server_app import make_app

CURVATURES, CENTRES = (1.0, 4.0), ([1.0, -2.0], [3.0, 0.5])
OPTIMUM = np.array(CURVATURES) @ np.array(CENTRES) / sum(CURVATURES)
OPTIONS = ("I", "II")
NAMES = ("scaffold", "scaffold-wsa")


def scaffold(cohort=2, num_clients=2, **options):
    return Scaffold(cohort, num_clients=num_clients, **{"seed": 0, **options})


# ---- rounds by hand: f_1 = ½(w − 1)², f_2 = 2(w − 3)², x = 5, η = 0.1


@pytest.mark.parametrize(
    ("option", "controls", "c"),
    [
        ("I", [4.0, 8.0], 6.0),  # the gradients at x
        ("II", [3.8, 6.4], 5.1),  # the means of 4 and 3.6, and of 8 and 4.8
    ],
)
def test_a_round_of_two_steps_by_hand(option, controls, c):
    """5 → 4.6 → 4.24 and 5 → 4.2 → 3.72, mean 3.98."""
    app, strategy = clients_of(CURVATURES, ([1.0], [3.0]), steps=2), scaffold(option=option)
    ((x, grid),) = watch(strategy, app, 2, 1, point(5.0))
    np.testing.assert_allclose(x, [3.98], rtol=1e-12)
    np.testing.assert_allclose(kept(grid, "control", 1)[:, 0], controls, rtol=1e-12)
    np.testing.assert_allclose(strategy.control["w"], [c], rtol=1e-12)


@pytest.mark.parametrize("option", OPTIONS)
def test_two_rounds_of_one_step_by_hand(option):
    """Of one step the options are the same.

    Round 1: 4.6 and 4.2, mean 4.4; c_i = 4, 8, c = 6. Round 2: 4.4 − 0.1 (3.4 + 2) = 3.86, 4.4 − 0.1 (5.6 − 2) = 4.04.
    """
    app, strategy = clients_of(CURVATURES, ([1.0], [3.0]), steps=1), scaffold(option=option)
    (first, _), (second, grid) = watch(strategy, app, 2, 2, point(5.0))
    np.testing.assert_allclose([first, second], [[4.4], [3.95]], rtol=1e-12)
    np.testing.assert_allclose(kept(grid, "control", 1)[:, 0], [3.4, 5.6], rtol=1e-12)
    np.testing.assert_allclose(strategy.control["w"], [4.5], rtol=1e-12)


def test_server_learning_rate_by_hand():
    """From 5 half of the way to 4.4."""
    found = play(scaffold(server_learning_rate=0.5), clients_of(CURVATURES, ([1.0], [3.0]), steps=1), 2, 1, point(5.0))
    np.testing.assert_allclose(found, [4.7], rtol=1e-12)


def test_one_of_four_clients_moves_c_by_a_quarter():
    slopes = np.array([[1.0], [2.0], [3.0], [4.0]])
    app = clients_of([0.0] * 4, slopes.tolist(), steps=3, slopes=True)
    strategy = scaffold(1, 4)
    ((x, grid),) = watch(strategy, app, 4, 1, point(5.0))
    (drawn,) = grid.states
    np.testing.assert_allclose(strategy.control["w"], slopes[drawn] / 4, rtol=1e-12)
    np.testing.assert_allclose(x, 5 - 0.3 * slopes[drawn], rtol=1e-12)


# ---- properties


@pytest.mark.parametrize("cohort", [5, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("option", OPTIONS)
def test_c_is_the_mean_of_all_clients_after_each_round(option, momentum, cohort):
    rng = np.random.default_rng(1)
    app = clients_of(
        rng.uniform(0.5, 3, 5),
        rng.normal(size=(5, 3)).tolist(),
        steps=(1, 2, 3, 5, 9),
        learning_rate=0.02,
        momentum=momentum,
        examples=(1, 10, 100, 3, 7),
    )
    strategy = scaffold(cohort, 5, option=option, server_learning_rate=0.7)
    for _, grid in watch(strategy, app, 5, 8, point(5.0, 5.0, 5.0)):
        controls = kept(grid, "control", 3)
        np.testing.assert_allclose(controls.mean(0), strategy.control["w"], rtol=0, atol=1e-12)
        assert np.ptp(controls, axis=0).min() > 0.01


@pytest.mark.parametrize("steps", [10, (12, 3)])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_optimum_is_reached_where_fedavg_is_biased(option, steps):
    """FedAvg's fixed point: Σ (1 − ρ_k) c_k ÷ Σ (1 − ρ_k), ρ_k = (1 − η h_k)^K_k. The optimum: Σ h_k c_k ÷ Σ h_k."""
    app = clients_of(CURVATURES, CENTRES, steps=steps, examples=(30, 30))
    reached = 1 - (1 - 0.1 * np.array(CURVATURES)) ** np.array(steps)
    biased = reached @ np.array(CENTRES) / reached.sum()
    np.testing.assert_allclose(play(FedAvg(2, seed=0), app, 2, 200, point(5.0, 5.0)), biased, rtol=1e-9)
    assert np.abs(biased - OPTIMUM).min() > 0.1
    strategy = scaffold(option=option)
    found = play(strategy, app, 2, 150, point(5.0, 5.0))
    np.testing.assert_allclose(found, OPTIMUM, rtol=0, atol=1e-9)
    np.testing.assert_allclose(strategy.control["w"], 0, atol=1e-9)


def test_it_minimises_the_plain_mean_whatever_the_numbers_of_examples():
    app = clients_of(CURVATURES, CENTRES, steps=5, examples=(1, 99))
    np.testing.assert_allclose(play(scaffold(), app, 2, 150, point(5.0, 5.0)), OPTIMUM, rtol=0, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("option", OPTIONS)
def test_on_linear_losses_each_control_is_the_slope(option, momentum):
    """So it stays, whatever the numbers of steps; and then all clients go the same way."""
    slopes = np.array([[1.0, -2.0], [3.0, 0.5]])
    app = clients_of(CURVATURES, slopes.tolist(), steps=(3, 7), slopes=True, momentum=momentum)
    for _, grid in watch(scaffold(option=option), app, 2, 3, point(5.0, 5.0)):
        np.testing.assert_allclose(kept(grid, "control", 2), slopes, rtol=1e-12)


# ---- our client


def control(model, seed=7, factor=0.01):
    """A c that is not zero, for a model's parameters."""
    rng = torch.Generator().manual_seed(seed)
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    return {name: factor * torch.randn(each.shape, generator=rng) for name, each in trained}


def asked(config, model, c, *, option, **options):
    """The client's reply: its model, c_i⁺ − c_i, and all it keeps."""
    arrays = {"arrays": pack({n: each.clone() for n, each in model.state_dict().items()}), "control": pack(c)}
    settings = {messages.OBJECTIVE: "scaffold", messages.CONTROL_OPTION: option}
    reply, state = train_one(config, arrays, settings, client=2, **options)
    return unpack(reply["arrays"]), unpack(reply["control"]), state


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_option_1_is_the_gradient_of_the_mean_loss_at_the_servers_model(optimizer):
    config, model = tiny(optimizer=optimizer, learning_rate=0.01), models.build("mlp", *DIGITS, 1)
    _, change, state = asked(config, model, control(model), option="I")
    images, labels = federation(config).training_tensors(2)
    F.cross_entropy(model(images), labels).backward()
    assert len(labels) % config.batch_size
    for name, each in model.named_parameters():
        torch.testing.assert_close(change[name], each.grad, rtol=1e-4, atol=1e-7)
        assert torch.equal(unpack(state["control"])[name], change[name])


def trained_by_hand(model, correction, config, server_round):
    """Plain PyTorch: SGD on the batches' gradients and a constant; then the mean of the gradients without it."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    images, labels = federation(config).training_tensors(2)
    generator = torch_generator(config.seed[0], "client", server_round, 2)
    seen = []
    for _ in range(config.local_epochs):
        for batch in torch.split(torch.randperm(len(labels), generator=generator), config.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            decay = config.weight_decay
            seen.append({n: (w.grad + decay * w).detach().double() for n, w in model.named_parameters()})
            for name, weights in model.named_parameters():
                weights.grad += correction[name]
            optimizer.step()
    counts = [sum(config.momentum**j for j in range(len(seen) - k)) for k in range(len(seen))]
    return {n: sum(a * g[n] for a, g in zip(counts, seen, strict=True)) / sum(counts) for n in seen[0]}


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.1)])
def test_option_2_is_the_mean_gradient_of_the_steps(momentum, weight_decay):
    """Two rounds: in the second c_i is what the client kept. x − y loses digits of float32, hence the tolerance."""
    config = tiny(learning_rate=0.01, momentum=momentum, weight_decay=weight_decay, local_epochs=2)
    model, state = models.build("mlp", *DIGITS, 1), None
    own = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    for server_round in (1, 2):
        c = control(model, seed=server_round)
        found, change, state = asked(config, model, c, option="II", server_round=server_round, state=state)
        mean = trained_by_hand(model, {name: c[name] - own[name] for name in c}, config, server_round)
        for name, weights in model.state_dict().items():
            torch.testing.assert_close(found[name], weights, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(unpack(state["control"])[name].double(), mean[name], rtol=1e-2, atol=2e-5)
            torch.testing.assert_close(change[name].double(), mean[name] - own[name], rtol=1e-2, atol=2e-5)
        own = unpack(state["control"])


@pytest.mark.parametrize("name", ["federations:NormNet", "federations:DropoutNet"])
def test_the_pass_of_option_1_leaves_no_trace(name):
    """BatchNorm's statistics and dropout's random numbers are as in option II, whose first c_i is 0 too."""
    config, model = tiny(model=name), models.build(name, *DIGITS, 1)
    c = control(model, factor=0.0)
    (one, _, _), (other, _, _) = (asked(config, model, c, option=option) for option in OPTIONS)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_with_batch_norm_the_gradient_is_of_batches_as_they_train():
    config, model = tiny(model="federations:NormNet"), models.build("federations:NormNet", *DIGITS, 1)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    images, labels = federation(config).training_tensors(2)
    seed = torch_seed(0, "client", 1, 2)
    found = mean_gradient(model.eval(), images, labels, config, seed)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())
    model.train()
    for batch in torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).split(config.batch_size):
        (F.cross_entropy(model(images[batch]), labels[batch]) * len(batch) / len(labels)).backward()
    for name, each in model.named_parameters():
        torch.testing.assert_close(found[name], each.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("option", OPTIONS)
def test_what_stays_with_a_client_has_no_control(option):
    config, model = (
        tiny(model="federations:NormNet", batch_norm="local"),
        models.build("federations:NormNet", *DIGITS, 1),
    )
    c = control(model)
    _, change, state = asked(config, model, c, option=option)
    assert list(change) == list(c)
    still = {name for name, each in change.items() if not each.any()}
    assert still == {"2.weight", "2.bias"}
    assert {(n, each.shape, each.dtype) for n, each in change.items()} == {(n, e.shape, e.dtype) for n, e in c.items()}
    assert set(state["control"]) == set(c) - still


class TwoPoints(Point):
    def __init__(self):
        super().__init__(1)
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def test_a_parameter_that_the_loss_does_not_reach_has_the_gradient_zero():
    """It goes where c says, and its c_i⁺ is 0, not −c."""
    model, sent = TwoPoints(), {"w": np.array([3.0]), "unused": np.array([5.0])}
    settings = ConfigRecord({messages.CONTROL_OPTION: "II"})
    message = Message(RecordDict({"config": settings, "control": record(sent)}), 1, "train")
    context = Context(1, 1, {}, RecordDict(), {})
    objective = Objective(Task(model, dict(model.named_parameters()), message, context, tiny(learning_rate=0.1)))
    model.w.grad = torch.tensor([2.0], dtype=torch.float64)
    objective.add_gradient()
    with torch.no_grad():
        for each in model.parameters():
            each -= 0.1 * each.grad
    reply = RecordDict()
    objective.finish(reply, 1)
    assert numbers(reply["control"])["w"] == pytest.approx(2.0, rel=1e-12)
    assert numbers(reply["control"])["unused"] == pytest.approx(0.0, abs=1e-12)
    assert model.unused.item() == pytest.approx(-0.5, rel=1e-12)


def test_option_2_with_another_optimiser_is_refused():
    line = 'scaffold.option = "II": allowed with optimizer = "adam" is "I"'
    for name in NAMES:
        with pytest.raises(ConfigError) as caught:
            parse({"strategies": name, "optimizer": "adam"})
        assert str(caught.value) == line
        parse({"strategies": name, "optimizer": "adam", "scaffold": {"option": "I"}})
    parse({"strategies": "fedavg", "optimizer": "adam"})
    model = models.build("mlp", *DIGITS, 1)
    with pytest.raises(RuntimeError, match='option II knows steps of "sgd", not of "adam"; take option I'):
        asked(tiny(optimizer="adam"), model, control(model), option="II")


def test_a_c_of_another_model_is_refused_by_name():
    model = models.build("mlp", *DIGITS, 1)
    c = control(model)
    del c["layers.1.bias"]
    with pytest.raises(RuntimeError, match=r"array names differ from the model's: \['layers.1.bias'\]"):
        asked(tiny(), model, c, option="II")


def test_unknown_option_is_refused():
    with pytest.raises(ValueError, match="option must be I or II, got 'III'"):
        scaffold(option="III")


# ---- the server


def test_c_goes_out_in_the_parameters_type_and_is_kept_in_float64():
    strategy, grid = Scaffold(2, num_clients=6, seed=0), grid_of(client_app, 6)
    third = {
        f"control/{key}": torch.full(each.shape, 1 / 3, dtype=torch.float64) for key, each in initial_model().items()
    }
    strategy.load_state(dict(sorted(third.items(), reverse=True)))  # the order is the model's whatever the state's is
    for message in strategy.configure_train(1, pack(initial_model()), ConfigRecord(), grid):
        sent = message.content["control"]
        assert {(each.dtype, each.numpy().flat[0]) for each in sent.values()} == {("float32", np.float32(1 / 3))}
        assert {key: each.shape for key, each in sent.items()} == {k: v.shape for k, v in initial_model().items()}
        assert list(sent) == list(initial_model())
    assert all(torch.equal(strategy.state()[key], each) for key, each in third.items())


def test_config_reaches_the_strategy():
    config = tiny(num_clients=9, scaffold={"option": "I", "server-learning-rate": 0.5})
    one, default = (build("scaffold", each, holdout()) for each in (config, tiny()))
    assert (one.num_clients, one.option, one.server_learning_rate) == (9, "I", 0.5)
    assert (default.num_clients, default.option, default.server_learning_rate) == (6, "II", 1.0)
    assert one.parameters == set(initial_model())
    weighted, plain = ({"num-examples": number} for number in (7, 1))
    assert one.weigh(weighted) == one.weigh(plain) == build("scaffold-wsa", config, holdout()).weigh(weighted)


# ---- whole runs


def test_the_fold_gives_the_same_bits_as_the_server_alone(tmp_path):
    config = tiny(strategies=NAMES, num_clients=20, cohort=19)
    run(config, tmp_path / "folded")
    with patch.object(Gate, "folding", lambda self, server_round: None):
        run(config, tmp_path / "alone")
    assert finals(tmp_path / "folded", config) == finals(tmp_path / "alone", config)
    for name in NAMES:
        one, other = (
            load_file(tmp_path / each / name / "checkpoints" / "round-000002.safetensors")
            for each in ("folded", "alone")
        )
        assert all(torch.equal(one[key], other[key]) for key in one)
        kept = [StrategyFolder(tmp_path / each / name).resume().client_states for each in ("folded", "alone")]
        assert len(kept[0]) > 10
        assert kept[0].keys() == kept[1].keys()
        assert all(path.read_bytes() == kept[1][client].read_bytes() for client, path in kept[0].items())


@pytest.mark.process
@pytest.mark.timeout(120)
def test_workers_give_the_same_bits(tmp_path):
    """FedDyn's too: both keep arrays at clients, which travel."""
    config = tiny(strategies=(*NAMES, "feddyn", "feddyn-wsa"), num_clients=20, cohort=19, scaffold={"option": "I"})
    run(config, tmp_path / "here")
    with open_engine("ray", workers=2) as engine:
        app = make_app(tmp_path / "there", lambda strategy, event: None)
        simulate(app, client_app, config.num_clients, engine=engine, run_config=config.to_run_config())
    assert finals(tmp_path / "there", config) == finals(tmp_path / "here", config)
    for name in config.strategies:
        assert usable(tmp_path / "there", name) == [19, 19]
