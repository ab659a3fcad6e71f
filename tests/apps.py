"""Two federations as somebody else would write them: against Flower and NumPy, and nothing of this project."""

import random

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

FEATURES = 6


def samples(client: int) -> tuple[np.ndarray, np.ndarray]:
    """Points [n, FEATURES] and targets [n] of one client; n differs between clients."""
    rng = np.random.default_rng([11, client])
    points = rng.normal(size=(8 + 3 * client, FEATURES))
    return points, points @ np.arange(FEATURES) + client + rng.normal(size=len(points))


def descend(weights: np.ndarray, client: int, learning_rate: float) -> np.ndarray:
    """One gradient step on the client's mean squared error."""
    points, targets = samples(client)
    return weights - learning_rate * 2 / len(points) * points.T @ (points @ weights - targets)


# ---- Flower's quickstart: NumPy arrays in a list, FedAvg, train and evaluate

quickstart_client = ClientApp()


@quickstart_client.train()
def quickstart_train(message: Message, context: Context) -> Message:
    client = int(context.node_config["partition-id"])
    (weights,) = message.content["arrays"].to_numpy_ndarrays()
    for _ in range(int(context.run_config["local-epochs"])):
        weights = descend(weights, client, message.content["config"]["lr"])
    metrics = MetricRecord({"num-examples": len(samples(client)[0])})
    return Message(RecordDict({"arrays": ArrayRecord([weights]), "metrics": metrics}), reply_to=message)


@quickstart_client.evaluate()
def quickstart_evaluate(message: Message, context: Context) -> Message:
    points, targets = samples(int(context.node_config["partition-id"]))
    (weights,) = message.content["arrays"].to_numpy_ndarrays()
    loss = float(np.mean((points @ weights - targets) ** 2))
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": len(points), "loss": loss})}), reply_to=message)


# ---- a client that remembers: momentum and a count of its rounds lie in Context.state

stateful_client = ClientApp()


@stateful_client.train()
def stateful_train(message: Message, context: Context) -> Message:
    client = int(context.node_config["partition-id"])
    (weights,) = message.content["arrays"].to_numpy_ndarrays()
    if "momentum" in context.state:
        (momentum,) = context.state["momentum"].to_numpy_ndarrays()
        rounds = context.state["progress"]["rounds"] + 1
    else:
        momentum, rounds = np.zeros(FEATURES), 1
    momentum = 0.5 * momentum + descend(weights, client, message.content["config"]["lr"]) - weights
    context.state["momentum"] = ArrayRecord([momentum])
    context.state["progress"] = ConfigRecord({"rounds": rounds})
    metrics = MetricRecord({"num-examples": len(samples(client)[0]), "rounds": rounds})
    return Message(RecordDict({"arrays": ArrayRecord([weights + momentum]), "metrics": metrics}), reply_to=message)


@stateful_client.evaluate()
def stateful_evaluate(message: Message, context: Context) -> Message:
    return quickstart_evaluate(message, context)


# ---- one server for both

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's FedAvg with everybody in every round; it draws their order from the global random."""
    random.seed(5)
    result = FedAvg().start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros(FEATURES)]),
        num_rounds=int(context.run_config["num-rounds"]),
        train_config=ConfigRecord({"lr": 0.05}),
    )
    context.state["arrays"] = result.arrays
    context.state["train"] = result.train_metrics_clientapp[int(context.run_config["num-rounds"])]
    context.state["evaluate"] = result.evaluate_metrics_clientapp[int(context.run_config["num-rounds"])]
