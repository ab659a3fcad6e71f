"""Our own app under our engine: what `fedwsa run` does, without evaluation, as the other contestants have none."""

import logging
import tempfile
from pathlib import Path
from typing import Any

from fedwsa.importing import uncollected

with uncollected():
    from clients.client_app import app as client_app
    from clients.federation import federation
    from experiments.bench.workloads import (
        BATCH,
        LEARNING_RATE,
        ON_A_CARD,
        WORKERS,
        WORKLOADS,
        Stopwatch,
        Workload,
        arguments,
    )
    from fedwsa.config import Config, parse
    from fedwsa.simulation import Engine, open_engine, simulate
    from strategies.rounds import Event, Notify
    from strategies.server_app import make_app


ENGINES: dict[str, dict[str, Any]] = {
    "ray": {"name": "ray", "workers": WORKERS},  # all workers are up before round 1
    "ray-start-here": {"name": "ray", "workers": WORKERS, "start_here": True},  # as `fedwsa run` does
    "ray-card": {"name": "ray", "workers": ON_A_CARD, "gpus_per_client": 1 / ON_A_CARD},
    "inprocess": {"name": "inprocess"},
}


def make_config(workload: Workload, rounds: int) -> Config:
    """One strategy, FedAvg; the final model alone is evaluated and kept."""
    values = {
        "strategies": "fedavg",
        "data": "fashion-mnist",
        "partitioner": f"experiments.bench.workloads:{workload.partitioner}",
        "min-size": workload.samples if workload.partitioner == "equal" else 1,
        "num-clients": workload.clients,
        "cohort": workload.cohort,
        "evaluation-cohort": 0,
        "validation-fraction": 0.0,
        "server-samples": 0,
        "model": workload.model,
        "rounds": rounds,
        "evaluate-every": rounds,
        "measure-every": 0,
        "checkpoint-every": rounds,
        "local-epochs": 1,
        "batch-size": BATCH,
        "learning-rate": LEARNING_RATE,
        "gpus-per-client": 0.0 if workload.device == "cpu" else 1 / ON_A_CARD,
    }
    return parse(values)


def run(config: Config, notify: Notify, engine: Engine) -> None:
    """A whole run, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        server_app = make_app(Path(folder), notify)
        sizes = [len(part) for part in federation(config).training]
        simulate(
            server_app,
            client_app,
            config.num_clients,
            engine=engine,
            run_config=config.to_run_config(),
            client_sizes=sizes,
        )


def main() -> None:
    """The third argument is one of ENGINES."""
    name, rounds, engine_name = arguments()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    watch = Stopwatch()

    def lap(strategy: str, event: Event) -> None:
        if event["phase"] == "train":
            watch.lap()

    with open_engine(**ENGINES[engine_name]) as engine:
        run(make_config(WORKLOADS[name], rounds), lap, engine)


if __name__ == "__main__":
    main()
