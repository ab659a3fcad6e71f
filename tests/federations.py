"""Small federations for the tests of strategies, clients and messages."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import Tensor, nn

from clients.client_app import app as client_app
from clients.client_app import evaluate_message, train_message
from fedwsa import messages, models
from fedwsa.arrays import pack, view
from fedwsa.config import Config
from fedwsa.scope import WeightScope
from fedwsa.simulation import simulate, states
from fedwsa.simulation.engine import InProcessEngine, Job, Population, answer, identify
from fedwsa.simulation.grid import SimulationGrid
from strategies import Holdout
from strategies.server_app import make_app

Arrays = dict[str, NDArray[Any]]

DIGITS = ((1, 8, 8), 10)  # input shape and classes


def tiny(**changes: Any) -> Config:
    """Two quick rounds on digits; six clients, of which three train and two evaluate."""
    values: dict[str, Any] = {
        "rounds": 2,
        "num_clients": 6,
        "cohort": 3,
        "evaluation_cohort": 2,
        "local_epochs": 1,
        "alpha": 1.0,
        "server_samples": 30,
        "np_merge": {"steps": 2, "batch-size": 10},
    }
    return Config.model_validate({**values, **changes})


def run(config: Config, folder: Path, client: ClientApp = client_app, events: list[Any] | None = None) -> None:
    """A run of our ServerApp in this process."""
    heard = [] if events is None else events
    app = make_app(folder, lambda strategy, event: heard.append((strategy, event)))
    simulate(app, client, config.num_clients, engine="inprocess", run_config=config.to_run_config())


def lines(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl, without what a clock decides."""
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in event.items() if key != "seconds"} for event in events]


def finals(folder: Path, config: Config) -> dict[str, bytes]:
    """Each strategy's final model, as its file has it."""
    return {name: (folder / name / "final.safetensors").read_bytes() for name in config.strategies}


def usable(folder: Path, name: str) -> list[int]:
    """Replies of each training round that the strategy could use."""
    trained = [event for event in lines(folder / name / "metrics.jsonl") if event["phase"] == "train"]
    return [event["num_clients"] - event["num_failed"] for event in trained]


def grid_of(app: ClientApp, num_clients: int, run_config: Mapping[str, Any] | None = None) -> SimulationGrid:
    """A Flower Grid with so many clients in this process."""
    identify()
    engine = InProcessEngine()
    engine.begin(Population(app, num_clients, dict(run_config or {})))
    return SimulationGrid(engine, num_clients)


def record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """As a stock Flower client makes it: np.save bytes."""
    return ArrayRecord({name: Array(np.asarray(values)) for name, values in arrays.items()})


def numbers(arrays: ArrayRecord) -> Arrays:
    return {name: array.numpy() for name, array in arrays.items()}


def canned(*replies: tuple[Arrays, dict[str, Any]]) -> ClientApp:
    """Client k answers every training with the k-th (arrays, metrics), and every evaluation with the metrics."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays, metrics = replies[int(context.node_config["partition-id"])]
        content = RecordDict({"arrays": record(arrays), "metrics": MetricRecord(dict(metrics))})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        _, metrics = replies[int(context.node_config["partition-id"])]
        return Message(RecordDict({"metrics": MetricRecord(dict(metrics))}), reply_to=message)

    return app


def one_round(
    strategy: Strategy, grid: SimulationGrid, arrays: ArrayRecord, server_round: int = 1
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Train once, as Flower's loop and ours do it."""
    outgoing = strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
    return strategy.aggregate_train(server_round, grid.send_and_receive(outgoing))


def initial_model(seed: int = 0) -> dict[str, Tensor]:
    return models.build("mlp", *DIGITS, seed).state_dict()


def holdout(samples: int = 0, model: nn.Module | None = None) -> Holdout:
    """Random images with random labels at the server."""
    images = torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return Holdout(model or models.build("mlp", *DIGITS, 0), images, torch.arange(samples) % 10)


# ---- looking at what passes


@dataclass(frozen=True)
class Seen:
    """One message that a client got, and what it replied."""

    kind: str
    server_round: int
    client: int
    sent: str  # digest of the model
    alignment: messages.Alignment | None
    config: dict[str, Any]
    model: Arrays
    metrics: dict[str, Any]


def digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    return hashlib.sha256(b"".join(name.encode() + values.tobytes() for name, values in arrays.items())).hexdigest()


