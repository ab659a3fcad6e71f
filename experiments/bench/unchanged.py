"""An app written against Flower alone, under our engine (`ours`) or Flower's own simulator (`stock`)."""

import os
import sys

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import logging

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from experiments.bench.workloads import Stopwatch, arguments, local_epoch, tensors

workload, rounds = arguments()
client, server, watch = ClientApp(), ServerApp(), Stopwatch()


@client.train()
def train(message: Message, context: Context) -> Message:
    """One local epoch, as Flower's quickstart for PyTorch does it."""
    torch.set_num_threads(1)
    images, labels = tensors()
    model = workload.build()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    shard = workload.shard(int(context.node_config["partition-id"]))
    local_epoch(model, images[shard], labels[shard])
    metrics = MetricRecord({"num-examples": workload.samples})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's FedAvg; the central evaluation only takes the time."""

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
        evaluate_fn=lap,
    )


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.WARNING)
    if sys.argv[3] == "stock":
        from flwr.simulation import run_simulation

        run_simulation(
            server, client, workload.clients, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        )
    else:
        from fedwsa.simulation import open_engine, simulate

        with open_engine("ray", workers=2) as engine:
            simulate(server, client, workload.clients, engine=engine)
    watch.report()
