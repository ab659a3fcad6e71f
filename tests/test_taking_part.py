"""Who takes part in an aligned federation: stock clients, our client under a stock server, clients of other layers."""

import random
from pathlib import Path

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federations import DIGITS, Seen, ask, grid_of, initial_model, lines, numbers, one_round, run, spying, tiny
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.exception import InconsistentMessageReplies
from safetensors.torch import load_file
from torch import nn

from clients.client_app import app as client_app
from fedwsa import messages, models
from fedwsa.arrays import pack
from fedwsa.scope import WeightScope, measure
from fedwsa.simulation import simulate
from strategies import FedAvg, FedProx, WeightScopeAlignment
from strategies.gate import Gate

LAYERS = ("layers.0.weight", "layers.1.weight", "layers.2.weight")


def stock_train(message: Message) -> Message:
    """As a user of Flower and PyTorch writes it, who knows nothing of scopes."""
    model = models.build("mlp", *DIGITS, seed=0)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(model(images), torch.arange(8))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    metrics = MetricRecord({"num-examples": 8, "train_loss": loss.item()})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


def partly(seen: list[Seen], ids: set[int], replies: list[Message] | None = None) -> ClientApp:
    """Some clients are stock ones; what ours got and gave is written down, and what these replied."""
    app, ours = ClientApp(), spying(seen)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] not in ids:
            return ours(message, context)
        reply = stock_train(message)
        if replies is not None:
            replies.append(reply)
        return reply

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return client_app(message, context)

    return app


# ---- a stock client in our federation


@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_stock_clients_count_for_the_model_and_not_for_the_target(mode, tmp_path: Path):
    seen: list[Seen] = []
    stock: list[Message] = []
    run(tiny(strategies=("fedavg-wsa",), cohort=6, wsa={"mode": mode}), tmp_path, partly(seen, {1, 4}, stock))
    for event in lines(tmp_path / "fedavg-wsa" / "metrics.jsonl"):
        if event["phase"] == "train":
            assert (event["num_clients"], event["num_failed"]) == (6, 0)
    first, second = ([m for m in seen if m.server_round == number] for number in (1, 2))
    assert {message.client for message in first} == {0, 2, 3, 5}
    weights = [message.metrics["num-examples"] for message in first]
    for key, found in (("scope-means", "means"), ("scope-variances", "variances")):
        expected = np.average([message.metrics[key] for message in first], axis=0, weights=weights)
        for message in second:
            np.testing.assert_allclose(getattr(message.alignment.target, found), expected, rtol=1e-12)
    final = load_file(tmp_path / "fedavg-wsa" / "final.safetensors")
    clients = [message.model for message in second] + [numbers(reply.content["arrays"]) for reply in stock[2:]]
    sizes = [message.metrics["num-examples"] for message in second] + [8, 8]
    for name in LAYERS:
        mean = np.average([model[name].astype(np.float64) for model in clients], axis=0, weights=sizes)
        np.testing.assert_allclose(final[name].numpy(), mean, rtol=1e-6, atol=1e-9)


def test_a_federation_of_stock_clients_runs_and_the_target_stays(tmp_path: Path):
    run(tiny(strategies=("fedavg-wsa",)), tmp_path, partly([], set(range(6))))
    trained = [e for e in lines(tmp_path / "fedavg-wsa" / "metrics.jsonl") if e["phase"] == "train"]
    assert [event["num_failed"] for event in trained] == [0, 0]
    assert all("scope_means" not in event for event in trained)


# ---- our client in a stock federation


def stock_server(strategy: flower.Strategy, app: ClientApp) -> dict[str, np.ndarray]:
    """Flower's own loop, three rounds with all six clients."""
    server, results = ServerApp(), []

    @server.main()
    def main(grid, context: Context) -> None:
        results.append(strategy.start(grid, pack(initial_model()), num_rounds=3))

    random.seed(5)  # Flower draws from it
    simulate(server, app, 6, engine="inprocess", run_config=tiny().to_run_config())
    return numbers(results[0].arrays)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (flower.FedAvg(fraction_evaluate=0.0), FedAvg(6, seed=0)),
        (flower.FedProx(fraction_evaluate=0.0, proximal_mu=1.0), FedProx(6, seed=0, mu=1.0)),
    ],
    ids=["FedAvg", "FedProx"],
)
def test_our_client_under_flowers_server_trains_as_under_ours_and_unaligned(theirs, ours):
    seen: list[Seen] = []
    found = stock_server(theirs, spying(seen))
    assert len(seen) == 18
    assert all(message.alignment is None for message in seen)
    arrays, grid = pack(initial_model()), grid_of(client_app, 6, tiny().to_run_config())
    for server_round in (1, 2, 3):
        arrays, _ = one_round(ours, grid, arrays, server_round)
    for name, values in numbers(arrays).items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-7)


