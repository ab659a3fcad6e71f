"""The ServerApp: each strategy of the config in turn, on the same clients, start and cohorts."""

from logging import INFO, WARNING
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore import log
from numpy.typing import NDArray

import strategies
from fedwsa import data, models, weights
from fedwsa.config import Config, from_run_config
from fedwsa.run_folder import CONFIG, FolderInUseError, StrategyFolder, claim, new_folder, write_atomically
from fedwsa.seeding import torch_seed
from fedwsa.tracing import span
from partitions import stored
from strategies.central import check_simulated
from strategies.evaluation import CentralEvaluation
from strategies.gate import Gate
from strategies.measures import Measures
from strategies.rounds import Event, Notify, Rounds


def log_event(strategy: str, event: Event) -> None:
    """One line an event in Flower's log, and a warning for each client that failed."""
    values = event["metrics"].items()
    metrics = " ".join(f"{key}={'not finite' if value is None else format(value, '.4f')}" for key, value in values)
    log(INFO, "%s round %d %s: %s", strategy, event["round"], event["phase"], metrics)
    for failure in event.get("failures", []):
        log(WARNING, "%s round %d %s: left out %s", strategy, event["round"], event["phase"], failure)


def make_app(folder: Path | None = None, notify: Notify = log_event) -> ServerApp:
    """The ServerApp; it writes to `folder`, which the caller has claimed, or else to one that the config names."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = from_run_config(context.run_config)
        if len(config.federations()) > 1:
            raise ValueError("alpha and seed: one value each here; `fedwsa run` takes lists")
        if folder is not None:
            with span("other"):
                run_strategies(grid, config, folder, notify)
            return
        own = new_folder(config).absolute()
        release = claim(own)
        try:
            config = pinned(config)
            _keep_config(own, config)
            run_strategies(grid, config, own, notify)
        finally:
            release()
        log(INFO, "models and metrics are in %s", own)

    return app


def pinned(config: Config) -> Config:
    """The config with the SHA-256 of what the files that it names hold, so that it is repeated with the same.

    Raises ValueError, one line with the path, for a file that cannot be read.
    """
    if config.partition_file and not config.partition_sha256:
        config = config.model_copy(update={"partition_sha256": stored.sha256(Path(config.partition_file))})
    return weights.pinned(config)


def _keep_config(folder: Path, config: Config) -> None:
    """Write it down; a run that stands in the folder is gone on with if it has this config, and never replaced."""
    content = config.model_copy(update={"out_dir": ""}).to_toml().encode()  # so that it can be repeated elsewhere
    if (folder / CONFIG).exists() and (folder / CONFIG).read_bytes() != content:
        raise FolderInUseError(f"{folder}: holds a run of another config; choose another out-dir")
    write_atomically(folder / CONFIG, content)
    for name in config.strategies:
        if StrategyFolder(folder / name).final.exists():
            log(INFO, "%s has its final model and is left as it is", name)


def _held_out(config: Config, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The server's samples: those that clients/federation.py leaves out."""
    if config.partition_file:
        return stored.read(
            Path(config.partition_file),
            labels,
            num_clients=config.num_clients,
            server_samples=config.server_samples,
            sha256=config.partition_sha256,
        ).server
    return data.held_out(config, labels)[0]


def run_strategies(grid: Grid, config: Config, folder: Path, notify: Notify) -> None:
    """Those that have a final model are left as they are; one that was interrupted goes on from its checkpoint."""
    torch.set_num_threads(config.threads_per_client)  # sums depend on it
    dataset = data.of_config(config)
    seed = config.seed[0]
    held_out = _held_out(config, dataset.train_labels)
    model = models.of_config(config, dataset.input_shape, dataset.num_classes, torch_seed(seed, "model"))
    weights.begin(model, config)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    holdout = strategies.Holdout(model, *dataset.train_tensors(held_out))
    evaluated = models.of_config(config, dataset.input_shape, dataset.num_classes, seed=0)
    evaluate_arrays = CentralEvaluation(models.placed(evaluated, torch.device("cpu")), dataset, grid, config.timeout)
    if config.uses("central"):
        check_simulated(grid)
    folders = {name: StrategyFolder(folder / name) for name in config.strategies}
    left = [name for name, one in folders.items() if not one.final.exists()]
    # all of them before the first trains: one that cannot be built must not end a run that is half done
    for name, strategy in {name: strategies.build(name, config, holdout) for name in left}.items():
        if config.measure_every:
            seen = slice(None if config.batch_norm == "aggregate" else 0)  # else losses would be of models nobody uses
            looked_at = strategies.Holdout(evaluate_arrays.model, holdout.images[seen], holdout.labels[seen])
            strategy = Measures(strategy, looked_at, config.measure_every)
        gate = Gate(strategy, min_replies=config.min_replies, fail=config.on_client_failure == "fail")
        Rounds(name, gate, grid, config, folders[name], evaluate_arrays, notify).run(
            {name: tensor.clone() for name, tensor in initial.items()}
        )


app = make_app()
