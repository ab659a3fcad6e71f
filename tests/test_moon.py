"""MOON's contrast by hand and against autograd, what a client keeps for it, and what it must not touch."""

import gc
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federations import NormNet, holdout, initial_model, tiny, train_one
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import nn

from clients import client_app
from clients.federation import federation
from clients.objectives import Task
from clients.objectives.moon import Moon as Objective
from clients.objectives.moon import contrastive
from fedwsa import messages, models
from fedwsa.arrays import pack, view
from fedwsa.seeding import torch_generator
from fedwsa.simulation import open_engine, simulate
from fedwsa.simulation.engine import identify
from strategies import FedAvg
from strategies.moon import Moon
from strategies.server_app import make_app

ASKED = {messages.OBJECTIVE: "moon", messages.CONTRASTIVE_MU: 3.0, messages.TEMPERATURE: 0.5}


def model_of(content: RecordDict, key: str = "arrays") -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(view(array))) for name, array in content[key].items()}


def ask(config, start, state=None, **options):
    return train_one(config, {"arrays": pack(start)}, ASKED, state=state, **options)


# ---- the contrast


def test_contrast_by_hand():
    """Cosines 1 and 0, then 0.6 and 0.8; at τ = ½ that is log(1 + e⁻²) and log(1 + e^0.4)."""
    own = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    received, previous = torch.tensor([[7.0, 0.0], [8.0, 6.0]]), torch.tensor([[0.0, 1.0], [3.0, 4.0]])
    each = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(0.4))]
    for rows in ([0], [1], [0, 1]):
        found = contrastive(own[rows], received[rows], previous[rows], 0.5)
        assert found.item() == pytest.approx(np.mean([each[row] for row in rows]), rel=1e-6)
    assert contrastive(own, received, received, 0.1).item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_contrast_is_the_cross_entropy_of_two_cosines_and_so_is_its_gradient(temperature):
    rng = torch.Generator().manual_seed(0)
    draws = [torch.randn(6, 4, dtype=torch.float64, generator=rng).requires_grad_() for _ in range(3)]
    own = draws[0]
    found = torch.autograd.grad(contrastive(*draws, temperature), own)
    unit = [each / each.norm(dim=1, keepdim=True) for each in draws]
    likeness = torch.stack([(unit[0] * other).sum(1) for other in unit[1:]]) / temperature
    odds = likeness.exp() / likeness.exp().sum(0)
    expected = torch.autograd.grad(-odds[0].log().mean(), own)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# ---- our client


