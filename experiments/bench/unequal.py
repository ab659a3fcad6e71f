"""Unequal clients: our app's rounds in turn with every client's training alone, in one process.

No engine can end a round sooner than after half of the clients' seconds (there are two workers), or after the longest
client's. That limit is said at the end: `limit 1.23`, seconds, of each client's median.
"""

import logging
import statistics
import time

import torch

from clients.federation import federation
from clients.training import train
from experiments.bench.ours import ENGINES, make_config, run
from experiments.bench.workloads import WORKERS, WORKLOADS, Stopwatch, arguments
from fedwsa.config import Config
from fedwsa.models import placed
from fedwsa.simulation import open_engine
from strategies.rounds import Event


def seconds_alone(config: Config) -> list[float]:
    """Of each client's local training, one after another on one thread."""
    holdings = federation(config)
    seconds = []
    for client, indices in enumerate(holdings.training):
        images, labels = holdings.dataset.train_tensors(indices)
        model = placed(WORKLOADS["unequal"].build(), torch.device("cpu"))  # as the client app lays it out
        generator = torch.Generator().manual_seed(client)
        start = time.perf_counter()
        train(model, images, labels, config, generator)
        seconds.append(time.perf_counter() - start)
    return seconds


def limit(clients: list[float]) -> float:
    """Seconds of a round at best: every client's seconds, on WORKERS workers."""
    return max(sum(clients) / WORKERS, max(clients))


def main() -> None:
    """After each round but the last the workers rest, and the clients are measured here."""
    name, rounds, engine_name = arguments()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    config = make_config(WORKLOADS[name], rounds)
    watch = Stopwatch()
    passes: list[list[float]] = []

    def lap(strategy: str, event: Event) -> None:
        if event["phase"] == "train":
            watch.lap()
            if event["round"] < rounds:
                passes.append(seconds_alone(config))
        watch.restart()

    with open_engine(**ENGINES[engine_name]) as engine:
        run(config, lap, engine)
    print(f"limit {limit([statistics.median(client) for client in zip(*passes, strict=True)]):.6f}", flush=True)


if __name__ == "__main__":
    main()