def test_a_stock_server_bears_no_mixture_unless_the_gate_is_before_it():
    """Flower demands the same metrics of all clients, and ours send their scopes."""
    with pytest.raises(InconsistentMessageReplies):
        stock_server(flower.FedAvg(fraction_evaluate=0.0), partly([], {1}))
    found = stock_server(Gate(flower.FedAvg(fraction_evaluate=0.0)), partly([], {1}))
    assert all(np.isfinite(values).all() for values in found.values())


# ---- other layers


def one_step(alignment: messages.Alignment | None) -> dict[str, torch.Tensor]:
    settings = messages.pack_alignment(alignment) if alignment else {}
    return ask(tiny(batch_size=10_000), client=2, settings=settings)[0]


@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_layers_that_the_target_does_not_name_are_free(mode):
    scope = measure(initial_model())
    middle = WeightScope(scope.names[1:2], scope.means[1:2], scope.variances[1:2] / 4)
    aligned, free = one_step(messages.Alignment(middle, 1.0, mode, "sum")), one_step(None)
    assert {name for name in free if not torch.equal(aligned[name], free[name])} == {LAYERS[1]}


def only_the_last(config, holdout) -> WeightScopeAlignment:
    target = WeightScope(LAYERS[2:], torch.zeros(1).double(), torch.full((1,), 0.01).double())
    return WeightScopeAlignment(FedAvg(3, seed=0), target=target)


def test_a_target_of_some_layers_stays_and_all_layers_are_recorded(tmp_path: Path):
    seen: list[Seen] = []
    run(tiny(strategies=("test_taking_part:only_the_last",)), tmp_path, spying(seen))
    trained = [message for message in seen if message.kind == "train"]
    assert len(trained) == 6
    assert all(message.alignment.target.names == LAYERS[2:] for message in trained)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (first, second) = (event for event in lines(folder / "metrics.jsonl") if event["phase"] == "train")
    assert first["layers"] == second["layers"] == list(LAYERS)
    assert len(first["scope_means"]) == 3


class FrozenFirst(nn.Module):
    """The MLP, whose first layer does not train; under the names of the MLP."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.layers = models.build("mlp", input_shape, num_classes, seed=0).layers
        self.layers[0].requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = images.flatten(1)
        for layer in self.layers[:-1]:
            hidden = torch.relu(layer(hidden))
        logits: torch.Tensor = self.layers[-1](hidden)
        return logits


@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_a_client_with_a_frozen_layer_sends_its_scope_as_it_is(mode, tmp_path: Path):
    """Its copy of the layer is the server's, and so is its share of the fusion; its other layers are aligned."""
    app, seen = ClientApp(), []
    watched = spying(seen)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            context.run_config = {**context.run_config, "model": "test_taking_part:FrozenFirst"}
        return watched(message, context)

    app.evaluate()(lambda message, context: client_app(message, context))
    run(tiny(strategies=("fedavg-wsa",), cohort=6, wsa={"mode": mode}), tmp_path, app)
    events = [event for event in lines(tmp_path / "fedavg-wsa" / "metrics.jsonl") if event["phase"] == "train"]
    assert [event["num_failed"] for event in events] == [0, 0]
    first, second = ([m for m in seen if m.server_round == number] for number in (1, 2))
    start = first[0].alignment.target  # the scope of the model that was sent
    frozen = next(message for message in first if message.client == 1)
    assert frozen.metrics["scope-variances"][0] == start.variances[0].item()
    assert frozen.metrics["scope-variances"][1] != start.variances[1].item()
    assert all(m.metrics["scope-variances"][0] != start.variances[0].item() for m in first if m.client != 1)
    variances = np.average(
        [m.metrics["scope-variances"] for m in first], axis=0, weights=[m.metrics["num-examples"] for m in first]
    )
    np.testing.assert_allclose(second[0].alignment.target.variances, variances, rtol=1e-12)
