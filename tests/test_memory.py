"""The server's memory, whatever the cohort; a container's small /dev/shm; ten thousand clients."""

import json
import os
import shutil
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

pytestmark = pytest.mark.timeout(300)

MB = 1_000_000  # bytes
MODEL = "test_memory:wide"
TESTS = Path(__file__).parent
TEN_THOUSAND = 10_000


def wide(input_shape: tuple[int, int, int], num_classes: int) -> MLP:
    """10 MB."""
    return MLP(input_shape, num_classes, hidden=(1536, 1536))


echo = ClientApp()  # the model as it came


@echo.train()
def train(message: Message, context: Context) -> Message:
    metrics = MetricRecord({messages.NUM_EXAMPLES: 1})
    return Message(RecordDict({"arrays": messages.arrays_of(message), "metrics": metrics}), reply_to=message)


def serve(folder: str, cohort: str) -> None:
    """Print what this process saw as the server of a run on Ray, and then whom it reached of many clients."""
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
    shared = os.statvfs("/dev/shm")
    told = {"peak": int(peak.split()[1]) * 1024, "shared": shared.f_blocks * shared.f_frsize}
    print(json.dumps({**told, "usable": usable, "asked": asked}))


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


SMALL = "mount -t tmpfs -o size=64m tmpfs /dev/shm"


@pytest.fixture(scope="module")
def refused() -> str:
    """Why no small /dev/shm can be had here; empty if it can."""
    command = ["unshare", "-m", "sh", "-c", SMALL]
    if not shutil.which(command[0]):
        return "there is no unshare"
    return subprocess.run(command, capture_output=True, text=True).stderr.strip()


def told_by(folder: Path, cohort: int, refused: str) -> dict[str, Any]:
    """What a server in a process of its own saw, with a small /dev/shm if possible."""
    lines = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import test_memory; test_memory.serve(*sys.argv[1:])"
    command = [sys.executable, "-c", lines, str(folder), str(cohort)]
    if not refused:
        command = ["unshare", "-m", "sh", "-c", f'{SMALL} && exec "$@"', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, refused: str) -> dict[int, dict[str, Any]]:
    """By cohort, what a server saw."""
    return {cohort: told_by(tmp_path_factory.mktemp(f"cohort-{cohort}"), cohort, refused) for cohort in (10, 100)}


@pytest.mark.process
def test_the_servers_memory_does_not_grow_with_the_cohort(
    served: dict[int, dict[str, Any]], refused: str, tmp_path: Path
) -> None:
    """A hundred models have 1 GB. What else the machine does adds to a peak, so that a high one is looked at twice."""
    assert {cohort: told["usable"] for cohort, told in served.items()} == {10: [10] * 3, 100: [100] * 3}
    few, many = served[10]["peak"], served[100]["peak"]
    assert few > 100 * MB  # it was measured
    if many - few >= 100 * MB:
        many = min(many, told_by(tmp_path, 100, refused)["peak"])
    assert many - few < 100 * MB, f"{many // MB} MB with a cohort of 100, {few // MB} MB with one of 10"


@pytest.mark.process
def test_a_small_shared_memory_is_enough(served: dict[int, dict[str, Any]], refused: str) -> None:
    """Of 64 MB, for 1 GB of replies a round; that nothing is said about it has been seen by the fixture."""
    if refused:
        pytest.skip(f"no file system can be mounted here: {refused}")
    assert {told["shared"] for told in served.values()} == {64 << 20}
    assert served[100]["usable"] == [100] * 3


@pytest.mark.process
def test_ten_thousand_clients_on_ray(served: dict[int, dict[str, Any]]) -> None:
    assert served[10]["asked"] == list(range(50, TEN_THOUSAND, 100))


def test_ten_thousand_clients() -> None:
    assert ask_a_hundred("inprocess") == list(range(50, TEN_THOUSAND, 100))
