"""Our own app under our engine: what `fedwsa run` does, without evaluation, as the other contestants have none."""

import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from clients.client_app import app as client_app
from experiments.bench.workloads import BATCH, LEARNING_RATE, Stopwatch, arguments
from fedwsa.config import parse
from fedwsa.simulation import open_engine, simulate
from strategies.server_app import make_app


def main() -> None:
    """One strategy, FedAvg; a third argument names another engine."""
    workload, rounds = arguments()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    watch = Stopwatch()
    config = parse(
        {
            "strategies": "fedavg",
            "data": "fashion-mnist",
            "partitioner": "experiments.bench.workloads:shards",
            "num-clients": workload.clients,
            "cohort": workload.cohort,
            "evaluation-cohort": 0,
            "validation-fraction": 0.0,
            "server-samples": 0,
            "model": workload.model,
            "rounds": rounds,
            "evaluate-every": rounds,
            "checkpoint-every": rounds,
            "local-epochs": 1,
            "batch-size": BATCH,
            "learning-rate": LEARNING_RATE,
        }
    )

    def lap(strategy: str, event: dict[str, Any]) -> None:
        if event["phase"] == "train":
            watch.lap()

    name = sys.argv[3] if len(sys.argv) > 3 else "ray"
    with tempfile.TemporaryDirectory() as folder, open_engine(name, workers=2) as engine:
        server_app = make_app(Path(folder), lap)
        simulate(server_app, client_app, workload.clients, engine=engine, run_config=config.to_run_config())
    watch.report()


if __name__ == "__main__":
    main()