def spying(seen: list[Seen]) -> ClientApp:
    """Our client, with all that it gets and gives written down."""
    app = ClientApp()

    def look(kind: str, handler: Callable[[Message, Context], Message], message: Message, context: Context) -> Message:
        config = message.content.config_records[messages.CONFIG]
        sent = digest(numbers(message.content.array_records[messages.ARRAYS]))
        alignment = messages.unpack_alignment(config)
        reply = handler(message, context)
        model = numbers(reply.content.array_records[messages.ARRAYS]) if kind == "train" else {}
        metrics = dict(reply.content.metric_records[messages.METRICS])
        client, server_round = int(context.node_config["partition-id"]), int(config[messages.SERVER_ROUND])
        seen.append(Seen(kind, server_round, client, sent, alignment, dict(config), model, metrics))
        return reply

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return look("train", train_message, message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return look("evaluate", evaluate_message, message, context)

    return app


def ask(
    config: Config,
    client: int = 0,
    server_round: int = 1,
    *,
    kind: str = "train",
    start: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    node_config: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our client's reply to one message: model (of a training) and metrics; what it raises is a RuntimeError here."""
    identify()
    entries = {messages.SERVER_ROUND: server_round, messages.VERSION: messages.SCHEMA_VERSION, **(settings or {})}
    content = RecordDict({"arrays": pack(start or initial_model()), "config": ConfigRecord(entries)})
    message = Message(content, dst_node_id=1, message_type=kind)
    if node_config is None:
        population = Population(client_app, config.num_clients, config.to_run_config())
        reply = answer(population, Job(message, client)).reply
    else:
        context = Context(1, 1, dict(node_config), RecordDict(), config.to_run_config())
        reply = client_app(message, context)
    if reply.has_error():
        raise RuntimeError(reply.error.reason.strip().splitlines()[-1])
    arrays = reply.content.array_records.get(messages.ARRAYS, {})
    model = {name: torch.from_numpy(view(array)) for name, array in arrays.items()}  # the reply's own memory
    return model, dict(reply.content.metric_records[messages.METRICS])


def train_one(
    config: Config,
    arrays: Mapping[str, ArrayRecord],
    settings: Mapping[str, Any],
    *,
    client: int = 0,
    server_round: int = 1,
    state: RecordDict | None = None,
) -> tuple[RecordDict, RecordDict]:
    """What our client replies to a train message with these records, and what it keeps; state: what it kept before."""
    identify()
    entries = {messages.SERVER_ROUND: server_round, messages.VERSION: messages.SCHEMA_VERSION, **settings}
    message = Message(RecordDict({**arrays, "config": ConfigRecord(entries)}), dst_node_id=1, message_type="train")
    population = Population(client_app, config.num_clients, config.to_run_config())
    before = states.pack(state or RecordDict())
    given = answer(population, Job(message, client, before))
    if given.reply.has_error():
        raise RuntimeError(given.reply.error.reason.strip().splitlines()[-1])
    return given.reply.content, states.unpack(before if given.state is None else given.state)


def alignment_towards(factor: float, model: Mapping[str, Tensor], **options: Any) -> messages.Alignment:
    """Layers as in `model`, with `factor` times the standard deviation."""
    layers = {name: tensor.double() for name, tensor in model.items() if tensor.ndim >= 2}
    target = WeightScope(
        tuple(layers),
        torch.stack([tensor.mean() for tensor in layers.values()]),
        torch.stack([tensor.var(correction=0) * factor**2 for tensor in layers.values()]),
    )
    return messages.Alignment(target, **{"strength": 1.0, "mode": "loss", "reduction": "sum", **options})


# ---- a client that keeps something

remembering = ClientApp()


@remembering.train()
def train_and_remember(message: Message, context: Context) -> Message:
    """Ours, plus one for each training before to all it sends; what it remembers is of every kind."""
    reply = train_message(message, context)
    before = int(context.state["seen"]["count"]) if "seen" in context.state else 0
    assert before == 0 or context.state["seen"]["last"] == b"\x00\xff"
    trained = reply.content["arrays"]
    if before:
        (total,) = (array.numpy() for array in context.state["total"].values())
        assert np.isfinite(total).all()
    for name, array in list(trained.items()):
        trained[name] = Array(array.numpy() + np.float32(0.001 * before))
    context.state["seen"] = ConfigRecord({"count": before + 1, "last": b"\x00\xff"})
    context.state["total"] = ArrayRecord({"first": Array(next(iter(trained.values())).numpy())})
    context.state["loss"] = MetricRecord({"loss": float(reply.content["metrics"]["loss"]), "history": [before]})
    return reply


@remembering.evaluate()
def evaluate_as_ours(message: Message, context: Context) -> Message:
    return evaluate_message(message, context)


# ---- models that a config names by import path


class DropoutNet(nn.Sequential):
    """Draws random numbers of its own while it trains."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, num_classes))


class NoisyNet(nn.Linear):
    """Writes down what it draws while it trains."""

    draws: ClassVar[list[float]] = []

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.draws.append(torch.rand(()).item())
        return super().forward(images.flatten(1))


class NormNet(nn.Sequential):
    """BatchNorm: floating and integer buffers."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, num_classes))


class TiedNet(nn.Module):
    """One weight under two names, and a table that is no parameter; names whose alphabet is not their order."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 16)
        self.body = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.body.weight
        self.head = nn.Linear(16, num_classes)
        self.register_buffer("table", torch.linspace(-1, 1, 64).reshape(1, 64))

    def forward(self, images: Tensor) -> Tensor:
        units = torch.relu(self.stem(images.flatten(1) + self.table))
        logits: Tensor = self.head(torch.relu(self.again(torch.relu(self.body(units)))))
        return logits
