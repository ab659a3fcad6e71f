"""What goes wrong under a run: it goes on with the same bytes, or ends with a line, and leaves nothing behind."""

import ctypes
import functools
import gc
import io
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from federations import lines, tiny
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from clients.client_app import app as client_app
from fedwsa import messages
from fedwsa.config import Config
from fedwsa.run_folder import sha256
from fedwsa.simulation import Engine, lending, open_engine, sending, shared_memory, simulate
from fedwsa.simulation.links import RECORDS
from strategies.server_app import make_app

pytestmark = pytest.mark.process

WORKERS = 2
BAD = 5  # the client that faults happen to: the second of the unit of 4, 5, 6 and 7
Fault = Callable[[int], object]  # of the client that it happens to


def config(**changes: Any) -> Config:
    """Two rounds of FedAvg, with all eight clients in each phase."""
    values = {"strategies": ("fedavg",), "num_clients": 8, "cohort": 8, "evaluation_cohort": 8}
    return tiny(**{**values, **changes})


def faulty(fault: Fault, kind: str = "train", clients: tuple[int, ...] = (BAD,), log: Path | None = None) -> ClientApp:
    """Our clients; to these the fault happens in round 2, when they have computed and not yet answered."""
    app = ClientApp()

    def answer(now: str, message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        server_round = message.content.config_records[messages.CONFIG][messages.SERVER_ROUND]
        reply = client_app(message, context)
        if log:
            with log.open("a") as file:
                file.write(f"{now} {server_round} {client}\n")
        if (now, server_round) == (kind, 2) and client in clients:
            fault(client)
        return reply

    app.train()(functools.partial(answer, "train"))
    app.evaluate()(functools.partial(answer, "evaluate"))
    return app


def run(settings: Config, folder: Path, engine: Engine | str, client: ClientApp) -> list[dict[str, Any]]:
    """What a run of our ServerApp logs, without what a clock decides."""
    app = make_app(folder, lambda strategy, event: None)
    simulate(app, client, settings.num_clients, engine=engine, run_config=settings.to_run_config())
    return lines(folder / "fedavg" / "metrics.jsonl")


def model(folder: Path) -> str:
    return sha256(folder / "fedavg" / "final.safetensors")


def failures(events: list[dict[str, Any]]) -> dict[tuple[int, str], list[str]]:
    """By round and phase."""
    return {(event["round"], event["phase"]): event["failures"] for event in events if "failures" in event}


def raise_(client: int) -> None:
    raise ValueError("no such luck")


def die(client: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return result


# ---- what is left behind


def marked(mark: str) -> dict[int, str]:
    """Command lines of all processes but this one that carry a mark in their environment, whoever their parent is."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes() and int(entry.name) != os.getpid():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:  # ended meanwhile
            continue
    return found


def is_worker(line: str) -> bool:
    """Tell by its command line whether a process of Ray's is a worker, starting, idle or serving."""
    script = next(iter(line.split()[1:]), "")
    return line.startswith(("ray::Worker", "ray::IDLE")) or script.endswith("default_worker.py")


def zombies() -> list[str]:
    """Children of this process that have ended, and that nobody has waited for."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = entry.read_text().rpartition(")")
        except OSError:
            continue
        state, parent, *_ = rest.split()
        if state == "Z" and int(parent) == os.getpid():
            found.append(name)
    return found


def descriptors() -> list[str]:
    """What this process has open."""
    targets = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            targets.append(os.readlink(entry))
        except OSError:
            continue
    return targets


def segments() -> int:
    """Memory files of ours that this process has open."""
    return sum("memfd:fedwsa" in target for target in descriptors())


def unclaimed() -> set[str]:
    """Files in /dev/shm that no process maps: what one leaves there when it ends."""
    mapped = ""
    for entry in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped += entry.read_text()
        except OSError:
            continue
    return {str(path) for path in Path("/dev/shm").iterdir() if str(path) not in mapped}


OURS = "@fedwsa-"  # as /proc has names that are no files


def ours_in_unix(part: str) -> list[str]:
    """Unix sockets of this process whose path has this part."""
    own = {target.removeprefix("socket:[").removesuffix("]") for target in descriptors() if target.startswith("socket")}
    table = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return [fields[7] for fields in table if len(fields) > 7 and fields[6] in own and part in fields[7]]


@dataclass
class Opened:
    """The engine that the tests share, and what there was beside its workers when it had come up."""

    engine: Any
    mark: str
    rays: set[int] = field(default_factory=set)  # process ids

    def others(self) -> dict[int, str]:
        """Everything that has been started since and is not part of Ray itself."""
        return {pid: line for pid, line in marked(self.mark).items() if pid not in self.rays}

    def all_are_up(self) -> bool:
        """By their connections: Ray does not always manage to rename a process that serves."""
        return len(self.others()) == WORKERS == len(ours_in_unix(OURS))

    def check(self) -> None:
        """All workers are there, and nothing else: no process, no zombie, no memory that is lent to anybody."""
        assert wait_until(self.all_are_up), self.others()
        assert zombies() == []
        gc.collect()
        pool = self.engine._shared_memory.pool
        assert sorted(pool.free) == sorted(pool.blocks)
        assert segments() <= 2 * len(pool.blocks) + RECORDS  # a map keeps a descriptor of its own


@pytest.fixture(scope="module")
def opened() -> Iterator[Opened]:
    """At its end, after everything that has happened to it, the engine leaves nothing behind."""
    mark = f"FEDWSA_TEST={uuid.uuid4()}"
    before = unclaimed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*mark.split("="))
        patch.setenv("SPT_NOENV", "1")  # processes that rename themselves keep their environment readable
        with open_engine("ray", workers=WORKERS) as engine:
            shared = Opened(engine, mark)
            assert wait_until(lambda: len(ours_in_unix(OURS)) == WORKERS), shared.others()
            shared.rays = {pid for pid, line in shared.others().items() if not is_worker(line)}
            assert wait_until(shared.all_are_up), shared.others()
            yield shared
    assert wait_until(lambda: not marked(mark)), marked(mark)
    assert zombies() == []
    gc.collect()
    assert segments() == 0
    assert "memfd:fedwsa" not in Path("/proc/self/maps").read_text()
    assert unclaimed() <= before
    assert ours_in_unix("/session_") + ours_in_unix(OURS) == []


@pytest.fixture
def engine(opened: Opened) -> Iterator[Engine]:
    yield opened.engine
    opened.check()


@pytest.fixture(params=["inprocess", pytest.param("ray", marks=pytest.mark.process)])
def either(request: pytest.FixtureRequest) -> Engine | str:
    """Both engines, one after the other."""
    chosen: Engine | str = "inprocess" if request.param == "inprocess" else request.getfixturevalue("engine")
    return chosen


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Decides how many clients travel together, whatever the clock says."""

    def of(size: int) -> None:
        monkeypatch.setattr(sending, "units", lambda seconds, workers: [size] * (len(seconds) // size))

    return of


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(config(), folder, "inprocess", client_app)
    return folder


# ---- a worker dies


@pytest.mark.parametrize(
    ("kind", "size", "clients", "again"),
    [
        ("train", 1, (BAD,), {5: 2}),
        ("train", 4, (BAD,), {4: 2, 5: 2}),
        ("train", 4, (1, 7), {0: 2, 1: 2, 4: 2, 5: 2, 6: 2, 7: 2}),
        ("evaluate", 4, (BAD,), {4: 2, 5: 2}),
    ],
    ids=["alone", "in a folded unit", "both workers", "in an evaluation"],
)
def test_a_worker_killed_in_the_middle_of_a_client_costs_nothing(
    tmp_path: Path,
    engine: Engine,
    units: Callable[[int], None],
    undisturbed: Path,
    kind: str,
    size: int,
    clients: tuple[int, ...],
    again: dict[int, int],
) -> None:
    """The clients that its task had not yet answered compute again, and only these: a unit is answered as a whole."""
    log = tmp_path / "log"

    def die_once(client: int) -> None:
        died = tmp_path / f"died-{client}"
        if not died.exists():
            died.touch()
            die(client)

    units(size)
    events = run(config(), tmp_path / "run", engine, faulty(die_once, kind, clients, log))
    assert model(tmp_path / "run") == model(undisturbed)
    assert events == lines(undisturbed / "fedavg" / "metrics.jsonl")
    times = Counter(log.read_text().splitlines())
    assert times == {
        f"{now} {server_round} {client}": again.get(client, 1) if (now, server_round) == (kind, 2) else 1
        for now, server_round, client in itertools.product(("train", "evaluate"), (1, 2), range(8))
    }


def test_a_client_that_kills_its_worker_each_time_fails_alone(
    tmp_path: Path, engine: Engine, units: Callable[[int], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """As the kernel does where memory is short. The others of its unit count, with their places and their bits."""
    units(4)
    log = tmp_path / "log"
    capfd.readouterr()
    events = run(config(), tmp_path / "run", engine, faulty(die, log=log))
    assert capfd.readouterr() == ("", "")  # Ray has a paragraph for each death
    ((phase, (failure,)),) = failures(events).items()
    assert phase == (2, "train")
    assert failure.startswith(f"node {1000 + BAD}: error 8: ")
    assert Counter(log.read_text().splitlines())[f"train 2 {BAD}"] == 3
    run(config(), tmp_path / "raised", "inprocess", faulty(raise_))
    assert model(tmp_path / "run") == model(tmp_path / "raised")


def test_what_a_client_started_ends_with_its_worker(tmp_path: Path, engine: Engine) -> None:
    """A data loader's processes, for one."""
    started = tmp_path / "started"

    def die_once(client: int) -> None:
        if not started.exists():
            started.write_text(str(subprocess.Popen(["sleep", "600"]).pid))
            die(client)

    assert failures(run(config(), tmp_path / "run", engine, faulty(die_once))) == {}
    assert wait_until(lambda: not Path("/proc", started.read_text()).exists(), seconds=12)


# ---- a client fails


def test_a_client_that_raises_gives_an_error_reply_with_its_traceback(
    engine: Engine, units: Callable[[int], None]
) -> None:
    units(4)
    client, server, told = ClientApp(), ServerApp(), []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == BAD:
            raise_(BAD)
        return Message(RecordDict(), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        outgoing = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
        told.extend(grid.send_and_receive(outgoing))

    simulate(server, client, 8, engine=engine)
    assert [reply.has_error() for reply in told] == [client == BAD for client in range(8)]
    first, *_, last = told[BAD].error.reason.strip().splitlines()
    assert (first, last) == ("Traceback (most recent call last):", "ValueError: no such luck")
    assert "in raise_\n" in told[BAD].error.reason


@dataclass
class Outcome:
    status: int
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def fedwsa(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], either: Engine | str
) -> Command:
    """The command in this process and in an empty folder, with clients and an engine of the test's choice."""
    from experiments import cli, run

    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
    monkeypatch.setattr(run, "write_report", lambda folder: folder / "report.html")
    if not isinstance(either, str):
        monkeypatch.setattr(run, "open_engine", lambda *_, **__: nullcontext(either))
    settings = config(engine="inprocess", out_dir="run")
    Path("config.toml").write_text(settings.to_toml())

    def command(client: ClientApp, *arguments: str) -> Outcome:
        monkeypatch.setattr(run, "client_app", client)
        monkeypatch.setattr(sys, "argv", ["fedwsa", "run", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Outcome(int(ended.value.code or 0), capfd.readouterr().err)

    return command


HINT = "; once this is mended, go on with: fedwsa run --resume run\n"


def check_resumed(fedwsa: Command, undisturbed: Path) -> None:
    assert fedwsa(client_app, "--resume=run") == Outcome(0, "")
    assert model(Path("run")) == model(undisturbed)


def test_skip_goes_on_without_a_client_that_raises_and_names_it(fedwsa: Command, undisturbed: Path) -> None:
    assert fedwsa(faulty(raise_), "config.toml", "--set=on-client-failure=skip") == Outcome(0, "")
    events = lines(Path("run/fedavg/metrics.jsonl"))
    assert failures(events) == {(2, "train"): [f"node {1000 + BAD}: error 2: ValueError: no such luck"]}
    counts = {(event["round"], event["num_failed"]) for event in events if event["phase"] == "train"}
    assert counts == {(1, 0), (2, 1)}
    assert model(Path("run")) != model(undisturbed)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_fail_ends_the_run_with_a_line_and_can_be_gone_on_with(fedwsa: Command, undisturbed: Path, kind: str) -> None:
    outcome = fedwsa(faulty(raise_, kind), "config.toml", "--set=on-client-failure=fail")
    assert outcome == Outcome(1, f"fedwsa: round 2: node {1000 + BAD}: error 2: ValueError: no such luck{HINT}")
    check_resumed(fedwsa, undisturbed)


def test_too_few_replies_end_the_run_with_a_line_and_it_can_be_gone_on_with(fedwsa: Command, undisturbed: Path) -> None:
    enough = fedwsa(faulty(raise_, clients=(1, 2, BAD)), "config.toml", "--set=min-replies=5", "--out=enough")
    assert enough == Outcome(0, "")
    outcome = fedwsa(faulty(raise_, clients=(1, 2, BAD, 7)), "config.toml", "--set=min-replies=5")
    assert outcome == Outcome(
        1,
        "fedwsa: round 2: 4 of 8 clients gave a usable reply, 5 are needed; "
        f"node 1001: error 2: ValueError: no such luck{HINT}",
    )
    check_resumed(fedwsa, undisturbed)


# ---- a client hangs


def hold_everything() -> None:
    """Python itself stands still, as in a library that never comes back."""
    ctypes.PyDLL(None).sleep(600)


@pytest.mark.parametrize(
    ("hang", "size"), [(lambda: time.sleep(600), 1), (hold_everything, 4)], ids=["asleep", "holding the interpreter"]
)
def test_a_client_that_hangs_is_given_up_after_the_timeout(
    tmp_path: Path, engine: Engine, units: Callable[[int], None], hang: Callable[[], object], size: int
) -> None:
    units(size)
    hanging = tmp_path / "hanging"

    def fault(client: int) -> None:
        hanging.write_text(str(os.getpid()))
        hang()

    run(config(rounds=1), tmp_path / "before", engine, client_app)  # both workers are up and have the data
    start = time.monotonic()
    events = run(config(timeout=2.0), tmp_path / "run", engine, faulty(fault))
    assert 2 < time.monotonic() - start < 20
    ((phase, (failure,)),) = failures(events).items()
    assert phase == (2, "train")
    # Its unit is lost with it, and one that may have been sent to the same worker already.
    assert failure in {f"{lost} of 8 clients did not reply in time" for lost in (size, 2 * size)}
    assert wait_until(lambda: not Path("/proc", hanging.read_text()).exists())


# ---- memory


def run_out_of_memory(client: int) -> None:
    """As where the memory of a process is limited."""
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (own + (1 << 26), hard))
    try:
        bytearray(1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_client_that_runs_out_of_memory_is_left_out(
    tmp_path: Path, engine: Engine, units: Callable[[int], None]
) -> None:
    units(4)
    events = run(config(), tmp_path / "run", engine, faulty(run_out_of_memory))
    assert failures(events) == {(2, "train"): [f"node {1000 + BAD}: error 2: MemoryError"]}
    run(config(), tmp_path / "raised", "inprocess", faulty(raise_))
    assert model(tmp_path / "run") == model(tmp_path / "raised")


@pytest.mark.parametrize("size", [1, 4])
def test_without_room_for_shared_memory_numbers_go_through_the_socket(
    tmp_path: Path,
    engine: Engine,
    units: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Path,
    size: int,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    units(size)
    monkeypatch.setattr(shared_memory, "_write_whole", full)
    monkeypatch.setattr(lending.Pool, "borrow", lambda self, expected: None)
    events = run(config(), tmp_path, engine, client_app)
    assert model(tmp_path) == model(undisturbed)
    assert events == lines(undisturbed / "fedavg" / "metrics.jsonl")


# ---- an app that cannot be sent


class Trainer:
    """A client as a method; what it holds cannot be sent."""

    def __init__(self, thing: object) -> None:
        self.things = {"first": [thing]}

    def train(self, message: Message, context: Context) -> Message:
        return Message(RecordDict({"config": ConfigRecord({"thing": str(self.things)})}), reply_to=message)


def closing_over(thing: object) -> Callable[..., Message]:
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"config": ConfigRecord({"thing": str(thing)})}), reply_to=message)

    return train


def with_default(thing: object) -> Callable[..., Message]:
    def train(message: Message, context: Context, used: object = thing) -> Message:
        return closing_over(used)(message, context)

    return train


THINGS: dict[str, Callable[[Path], Any]] = {
    "lock": lambda folder: threading.Lock(),
    "TextIOWrapper": lambda folder: (folder / "log").open("w"),
    "BufferedReader": lambda folder: Path(__file__).open("rb"),  # noqa: SIM115
    "generator": lambda folder: (number for number in range(3)),
}
HOLDERS: dict[str, Callable[[Any], Callable[..., Message]]] = {
    "variable 'thing' of closing_over.<locals>.train()": closing_over,
    "variable 'thing' of closing_over.<locals>.train().things['first'][0]": lambda thing: closing_over(Trainer(thing)),
    "Trainer.things['first'][0]": lambda thing: Trainer(thing).train,
    "argument 'used' of with_default.<locals>.train()": with_default,
    "argument 'used' of partial(": lambda thing: functools.partial(closing_over(None), used=thing),
}
CASES = [*(("lock", where) for where in HOLDERS), *((kind, next(iter(HOLDERS))) for kind in list(THINGS)[1:])]


@pytest.mark.parametrize(("kind", "where"), CASES)
def test_an_app_that_cannot_be_sent_is_an_error_that_names_what_is_to_blame(
    tmp_path: Path, engine: Engine, kind: str, where: str
) -> None:
    thing = THINGS[kind](tmp_path)
    client, server = ClientApp(), ServerApp()
    client.train()(HOLDERS[where](thing))
    server.main()(lambda grid, context: pytest.fail("it began"))
    try:
        with pytest.raises(ValueError, match="the client app cannot be sent to the workers: ") as raised:
            simulate(server, client, 2, engine=engine)
    finally:
        if isinstance(thing, io.IOBase):
            thing.close()
    (line,) = str(raised.value).splitlines()
    assert where in line
    assert f", a {kind}: " in line
