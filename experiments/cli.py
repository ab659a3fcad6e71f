"""The `fedwsa` command."""

import logging
import os
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import typer
from rich.console import Console

from fedwsa import __version__, config
from fedwsa.errors import RunError, UsageError

app = typer.Typer(
    help="Federated learning when the clients' data are not alike: run, compare and merge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

ConfigFile = Annotated[
    Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Values that differ from the defaults.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="key=value", help="Any key of the config, e.g. wsa.strength=5; may be repeated."),
]
Data = Annotated[str | None, typer.Option(help="digits, fashion-mnist, or package.module:loader.")]
DataDir = Annotated[str | None, typer.Option(help="Folder with the data set's own files.")]
Alpha = Annotated[str | None, typer.Option(help="Dirichlet α; 0.1,1 runs several.")]
Seed = Annotated[str | None, typer.Option(help="Seed; 0,1,2 runs several.")]
NumClients = Annotated[int | None, typer.Option(help="How many clients there are.")]
Out = Annotated[str | None, typer.Option(help="Run folder; otherwise runs/<time>-<name>.")]


@app.command()
def run(
    config_file: ConfigFile = None,
    set_: Set = None,
    data: Data = None,
    data_dir: DataDir = None,
    alpha: Alpha = None,
    seed: Seed = None,
    num_clients: NumClients = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of each strategy.")] = None,
    strategies: Annotated[str | None, typer.Option(help="e.g. fedavg,fedavg-wsa.")] = None,
    engine: Annotated[str | None, typer.Option(help="ray or inprocess.")] = None,
    out: Out = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with an interrupted run.")] = None,
) -> None:
    """Train one federation with each strategy, side by side; table, metrics, models and report in a run folder."""
    options = {
        "data": data,
        "data-dir": data_dir,
        "alpha": alpha,
        "seed": seed,
        "num-clients": num_clients,
        "rounds": rounds,
        "strategies": strategies,
        "engine": engine,
        "out-dir": out,
    }
    given = {key: value for key, value in options.items() if value is not None}
    if resume is not None and (config_file or set_ or given):
        raise config.ConfigError("--resume takes the config of the run folder; it goes with no other option")
    from experiments import run as job  # PyTorch and Flower, over a second: not needed for help or a wrong key

    if resume is not None:
        job.resume(resume, console)
    else:
        job.start(_config(config_file, set_, given), console)


@app.command()
def partition(
    config_file: ConfigFile = None,
    set_: Set = None,
    data: Data = None,
    data_dir: DataDir = None,
    alpha: Alpha = None,
    seed: Seed = None,
    num_clients: NumClients = None,
    out: Annotated[Path, typer.Option(help="Picture, .svg or .png.")] = Path("partition.svg"),
) -> None:
    """Show who holds which labels: a table, and a picture of clients × classes."""
    options = {"data": data, "data-dir": data_dir, "alpha": alpha, "seed": seed, "num-clients": num_clients}
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if num_clients is not None:  # cohorts play no part here
        given |= {"cohort": 1, "evaluation-cohort": 0}
    settings = _config(config_file, set_, given)
    if len(settings.federations()) > 1:
        raise config.ConfigError("partition shows one federation; allowed is one alpha and one seed")
    from clients.federation import federation
    from experiments.partition_view import partition_table, write_partition_picture

    try:
        counts = federation(settings).label_counts().tolist()
    except ValueError as error:
        raise UsageError(str(error)) from error
    console.print(partition_table(counts))
    title = f"{settings.data}: {settings.num_clients} clients, {_how(settings)}, seed {settings.seed[0]}"
    write_partition_picture(counts, title, out)
    console.print(f"picture: {out}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder, finished or not.")]) -> None:
    """Write a run folder's report.html again, from its files."""
    from experiments.report import write_report

    try:
        path = write_report(folder)
    except ValueError as error:
        raise UsageError(str(error)) from error
    console.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def version() -> None:
    """Versions of fedwsa and of what the results depend on."""
    from importlib.metadata import version as installed

    print(f"fedwsa {__version__}")
    for package in ("flwr", "torch", "ray", "numpy"):
        print(f"{package} {installed(package)}")


def _how(settings: config.Config) -> str:
    dirichlet = settings.partitioner.startswith("dirichlet")
    return f"Dirichlet α = {settings.alpha[0]:g}" if dirichlet else settings.partitioner


def _config(file: Path | None, assignments: list[str] | None, options: dict[str, Any]) -> config.Config:
    """Defaults, then the file, then --set, then the options of their own."""
    values = config.read(file) if file else {}
    for assignment in assignments or []:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise config.ConfigError(f"--set {assignment}: allowed is key=value")
        config.assign(values, key.strip(), _value(text.strip()))
    for key, value in options.items():
        config.assign(values, key, value)
    return config.parse(values)


def _value(text: str) -> Any:
    """A TOML value, or else the text itself: --set data=digits needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def main() -> None:
    """Console script: what a user did wrong is said in a line each, with exit status 2, without a traceback."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    sys.path.insert(0, "")  # an import path may name a module in the current folder
    try:
        app()
    except UsageError as error:
        _fail(error, 2)
    except RunError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail("interrupted; go on with fedwsa run --resume and the run folder", 130)


def _fail(error: object, status: int) -> None:
    for line in str(error).splitlines():
        errors.print(f"fedwsa: {line}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)
