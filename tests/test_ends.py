"""The ends of the scale: every client by itself, and one model on all samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federations import DIGITS, Seen, canned, grid_of, lines, record, run, spying, tiny
from flwr.app import ConfigRecord
from safetensors.torch import load_file

from clients.federation import federation
from clients.training import train
from fedwsa import models
from fedwsa.arrays import unpack
from fedwsa.config import ConfigError, parse
from fedwsa.errors import RunError
from fedwsa.evaluation import evaluate
from fedwsa.run_folder import StrategyFolder
from fedwsa.scope import measure
from fedwsa.seeding import torch_generator, torch_seed
from fedwsa.simulation.states import ClientStates
from strategies import LocalOnly

State = dict[str, torch.Tensor]


def start_of(config) -> State:
    return models.build(config.model, *DIGITS, torch_seed(config.seed[0], "model")).state_dict()


def filled(config, state: State) -> torch.nn.Module:
    model = models.placed(models.build(config.model, *DIGITS, 0), torch.device("cpu"))  # as clients compute it
    model.load_state_dict(state)
    return model


def same(one: State, other: State) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


# ---- local-only


def local(**changes):
    options = {"num_clients": 6, "cohort": 2, "evaluation_cohort": 6, "model": "federations:NormNet", "batch_size": 20}
    return tiny(strategies=("local-only",), **{**options, **changes})


def trained_alone(config, seen: list[Seen]) -> dict[int, State]:
    """Each client's model by itself, in the rounds in which it was drawn."""
    own: dict[int, State] = {}
    for message in seen:
        if message.kind == "train":
            model = filled(config, own.get(message.client, start_of(config)))
            images, labels = federation(config).training_tensors(message.client)
            train(model, images, labels, config, torch_generator(0, "client", message.server_round, message.client))
            own[message.client] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return own


@pytest.mark.parametrize("batch_norm", ["aggregate", "local"])
def test_clients_go_on_with_their_own_models_and_the_server_keeps_the_start(batch_norm, tmp_path: Path):
    config, seen = local(rounds=3, batch_norm=batch_norm), []
    run(config, tmp_path, spying(seen))
    own, folder = trained_alone(config, seen), StrategyFolder(tmp_path / "local-only")
    rounds = [sum((m.kind, m.client) == ("train", client) for m in seen) for client in range(6)]
    assert (min(rounds), max(rounds)) == (0, 2)
    states = ClientStates(files=folder.resume().client_states)
    assert states.keys() == own.keys()
    for client, state in states.items():
        assert same(unpack(state["batch-norm local-only"]), own[client])
    assert same(load_file(folder.final), start_of(config))
    assert not same(own[max(own)], start_of(config))


def test_scopes_are_those_of_the_clients_models(tmp_path: Path):
    config, seen = local(rounds=1), []
    run(config, tmp_path, spying(seen))
    own = trained_alone(config, seen)
    for message in seen:
        if message.kind == "train":
            scope = measure(own[message.client])
            assert message.metrics["scope-means"] == scope.means.tolist()
            assert message.metrics["scope-variances"] == scope.variances.tolist()
            assert all(np.array_equal(message.model[name], values) for name, values in start_of(config).items())


def test_what_is_recorded_is_the_mean_of_the_clients_own_models(tmp_path: Path):
    config, seen = local(), []
    run(config, tmp_path, spying(seen))
    holdings, own = federation(config), trained_alone(config, seen)
    assert len(own) < 6  # a client that never trained has the start
    clients = [filled(config, own.get(client, start_of(config))) for client in range(6)]
    test = np.array([evaluate(model, *holdings.dataset.test_tensors()) for model in clients])
    validation = np.array([evaluate(model, *holdings.validation_tensors(k)) for k, model in enumerate(clients)])
    sizes = [len(part) for part in holdings.validation]
    assert len(set(sizes)) > 1
    *_, on_clients, on_server = lines(tmp_path / "local-only" / "metrics.jsonl")
    assert (on_server["phase"], on_server["num_examples"]) == ("evaluate-server", len(holdings.dataset.test_labels))
    for event, (loss, accuracy) in (
        (on_server, test.mean(axis=0)),
        (on_clients, np.average(validation, axis=0, weights=sizes)),
    ):
        assert event["metrics"] == {
            "loss": pytest.approx(loss, rel=1e-12),
            "accuracy": pytest.approx(accuracy, rel=1e-12),
        }


def test_clients_that_have_no_model_of_their_own_end_the_run():
    strategy, grid = LocalOnly(1, seed=0, evaluation_cohort=1), grid_of(canned(({}, {"num-examples": 1})), 1)
    outgoing = strategy.configure_evaluate(2, record({}), ConfigRecord(), grid)
    with pytest.raises(RunError, match="round 2: no client evaluated its own model, and local-only has no other"):
        strategy.aggregate_evaluate(2, grid.send_and_receive(outgoing))


# ---- central


def by_hand(config) -> State:
    """Plain PyTorch on the clients' samples in one place, a fresh optimiser each round."""
    holdings = federation(config)
    parts = [holdings.training_tensors(client) for client in range(config.num_clients)]
    images, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    assert len(labels) == sum(map(len, holdings.training))
    model = filled(config, start_of(config)).train()
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[config.optimizer]
    for server_round in range(1, config.rounds + 1):
        optimizer = kind(model.parameters(), lr=config.learning_rate)
        generator = torch_generator(config.seed[0], "client", server_round, 0)
        for _ in range(config.local_epochs):
            for batch in torch.randperm(len(labels), generator=generator).split(config.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "feature_shift": "rotation"},
        {"optimizer": "adam", "learning_rate": 0.001},
        {"model": "federations:NormNet", "batch_norm": "local"},
    ],
    ids=["sgd", "adam", "batch-norm"],
)
def test_central_is_plain_training_on_all_samples_bit_for_bit(changes, tmp_path: Path):
    config = tiny(strategies=("central",), local_epochs=2, **changes)
    run(config, tmp_path)
    assert same(load_file(tmp_path / "central" / "final.safetensors"), by_hand(config))


def test_one_client_by_itself_is_all_there_is(tmp_path: Path):
    """FedAvg, central and local-only training are the same, to the bit."""
    names = ("fedavg", "central", "local-only")
    options = {"num_clients": 1, "cohort": 1, "evaluation_cohort": 1, "partitioner": "iid"}
    run(tiny(strategies=names, **options), tmp_path)
    fedavg, central = ((tmp_path / name / "final.safetensors").read_bytes() for name in names[:2])
    assert fedavg == central
    states = ClientStates(files=StrategyFolder(tmp_path / "local-only").resume().client_states)
    assert same(unpack(states[0]["batch-norm local-only"]), load_file(tmp_path / "fedavg" / "final.safetensors"))
    ends = [lines(tmp_path / name / "metrics.jsonl")[-1]["metrics"] for name in names]
    assert ends[0] == ends[1] == ends[2]


# ---- the config


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"strategies": "local-only", "evaluation-cohort": 0},
            "^evaluation-cohort = 0: only its clients can evaluate local-only; allowed with it is ≥ 1$",
        ),
        (
            {"strategies": "central-wsa", "min-replies": 2},
            "^min-replies = 2: central trains in one place; allowed with it is 1$",
        ),
    ],
)
def test_what_cannot_be_is_said(values, line):
    with pytest.raises(ConfigError, match=line):
        parse(values)
