"""The server's memory, whatever the cohort; ten thousand clients; a small /dev/shm."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedwsa import config, messages
from fedwsa.models import MLP
from fedwsa.simulation import Engine, open_engine, simulate
from strategies.server_app import make_app

pytestmark = pytest.mark.timeout(120)

MB = 1_000_000  # bytes
MODEL = "test_memory:wide"
TESTS = Path(__file__).parent
TEN_THOUSAND = 10_000


def wide(input_shape: tuple[int, int, int], num_classes: int) -> MLP:
    """10 MB."""
    return MLP(input_shape, num_classes, hidden=(1536, 1536))


def calling(function: str) -> list[str]:
    """A command that calls a function of this file with further arguments."""
    lines = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import test_memory; test_memory.{function}(*sys.argv[1:])"
    return [sys.executable, "-c", lines]


# ---- the server's memory, and many clients


echo = ClientApp()  # the model as it came


@echo.train()
def train(message: Message, context: Context) -> Message:
    metrics = MetricRecord({messages.NUM_EXAMPLES: 1})
    return Message(RecordDict({"arrays": messages.arrays_of(message), "metrics": metrics}), reply_to=message)


def serve(folder: str, cohort: str) -> None:
    """Print what memory this process had at the most as the server of a run on Ray; then whom of many it reached."""
    settings = config.parse(
        {
            "strategies": "fedavg",
            "num-clients": 100,
            "min-size": 1,
            "alpha": 100.0,
            "cohort": int(cohort),
            "evaluation-cohort": 0,
            "rounds": 3,
            "model": MODEL,
        }
    )
    events: list[dict[str, Any]] = []
    app = make_app(Path(folder), lambda strategy, event: events.append(event))
    with open_engine("ray", workers=2) as engine:
        simulate(app, echo, settings.num_clients, engine=engine, run_config=settings.to_run_config())
        (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        asked = ask_a_hundred(engine)
    usable = [event["num_clients"] - event["num_failed"] for event in events if event["phase"] == "train"]
    print(json.dumps({"peak": int(peak.split()[1]) * 1024, "usable": usable, "asked": asked}))


def ask_a_hundred(engine: Engine | str) -> list[int]:
    """Which clients answer, of a hundred among ten thousand."""
    server, client, told = ServerApp(), ClientApp(), []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"client": int(context.node_config["partition-id"])})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = list(grid.get_node_ids())
        assert len(set(nodes)) == TEN_THOUSAND
        replies = grid.send_and_receive([Message(RecordDict(), node, "train") for node in nodes[50::100]])
        told.extend(reply.content.metric_records["metrics"]["client"] for reply in replies)

    simulate(server, client, TEN_THOUSAND, engine=engine, client_sizes=[1] * TEN_THOUSAND)
    return told


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """By cohort, what a server said of itself, each in a process of its own."""
    told = {}
    for cohort in (10, 100):
        folder = tmp_path_factory.mktemp(f"cohort-{cohort}")
        command = [*calling("serve"), str(folder), str(cohort)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert (done.returncode, done.stderr) == (0, "")
        told[cohort] = json.loads(done.stdout)
    return told


@pytest.mark.process
def test_the_servers_memory_does_not_grow_with_the_cohort(served: dict[int, dict[str, Any]]) -> None:
    """A hundred models have 1 GB."""
    assert {cohort: told["usable"] for cohort, told in served.items()} == {10: [10] * 3, 100: [100] * 3}
    few, many = served[10]["peak"], served[100]["peak"]
    assert few > 100 * MB  # it was measured
    assert many - few < 100 * MB, f"{many // MB} MB with a cohort of 100, {few // MB} MB with one of 10"


def test_ten_thousand_clients() -> None:
    assert ask_a_hundred("inprocess") == list(range(50, TEN_THOUSAND, 100))


@pytest.mark.process
def test_ten_thousand_clients_on_ray(served: dict[int, dict[str, Any]]) -> None:
    assert served[10]["asked"] == list(range(50, TEN_THOUSAND, 100))


# ---- a container's shared memory


def command(*arguments: str) -> None:
    """The `fedwsa` command, except that every client runs on Ray's workers."""
    from experiments import cli, run

    opened = run.open_engine
    run.open_engine = lambda *args, start_here, **options: opened(*args, **options)  # type: ignore[assignment]
    sys.argv = ["fedwsa", *arguments]
    cli.main()


@pytest.mark.process
def test_a_small_shared_memory_is_enough_and_nothing_is_said_about_it(tmp_path: Path) -> None:
    """Of 64 MB, for 200 MB of replies."""
    mount = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
    permitted = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True)
    if permitted.returncode:
        pytest.skip(f"no file system can be mounted here: {permitted.stderr.strip()}")
    values = {"model": MODEL, "cohort": 20, "evaluation-cohort": 0, "local-epochs": 1, "alpha": 100.0, "workers": 2}
    run = ["run", "--out=run", "--strategies=fedavg", "--rounds=1", "--num-clients=20"]
    run += [f"--set={key}={value}" for key, value in values.items()]
    shell = ["unshare", "-m", "sh", "-c", f'{mount} && df -m --output=size /dev/shm >size && exec "$@"']
    done = subprocess.run(
        [*shell, "sh", *calling("command"), *run],
        cwd=tmp_path, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "size").read_text().split()[-1] == "64"
    first, *_, last = done.stdout.splitlines()
    assert (first, last) == ("run folder: run", "report: run/report.html")
    assert not any(word in done.stdout for word in ("raylet", "/dev/shm", "WARN", "ray."))
    events = [json.loads(line) for line in (tmp_path / "run/fedavg/metrics.jsonl").read_text().splitlines()]
    (trained,) = (event for event in events if event["phase"] == "train")
    assert (trained["num_clients"], trained["num_failed"]) == (20, 0)
    assert trained["bytes_up"] > 190 * MB