def steps_by_hand(config, start, server_round, client, previous=None):
    """A plain loop in which autograd differentiates the loss and the contrast, and the model it ends at."""
    model, received, other = (models.build("mlp", (1, 8, 8), 10, seed=0) for _ in range(3))
    model.load_state_dict(start)
    received.load_state_dict(start)

    def represent(network, images):
        units = images.flatten(1)
        for layer in network.layers[:-1]:
            units = torch.relu(F.linear(units, layer.weight, layer.bias))
        return units

    if previous:
        other.load_state_dict(previous)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate)
    images, labels = federation(config).training_tensors(client)
    generator = torch_generator(config.seed[0], "client", server_round, client)
    for _ in range(config.local_epochs):
        for batch in torch.split(torch.randperm(len(labels), generator=generator), config.batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            if previous:
                own = represent(model, images[batch])
                cosines = [
                    nn.CosineSimilarity(dim=1)(own, represent(each, images[batch]).detach())
                    for each in (received, other)
                ]
                targets = torch.zeros(len(batch), dtype=torch.int64)
                loss = loss + 3.0 * F.cross_entropy(torch.stack(cosines, 1) / 0.5, targets)
            loss.backward()
            optimizer.step()
    return model.state_dict()


def test_two_rounds_are_the_loop_that_autograd_differentiates():
    """In the second the client's own model is that after its first training, not the server's of then."""
    config = tiny(learning_rate=0.05, local_epochs=2)
    first, state = ask(config, initial_model(1), client=2, server_round=4)
    by_hand = steps_by_hand(config, initial_model(1), 4, 2)
    assert_close(model_of(first), by_hand)
    assert_close(model_of(state, "previous"), by_hand)
    second, state = ask(config, initial_model(7), state, client=2, server_round=9)
    assert_close(model_of(second), steps_by_hand(config, initial_model(7), 9, 2, previous=by_hand))
    assert_close(model_of(state, "previous"), model_of(second))
    plain = steps_by_hand(config, initial_model(7), 9, 2)
    assert not all(torch.allclose(model_of(second)[name], plain[name], atol=1e-4) for name in plain)


def assert_close(model, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(model[name], tensor, rtol=1e-5, atol=1e-6)


def test_reported_loss_is_the_tasks():
    config = tiny(batch_size=2000)  # one step, from the server's model
    _, state = ask(config, initial_model(1))
    second, _ = ask(config, initial_model(1), state)
    plain, _ = train_one(config, {"arrays": pack(initial_model(1))}, {})
    assert second["metrics"]["loss"] == plain["metrics"]["loss"]


def objective_of(model, previous) -> Objective:
    """With a model of the client's own from before."""
    identify()
    context = Context(1, 1, {}, RecordDict({"previous": pack(previous)}), {})
    message = Message(RecordDict({"config": ConfigRecord(ASKED)}), 1, "train")
    return Objective(Task(model, dict(model.named_parameters()), message, context, tiny()))


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_gradients_go_into_the_model_that_trains_alone():
    model = NormNet((1, 8, 8), 10)
    objective = objective_of(model, NormNet((1, 8, 8), 10).state_dict())
    images = torch.randn(5, 1, 8, 8)
    model(images)
    objective.penalty(images).backward()
    others = [parameter for other in objective.others for parameter in other.parameters()]
    assert all(parameter.grad is None for parameter in others)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {name for name, grad in grads.items() if grad is None} == {"4.weight", "4.bias"}  # behind the representation
    assert all(grad.abs().sum() > 0 for name, grad in grads.items() if name in ("1.weight", "2.weight"))


def test_the_other_models_stay_as_they_are_and_draw_nothing():
    """The server's and the client's own: BatchNorm in eval mode, no dropout."""

    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    model, previous = Net().train(), Net()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objective = objective_of(model, {name: tensor.clone() for name, tensor in previous.state_dict().items()})
    images = torch.randn(5, 1, 8, 8)
    model(images)
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state()
    objective.penalty(images)
    assert torch.equal(torch.get_rng_state(), drawn)
    for module, expected in (
        (model, after),
        (objective.others[0], start),
        (objective.others[1], previous.state_dict()),
    ):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())
    assert after["2.num_batches_tracked"] == start["2.num_batches_tracked"] + 1
    assert model.training
    assert not any(module.training for other in objective.others for module in other.modules())


def test_counters_of_batches_count_the_steps():
    config = tiny(model="federations:NormNet", local_epochs=3)
    start = NormNet((1, 8, 8), 10).state_dict()
    first, state = ask(config, start)
    second, state = ask(config, start, state, server_round=2)
    steps = 3 * -(-len(federation(config).training_tensors(0)[1]) // config.batch_size)
    for content, key in ((first, "arrays"), (second, "arrays"), (state, "previous")):
        assert model_of(content, key)["2.num_batches_tracked"] == steps


# ---- the module is everybody's


@pytest.fixture
def module(monkeypatch) -> list[nn.Module]:
    """The modules that our client trained, in order."""
    seen: list[nn.Module] = []

    def watched(model, *rest):
        seen.append(model)
        assert hooks_of(model) <= 1
        return train(model, *rest)

    train = client_app.train
    monkeypatch.setattr(client_app, "train", watched)
    return seen


def test_no_hook_is_left(module):
    config = tiny()
    _, state = ask(config, initial_model())
    ask(config, initial_model(), state, server_round=2)
    assert module[0] is module[1]
    assert hooks_of(module[0]) == 0


def test_no_hook_is_left_by_a_training_that_fails(module, monkeypatch):
    config = tiny()
    _, state = ask(config, initial_model())
    monkeypatch.setattr("clients.objectives.moon.contrastive", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        ask(config, initial_model(), state, server_round=2)
    assert module[0] is module[1]
    gc.collect()
    assert hooks_of(module[0]) == 0


class Convolution(nn.Module):
    """No linear layer."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, num_classes, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).flatten(1)


def test_a_model_without_a_linear_layer_is_refused():
    with pytest.raises(ValueError, match=r"moon: contrasts what goes into the last nn\.Linear; Convolution has none"):
        objective_of(Convolution((1, 8, 8), 10), Convolution((1, 8, 8), 10).state_dict())


def test_a_kept_model_of_another_kind_is_named():
    with pytest.raises(ValueError, match="array names differ from the model's"):
        objective_of(NormNet((1, 8, 8), 10), initial_model())


# ---- runs


def final(folder, engine="inprocess", **changes) -> dict[str, bytes]:
    config = tiny(**{"num_clients": 4, "cohort": 3, **changes})
    app = make_app(folder, lambda strategy, event: None)
    simulate(app, client_app.app, config.num_clients, engine=engine, run_config=config.to_run_config())
    return {name: (folder / name / "final.safetensors").read_bytes() for name in config.strategies}


def test_mu_zero_is_fedavg_bit_for_bit(tmp_path):
    found = final(tmp_path, strategies=("fedavg", "moon", "fedavg-wsa", "moon-wsa"), moon={"mu": 0.0}, rounds=3)
    assert found["moon"] == found["fedavg"]
    assert found["moon-wsa"] == found["fedavg-wsa"]


def test_the_first_round_is_fedavgs_and_later_ones_are_not(tmp_path):
    found = final(tmp_path, strategies=("fedavg", "moon"), rounds=1)
    assert found["moon"] == found["fedavg"]
    found = final(tmp_path / "more", strategies=("fedavg", "moon"), rounds=3)
    assert found["moon"] != found["fedavg"]


@pytest.mark.process
def test_on_ray_the_same_bytes(tmp_path):
    """FedNova's, FedExP's and FedLWS's too: what clients keep travels, and workers fold the replies."""
    changes = {"strategies": ("moon-wsa", "fednova", "fednova-wsa", "fedexp-wsa", "fedlws"), "rounds": 3}
    here = final(tmp_path / "here", momentum=0.9, **changes)
    with open_engine("ray", workers=2) as engine:
        there = final(tmp_path / "there", engine=engine, momentum=0.9, **changes)
    assert there == here


@pytest.mark.parametrize("policy", ["aggregate", "local"])
def test_a_run_goes_on_bit_for_bit(tmp_path, policy):
    """Clients come again in rounds 3 and 4 to what they kept in 1 and 2."""
    changes = {"strategies": ("moon", "moon-wsa"), "model": "federations:NormNet", "batch_norm": policy}
    whole = final(tmp_path / "whole", rounds=4, **changes)
    final(tmp_path / "parts", rounds=2, **changes)
    for name in whole:
        (tmp_path / "parts" / name / "final.safetensors").unlink()
    assert final(tmp_path / "parts", rounds=4, **changes) == whole


def test_the_client_keeps_its_own_batch_norm_where_it_is_local():
    config = tiny(model="federations:NormNet", batch_norm="local")
    start = NormNet((1, 8, 8), 10).state_dict()
    reply, state = ask(config, start)
    assert torch.equal(model_of(reply)["2.weight"], start["2.weight"])
    assert not torch.equal(model_of(state, "previous")["2.weight"], start["2.weight"])
    assert torch.equal(model_of(reply)["1.weight"], model_of(state, "previous")["1.weight"])


def test_the_config_reaches_the_clients():
    strategy = Moon.from_config(tiny(moon={"mu": 5.0, "temperature": 0.1}), holdout())
    assert (strategy.mu, strategy.temperature) == (5.0, 0.1)
    assert strategy.weigh is FedAvg.weigh
