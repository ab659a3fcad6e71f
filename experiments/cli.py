"""The `fedwsa` command."""

import io
import logging
import os
import signal
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import typer
from rich.console import Console

from fedwsa import __version__, config
from fedwsa.errors import RunError, UsageError
from fedwsa.importing import uncollected

app = typer.Typer(
    help="Federated learning when the clients' data are not alike: run, compare and merge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

# What arguments are is said in the commands' docstrings (Typer keeps the line breaks there): with Click ≥ 8.5, whose
# constructor sets it back to None, the help of a typer.Argument is not shown.
ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="key=value", help="Any key of the config, e.g. wsa.strength=5; may be repeated."),
]
Data = Annotated[str | None, typer.Option(help="digits, fashion-mnist, cifar10, … or package.module:loader.")]
DataDir = Annotated[str | None, typer.Option(help="Folder with the data set's own files.")]
Partitioner = Annotated[str | None, typer.Option(help="iid, dirichlet, shards, … or package.module:partitioner.")]
PartitionFile = Annotated[
    str | None, typer.Option("--partition", metavar="FILE", help="A partition.json, instead of the partitioner.")
]
Alpha = Annotated[str | None, typer.Option(help="Dirichlet α; for run also several, as 0.1,1.")]
Seed = Annotated[str | None, typer.Option(help="Seed; for run also several, as 0,1,2.")]
NumClients = Annotated[int | None, typer.Option(help="How many clients there are.")]
Out = Annotated[str | None, typer.Option(help="Run folder; otherwise runs/<time>-<name>.")]

NO_PART = {"strategies": "fedavg", "cohort": 1, "evaluation-cohort": 0, "min-replies": 1}
"""What plays no part in who holds what, and must not contradict the rest of a config."""


@app.command()
def run(
    config_file: ConfigFile = None,
    set_: Set = None,
    data: Data = None,
    data_dir: DataDir = None,
    partitioner: Partitioner = None,
    partition_file: PartitionFile = None,
    alpha: Alpha = None,
    seed: Seed = None,
    num_clients: NumClients = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of each strategy.")] = None,
    strategies: Annotated[str | None, typer.Option(help="e.g. fedavg,fedavg-wsa.")] = None,
    engine: Annotated[str | None, typer.Option(help="ray or inprocess.")] = None,
    out: Out = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with an interrupted run.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show where a round's time went; trace.json.")] = False,
) -> None:
    """Train one federation with each strategy, side by side; table, metrics, models and report in a run folder.

    CONFIG.toml: values that differ from the defaults. A run folder's config.toml
    has every key; what each means, its range and its default are in
    fedwsa/config.py and fedwsa/sections.py.
    """
    options = {
        "data": data,
        "data-dir": data_dir,
        "partitioner": partitioner,
        "partition-file": partition_file,
        "alpha": alpha,
        "seed": seed,
        "num-clients": num_clients,
        "rounds": rounds,
        "strategies": strategies,
        "engine": engine,
        "out-dir": out,
    }
    given = any(value is not None for value in options.values())
    if resume is not None and (config_file or set_ or given):
        raise config.ConfigError("--resume takes the config of the run folder; it goes with no other option")
    settings = _config(config_file, set_, options) if resume is None else None
    with uncollected():
        from experiments import run as job  # PyTorch and Flower, over a second: not needed for help or a wrong key

    try:
        if settings is not None:
            job.start(settings, console, profile=profile)
        elif resume is not None:
            job.resume(resume, console, profile=profile)
    except job.InterruptedRunError as error:
        _fail(error, error.status)


