"""The main job: every federation of a config, each with all its strategies, into one run folder."""

import json
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

import strategies
from clients import optimizers
from clients.client_app import app as client_app
from clients.federation import federation
from experiments import profile as profile_view
from experiments.display import Display
from experiments.partition_view import partition_json
from experiments.report import write_report
from experiments.results import Run, read_run
from experiments.table import summary_table
from fedwsa import config as configuration
from fedwsa import data, models, tracing, weights
from fedwsa.config import Config, ConfigError
from fedwsa.data.augmentation import AUGMENTATIONS
from fedwsa.errors import RunError, UsageError
from fedwsa.registry import check_call, lookup
from fedwsa.run_folder import (
    CONFIG,
    FINAL,
    LOCK,
    METRICS,
    PARTITION,
    FolderInUseError,
    claim,
    discard_leftovers,
    new_folder,
    part_name,
    remove,
    unusable,
    write_atomically,
)
from fedwsa.simulation import Engine, open_engine, simulate
from strategies.server_app import make_app, pinned

TRACE = "trace.json"


class InterruptedRunError(RunError):
    """A run that Ctrl-C or SIGTERM ended; `status` is 128 and the signal's number."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def start(config: Config, console: Console, *, profile: bool = False) -> Path:
    """Run a config into a new folder, and show the result; returns the folder.

    profile: also show where the time went, and write it to the folder's trace.json.
    """
    check(config)
    config = pinned(config)
    folder = new_folder(config)
    with _usable(folder):
        _check_new(folder)
    with _claimed(folder):
        _check_new(folder)  # again, now that nobody else can
        repeatable = config.model_copy(update={"out_dir": ""})  # else to repeat it would mean to write over it
        write_atomically(folder / CONFIG, repeatable.to_toml().encode())
        with _profiled(folder, console) if profile else nullcontext():
            _run(config, folder, console)
    return folder


def resume(folder: Path, console: Console, *, profile: bool = False) -> Path:
    """Go on with a run that was interrupted, from the last checkpoint of each strategy."""
    with _usable(folder):
        found = (folder / CONFIG).is_file()
    if not found:
        raise UsageError(f"{folder}: no run to resume, {CONFIG} is missing")
    config = configuration.parse(configuration.read(folder / CONFIG))
    check(config)
    with _claimed(folder):
        discard_leftovers(folder)
        with _profiled(folder, console) if profile else nullcontext():
            _run(config, folder, console)
    return folder


def check(config: Config) -> None:
    """What the config names exists and fits, and its split is possible; else ConfigError, a line a problem.

    Before any work: nothing is written, and no random state is touched.
    """
    needed: list[Callable[[], object]] = [
        *(partial(strategies.find, name) for name in config.strategies),
        partial(optimizers.check, config),
        partial(lookup, models.MODELS, config.model, "model"),
        partial(_check_augmentation, config.augmentation),
        partial(_check_model, config),
        partial(_check_device, config),
        *(partial(federation, one) for one in config.federations()),
        partial(_check_alpha, config),
        partial(_check_strategies, config),
    ]
    problems = []
    for need in needed:
        try:
            need()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys("\n".join(problems).splitlines())))


def _check_augmentation(name: str) -> None:
    if name:
        found = lookup(AUGMENTATIONS, name, "augmentation")
        check_call(found, f"augmentation {name!r}", "(images, generator)", None, None)


def _check_model(config: Config) -> None:
    dataset = data.of_config(config)
    model = models.of_config(config, dataset.input_shape, dataset.num_classes, seed=0)
    image, _ = dataset.train_tensors(np.zeros(1, np.int64))
    models.check_takes(model, config.model, image, dataset.num_classes)
    weights.begin(model, config)


def _check_alpha(config: Config) -> None:
    if len(config.alpha) > 1 and "alpha" not in federation(config.federations()[0]).made_by:
        raise ValueError(
            f"alpha = {list(config.alpha)}: with partitioner {config.partitioner!r} it decides nothing; "
            "allowed is one value"
        )


def _check_device(config: Config) -> None:
    if config.gpus_per_client and not config.ray_address and not torch.cuda.is_available():
        raise ValueError(
            f"gpus-per-client = {config.gpus_per_client:g}: there is no CUDA device here; allowed is 0, or a "
            "ray-address of machines that have one"
        )


def _check_strategies(config: Config) -> None:
    """Each is built once, on what the server of the first federation holds."""
    one = config.federations()[0]
    holdings = federation(one)
    dataset = holdings.dataset
    model = models.of_config(one, dataset.input_shape, dataset.num_classes, seed=0)
    holdout = strategies.Holdout(model, *dataset.train_tensors(holdings.server))
    problems = []
    for name in config.strategies:
        try:
            strategies.build(name, one, holdout)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def _check_new(folder: Path) -> None:
    if (folder / CONFIG).exists():
        raise FolderInUseError(
            f"{folder}: holds a run already; go on with it by {_resume_command(folder)}, or choose another folder"
        )
    if folder.is_dir() and any(entry.name != LOCK for entry in folder.iterdir()):
        raise FolderInUseError(f"{folder}: holds other files; allowed is a folder that is empty or not yet there")


def _resume_command(folder: Path) -> str:
    return f"fedwsa run --resume {shlex.quote(str(folder))}"


@contextmanager
def _usable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unusable(folder, error) from error


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    release = claim(folder)
    try:
        yield
    finally:
        release()


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """The user is told how to go on with a run that is interrupted, or that a RunError ends."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{error}; once this is mended, go on with: {_resume_command(folder)}") from error
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        raise InterruptedRunError(f"interrupted; go on with: {_resume_command(folder)}", 128 + number) from stop


