"""An app written against Flower alone, in one script, under our engine (`ours`) or Flower's own simulator (`stock`).

Run as a script it is `__main__`, and Flower pickles it by value for every client: what a client leaves in `cache` is
gone for the next one. `imported` runs the same app from a module that the workers can import, where `cache` stays.
"""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import logging

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from experiments.bench.workloads import WORKERS, WORKLOADS, Stopwatch, arguments, load, local_epoch

client, server = ClientApp(), ServerApp()
cache: dict[str, tuple[Tensor, Tensor]] = {}


@client.train()
def train(message: Message, context: Context) -> Message:
    """One local epoch, as Flower's quickstart for PyTorch does it."""
    torch.set_num_threads(1)
    if "training" not in cache:
        cache["training"] = load()
    images, labels = cache["training"]
    workload = WORKLOADS[str(message.content.config_records["config"]["workload"])]
    model = workload.by_class()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    shard = workload.shard(int(context.node_config["partition-id"]))
    local_epoch(model, images[shard], labels[shard])
    metrics = MetricRecord({"num-examples": workload.samples})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's FedAvg; the central evaluation only takes the time."""
    name, rounds, _ = arguments()
    workload, watch = WORKLOADS[name], Stopwatch()

    def lap(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round:
            watch.lap()
        return None

    FedAvg(
        fraction_train=(workload.cohort + 0.5) / workload.clients,
        fraction_evaluate=0.0,
        min_train_nodes=workload.cohort,
        min_available_nodes=workload.clients,
    ).start(
        grid=grid,
        initial_arrays=ArrayRecord(workload.build().state_dict()),
        num_rounds=rounds,
        train_config=ConfigRecord({"workload": name}),
        evaluate_fn=lap,
    )


def run() -> None:
    """With two workers, one CPU each."""
    name, _, engine_name = arguments()
    clients = WORKLOADS[name].clients
    logging.getLogger("flwr").setLevel(logging.WARNING)
    if engine_name == "stock":
        from flwr.simulation import run_simulation

        run_simulation(
            server,
            client,
            clients,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": WORKERS}},
        )
    else:
        from fedwsa.simulation import open_engine, simulate

        with open_engine("ray", workers=WORKERS) as engine:
            simulate(server, client, clients, engine=engine)


if __name__ == "__main__":
    run()