@app.command()
def partition(
    config_file: ConfigFile = None,
    set_: Set = None,
    data: Data = None,
    data_dir: DataDir = None,
    partitioner: Partitioner = None,
    partition_file: PartitionFile = None,
    alpha: Alpha = None,
    seed: Seed = None,
    num_clients: NumClients = None,
    out: Annotated[Path, typer.Option(help="Picture, .svg or .png.")] = Path("partition.svg"),
    json: Annotated[Path, typer.Option(help="The partition, for --partition.")] = Path("partition.json"),
) -> None:
    """Show who holds which labels, and how unlike the clients are: tables, a picture, and a file to publish.

    CONFIG.toml: values that differ from the defaults, as for run.
    """
    options = {
        "data": data,
        "data-dir": data_dir,
        "partitioner": partitioner,
        "partition-file": partition_file,
        "alpha": alpha,
        "seed": seed,
        "num-clients": num_clients,
    }
    settings = _config(config_file, set_, options | NO_PART)
    if len(settings.federations()) > 1:
        raise config.ConfigError("partition shows one federation; allowed is one alpha and one seed")
    form = _picture_format(out)
    _check_place("--json", json, out, *filter(None, [config_file]))
    with uncollected():
        from clients.federation import federation
        from experiments import figures
        from experiments import partition_view as view
        from fedwsa import files

    with _usage():
        holdings = federation(settings)
    counts = holdings.label_counts().tolist()
    console.print(view.partition_table(counts))
    console.print("", view.heterogeneity_table(counts))
    title = f"{settings.data}: {settings.num_clients} clients, {view.describe(holdings.made_by)}"
    with _written(out):
        files.replace(out, figures.draw_partition(counts, title, form))
    with _written(json):
        files.replace(json, view.partition_json(holdings))
    console.print(f"\npartition: {json}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"picture: {out}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument()],
    picture: Annotated[Path | None, typer.Option(help="Also write accuracy by round to this .svg.")] = None,
) -> None:
    """Write a run folder's report.html again, from its files.

    FOLDER: a run folder, finished or not.
    """
    if picture is not None:
        _picture_format(picture, "--picture", ("svg",))
    with uncollected():
        from experiments.report import write_accuracy, write_report

    with _usage(), _read(folder):
        path = write_report(folder)
    console.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)
    if picture is not None:
        with _usage(), _read(folder):
            write_accuracy(folder, picture)
        console.print(f"picture: {picture}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument()],
    out: Annotated[Path, typer.Option(help="Picture, .svg or .png.")] = Path("inspect.svg"),
) -> None:
    """Show each layer's weight scope and how Gaussian it is: a table, and a picture of histograms.

    CHECKPOINT: a model in a safetensors file, e.g. a run's final.safetensors.
    """
    form = _picture_format(out)
    with uncollected():
        from experiments.inspection import draw_layers, layer_cells, layers_of
        from experiments.table import rich_table
        from fedwsa import files, weights

    with _usage():
        layers = layers_of(weights.read(checkpoint))
    console.print(rich_table(layer_cells(layers, str(checkpoint))))
    with _written(out):
        files.replace(out, draw_layers(layers, str(checkpoint), form))
    console.print(f"picture: {out}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def barrier(
    a: Annotated[Path, typer.Argument(metavar="A")],
    b: Annotated[Path, typer.Argument(metavar="B")],
    config_file: ConfigFile = None,
    set_: Set = None,
    model: Annotated[str | None, typer.Option(help="mlp, cnn, vgg8, … or package.module:factory.")] = None,
    data: Data = None,
    data_dir: DataDir = None,
    points: Annotated[int, typer.Option(help="Places on the line, both ends included.")] = 21,
    train_samples: Annotated[int, typer.Option(help="Training samples to evaluate on, by share of class.")] = 2000,
    align: Annotated[bool, typer.Option("--align", help="Also with B's hidden units permuted towards A's.")] = False,
    recalibrate: Annotated[bool, typer.Option(help="Estimate BatchNorm's statistics anew at each place.")] = True,
    out: Annotated[Path, typer.Option(help="Picture, .svg or .png.")] = Path("barrier.svg"),
    json: Annotated[Path | None, typer.Option(help="Also write the curves to this file.")] = None,
) -> None:
    """Show loss and accuracy on the straight line between two models, and their barriers: a table and a picture.

    A, B: models of one kind in safetensors files, e.g. final.safetensors of runs.
    CONFIG.toml: their model and data, e.g. the config.toml of a run's folder.
    """
    form = _picture_format(out)
    if json is not None:
        _check_place("--json", json, out, a, b, *filter(None, [config_file]))
    for option, value, least in (("--points", points, 3), ("--train-samples", train_samples, 1)):
        if value < least:
            raise UsageError(f"{option} {value}: allowed is a whole number ≥ {least}")
    settings = _config(config_file, set_, {"model": model, "data": data, "data-dir": data_dir})
    with uncollected():
        from experiments import barrier_view as view
        from experiments.table import rich_table
        from fedwsa import files

    with _usage():
        found = view.compare(
            a, b, settings, points=points, train_samples=train_samples, align=align, recalibrated=recalibrate
        )
    console.print(rich_table(view.barrier_cells(found)))
    with _written(out):
        files.replace(out, view.draw_curves(found, form))
    if json is not None:
        with _written(json):
            files.replace(json, view.to_json(found))
        console.print(f"curves: {json}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"picture: {out}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def version() -> None:
    """Versions of fedwsa and of what the results depend on."""
    from importlib.metadata import version as installed

    print(f"fedwsa {__version__}")
    for package in ("flwr", "torch", "ray", "numpy"):
        print(f"{package} {installed(package)}")


def _config(file: Path | None, assignments: list[str] | None, options: dict[str, Any]) -> config.Config:
    """Defaults, then the file, then --set, then the options of their own; those that are None were not given."""
    values = config.read(file) if file else {}
    for assignment in assignments or []:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise config.ConfigError(f"--set {assignment}: allowed is key=value")
        config.assign(values, key.strip(), _value(text.strip()))
    for key, value in options.items():
        if value is not None:
            config.assign(values, key, value)
    return config.parse(values)


def _value(text: str) -> Any:
    """A TOML value, or else the text itself: --set data=digits needs no quotes, nor does --set name=2026-01-31."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str | list | dict) else text


def _picture_format(picture: Path, option: str = "--out", forms: tuple[str, ...] = ("svg", "png")) -> str:
    """One of the forms, as the name says; where it cannot be written, that is said before the work."""
    form = picture.suffix.lower().removeprefix(".")
    if form not in forms:
        raise UsageError(f"{option} {picture}: allowed is a name that ends in .{' or .'.join(forms)}")
    _check_place(option, picture)
    return form


def _check_place(option: str, path: Path, *taken: Path) -> None:
    """UsageError unless a file can be there, and is none of those `taken` for something else, before the work."""
    if not os.path.isdir(path.parent):
        raise UsageError(f"{option} {path}: there is no folder {path.parent}; allowed is a file in one that there is")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {path}: the folder {path.parent} cannot be written to; allowed is one that can")
    if os.path.exists(path) and not os.path.isfile(path):  # a device would be replaced by a file
        kind = "folder" if os.path.isdir(path) else "device or a pipe"
        raise UsageError(f"{option} {path}: is a {kind}; allowed is a file")
    if os.path.realpath(path) in map(os.path.realpath, taken):
        raise UsageError(f"{option} {path}: is read, or written as another, by this command; allowed is another file")


@contextmanager
def _usage() -> Iterator[None]:
    """What a command's functions raise for what they were given, in one line without a traceback."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


@contextmanager
def _read(folder: Path) -> Iterator[None]:
    """A file of a run that the system refuses, in one line without a traceback."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from error


@contextmanager
def _written(written: Path) -> Iterator[None]:
    """A file that cannot be written, in one line without a traceback."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{written}: cannot be written: {error.strerror or error}") from error


def main() -> None:
    """Console script: what a user did wrong is said in a line each, with exit status 2, without a traceback."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not in UTF-8
    sys.path.append("")  # an import path may name a module in the current folder; ours and installed ones come first
    try:
        app()
    except UsageError as error:
        _fail(error, 2)
    except RunError as error:
        _fail(error, 1)


def _terminate(number: int, frame: object) -> NoReturn:
    """As Ctrl-C does, everything is closed on the way out."""
    raise KeyboardInterrupt(number)


def _fail(error: object, status: int) -> NoReturn:
    for line in str(error).splitlines():
        errors.print(f"fedwsa: {line}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)