@contextmanager
def _profiled(folder: Path, console: Console) -> Iterator[None]:
    tracing.start()
    try:
        yield
        processes = {profile_view.SERVER: tracing.take(), **tracing.take_others()}
    finally:
        tracing.stop()
    rounds = sum(what == "round" for what, _, _ in processes[profile_view.SERVER])
    if not rounds:
        console.print("profile: no round was trained, so that there is nothing to show")
    else:
        console.print(profile_view.table(*profile_view.per_round(processes, rounds)))
        write_atomically(folder / TRACE, profile_view.chrome_trace(processes))
        console.print(f"trace: {folder / TRACE}", markup=False, highlight=False, soft_wrap=True)


def _run(config: Config, folder: Path, console: Console) -> None:
    console.print(f"run folder: {folder}", markup=False, highlight=False, soft_wrap=True)
    with _resumable(folder):
        if not all(_is_finished(one, _part(config, one, folder)) for one in config.federations()):
            remove(folder / METRICS)  # of an earlier start; what it says may have been begun anew since
            _train(config, folder, console)
        try:
            run = read_run(folder)
            _write_summaries(run, folder / METRICS)
            report = write_report(folder)
            table = summary_table(run)
        except OSError as error:
            raise RunError(f"{folder}: cannot be read: {error.strerror or error}") from error
        except ValueError as error:  # of a file that somebody has damaged
            raise RunError(str(error)) from error
    console.print(table)
    console.print(f"report: {report}", markup=False, highlight=False, soft_wrap=True)


def _train(config: Config, folder: Path, console: Console) -> None:
    engine = open_engine(
        config.engine,
        workers=config.workers,
        threads_per_client=config.threads_per_client,
        start_here=not _brings_own_code(config),
        cpus_per_client=config.cpus_per_client,
        gpus_per_client=config.gpus_per_client,
        ray_address=config.ray_address,
    )
    with Display(config, console) as display, engine as opened:
        for one in config.federations():
            with tracing.span("other"):
                _train_one(one, _part(config, one, folder), display, opened)


def _brings_own_code(config: Config) -> bool:
    """Whether a client runs what is not ours, and could hang or die: not in this process."""
    parts = (config.model, config.data, config.augmentation, config.optimizer, config.feature_shift)
    return any(":" in part for part in parts)


def _train_one(one: Config, part: Path, display: Display, engine: Engine) -> None:
    """The strategies of one federation that have no final model yet."""
    holdings = federation(one)
    display.begin(one, holdings.made_by)
    write_atomically(part / PARTITION, partition_json(holdings))
    for name in one.strategies:
        if (part / name / FINAL).exists():
            display.finished(name)
    if not _is_finished(one, part):
        simulate(
            make_app(part, display.event),
            client_app,
            one.num_clients,
            engine=engine,
            run_config=one.to_run_config(),
            client_sizes=[len(part) for part in holdings.training],
        )
    for name in one.strategies:
        display.finished(name)


def _part(config: Config, one: Config, folder: Path) -> Path:
    """Where one of the config's federations is."""
    return folder if len(config.federations()) == 1 else folder / part_name(one.alpha[0], one.seed[0])


def _is_finished(one: Config, part: Path) -> bool:
    return all((part / name / FINAL).exists() for name in one.strategies)


def _write_summaries(run: Run, path: Path) -> None:
    """The run's metrics.jsonl: a line for each (α, seed, strategy)."""
    found = [result.summary for each in run.federations for result in each.results.values()]
    write_atomically(path, "".join(json.dumps(asdict(each)) + "\n" for each in found if each).encode())
