"""The main job: every federation of a config, each with all its strategies, into one run folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

import strategies
from clients.client_app import app as client_app
from clients.federation import Federation, federation
from experiments.display import Display
from experiments.report import write_report
from experiments.results import read_lines, read_run, summarize
from experiments.table import summary_table
from fedwsa import config as configuration
from fedwsa import models
from fedwsa.config import Config, ConfigError
from fedwsa.errors import UsageError
from fedwsa.registry import lookup
from fedwsa.run_folder import (
    CONFIG,
    FINAL,
    METRICS,
    PARTITION,
    FolderInUseError,
    claim,
    new_folder,
    sha256,
    write_atomically,
)
from fedwsa.simulation import open_engine, simulate
from strategies.server_app import make_app


def start(config: Config, console: Console) -> Path:
    """Run a config into a new folder, and show the result; returns the folder."""
    check(config)
    folder = new_folder(config)
    with _claimed(folder):
        if (folder / CONFIG).exists():
            raise FolderInUseError(f"{folder}: holds a run already; fedwsa run --resume {folder}, or choose another")
        write_atomically(folder / CONFIG, config.to_toml().encode())
        _run(config, folder, console)
    return folder


def resume(folder: Path, console: Console) -> Path:
    """Go on with a run that was interrupted, from the last checkpoint of each strategy."""
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder}: no run to resume, {CONFIG} is missing")
    config = configuration.parse(configuration.read(folder / CONFIG))
    check(config)
    with _claimed(folder):
        _run(config, folder, console)
    return folder


def check(config: Config) -> None:
    """What the config names exists and its split is possible; ConfigError otherwise, before any work starts."""
    try:
        for name in config.strategies:
            lookup(strategies.STRATEGIES, name, "strategy")
        lookup(models.MODELS, config.model, "model")
        for one in config.federations():
            federation(one)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    release = claim(folder)
    try:
        yield
    finally:
        release()


def _run(config: Config, folder: Path, console: Console) -> None:
    console.print(f"run folder: {folder}", markup=False, highlight=False, soft_wrap=True)
    engine = open_engine(
        config.engine, workers=config.workers, threads_per_client=config.threads_per_client, start_here=True
    )
    with Display(config, console) as display, engine as opened:
        for one in config.federations():
            part = folder if len(config.federations()) == 1 else folder / f"alpha-{one.alpha[0]:g}_seed-{one.seed[0]}"
            display.begin(one)
            _write_partition(one, federation(one), part)
            for name in one.strategies:
                if (part / name / FINAL).exists():
                    display.finished(name)
            app = make_app(part, display.event)
            simulate(app, client_app, one.num_clients, engine=opened, run_config=one.to_run_config())
            _summarize(one, folder, part)
    report = write_report(folder)
    console.print(summary_table(read_run(folder)))
    console.print(f"report: {report}", markup=False, highlight=False, soft_wrap=True)


def _write_partition(config: Config, holdings: Federation, folder: Path) -> None:
    counts = holdings.label_counts()
    content = {
        "data": config.data,
        "alpha": config.alpha[0],
        "seed": config.seed[0],
        "partitioner": config.partitioner,
        "label_counts": counts.tolist(),
        "num_classes": holdings.dataset.num_classes,
        "server_samples": len(holdings.server),
        "server_origin": f"training split of {config.data}, held out from every client",
        "test_samples": len(holdings.dataset.test_labels),
    }
    write_atomically(folder / PARTITION, json.dumps(content).encode())


def _summarize(config: Config, folder: Path, part: Path) -> None:
    """A line in the run's metrics.jsonl for each strategy that has none yet."""
    path = folder / METRICS
    lines = read_lines(path) if path.exists() else []
    there = {(line["alpha"], line["seed"], line["strategy"]) for line in lines}
    for name in config.strategies:
        if (config.alpha[0], config.seed[0], name) not in there:
            summary = summarize(
                part / name,
                alpha=config.alpha[0],
                seed=config.seed[0],
                strategy=name,
                target_accuracy=config.target_accuracy,
                model_sha256=sha256(part / name / FINAL),
            )
            lines.append(asdict(summary))
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
