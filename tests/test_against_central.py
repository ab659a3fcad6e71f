"""On data that are alike, a federation learns what one machine with all the data would."""

import helpers
import pytest
import torch
import torch.nn.functional as F
from federations import lines, run

from clients.federation import federation
from fedwsa import models
from fedwsa.config import Config
from fedwsa.run_folder import sha256
from fedwsa.seeding import torch_seed
from strategies import STRATEGIES

OF_ONE_CLIENT = {"krum", "local-only"}  # their models know one client's samples
NAMES = tuple(name for name in STRATEGIES if name not in OF_ONE_CLIENT)

ALIKE = Config(
    strategies=NAMES, num_clients=10, cohort=10, evaluation_cohort=0, alpha=(100.0,), rounds=20, local_epochs=5
)
FASHION_MNIST = ALIKE.model_copy(
    update={
        "strategies": ("fedavg",),
        "data": "fashion-mnist",
        "num_clients": 4,
        "cohort": 4,
        "rounds": 5,
        "local_epochs": 2,
    }
)


def central_accuracy(config: Config) -> float:
    """Test accuracy of plain PyTorch: the clients' training samples in one place, as many epochs, the same model."""
    holdings = federation(config)
    indices = torch.cat([torch.from_numpy(part) for part in holdings.training]).numpy()
    images, labels = holdings.dataset.train_tensors(indices)
    model = models.build(config.model, holdings.dataset.input_shape, 10, torch_seed(config.seed[0], "model"))
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(config.rounds * config.local_epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(config.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    images, labels = holdings.dataset.test_tensors()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def final_accuracies(config: Config, folder) -> dict[str, float]:
    """Of the last round, not of the best."""
    run(config, folder)
    last = {name: lines(folder / name / "metrics.jsonl")[-1] for name in config.strategies}
    assert {(event["round"], event["phase"]) for event in last.values()} == {(config.rounds, "evaluate-server")}
    return {name: event["metrics"]["accuracy"] for name, event in last.items()}


@pytest.mark.process
def test_digits_are_learned_as_by_one_machine(tmp_path):
    central, federated = central_accuracy(ALIKE), final_accuracies(ALIKE, tmp_path)
    assert central > 0.95
    for name, accuracy in federated.items():
        assert central - accuracy <= 0.02, (name, federated, central)


@pytest.mark.process
def test_fashion_mnist_is_learned_as_by_one_machine(tmp_path):
    helpers.require_fashion_mnist()
    central, federated = central_accuracy(FASHION_MNIST), final_accuracies(FASHION_MNIST, tmp_path)
    assert central > 0.85
    assert central - federated["fedavg"] <= 0.02, (federated, central)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fashion_mnist_is_learned_by_every_strategy(tmp_path):
    helpers.require_fashion_mnist()
    config = FASHION_MNIST.model_copy(update={"strategies": NAMES, "rounds": 15})
    central, federated = central_accuracy(config), final_accuracies(config, tmp_path)
    assert central > 0.85
    for name, accuracy in federated.items():
        assert central - accuracy <= 0.02, (name, federated, central)


def test_strategies_differ_on_unlike_data(tmp_path):
    config = ALIKE.model_copy(update={"alpha": (0.1,), "rounds": 3, "local_epochs": 1})
    run(config, tmp_path)
    hashes = {sha256(tmp_path / name / "final.safetensors") for name in NAMES}
    assert len(hashes) == len(NAMES)
