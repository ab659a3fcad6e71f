"""The `fedwsa` command as real processes: killed, interrupted and out of room, it ends in the same bytes."""

import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from clients.client_app import app as client_app
from experiments import run
from fedwsa import config
from fedwsa.run_folder import sha256
from fedwsa.simulation import open_engine, simulate
from strategies.server_app import make_app

pytestmark = pytest.mark.process

FEDWSA = Path(sys.executable).parent / "fedwsa"
STRATEGIES = ("fedavg", "scaffold-wsa", "np-merge")  # one whose clients keep something
VALUES = {
    "strategies": ",".join(STRATEGIES),
    "num-clients": 6,
    "cohort": 3,
    "evaluation-cohort": 3,
    "local-epochs": 1,
    "rounds": 4,
}
SMALL = [f"--set={key}={value}" for key, value in VALUES.items()]

# The command, except that every client runs on Ray's workers: it would begin in its own process until they are up.
ON_RAY = """
import functools
from experiments import cli, run
opened = run.open_engine
run.open_engine = lambda *arguments, start_here, **options: opened(*arguments, **options)
cli.main()
"""


@dataclass
class Command:
    """A `fedwsa` process in a session of its own, whose output goes to files."""

    cwd: Path
    arguments: list[str]
    program: tuple[str, ...] = (str(FEDWSA),)
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.cwd.mkdir(exist_ok=True)
        with (self.cwd / "out").open("w") as out, (self.cwd / "err").open("w") as err:
            self.process = subprocess.Popen(
                [*self.program, *self.arguments], cwd=self.cwd, stdout=out, stderr=err, start_new_session=True
            )

    @property
    def out(self) -> str:
        return (self.cwd / "out").read_text()

    @property
    def err(self) -> str:
        return (self.cwd / "err").read_text()

    def wait(self) -> int:
        return self.process.wait(timeout=90)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert self.process.poll() is None, f"it ended before: {self.err}"
            assert time.monotonic() < deadline, f"it did not come to this point: {self.out}"
            time.sleep(0.001)


def models(folder: Path) -> dict[str, str]:
    return {path.parent.name: sha256(path) for path in folder.glob("*/final.safetensors")}


def events(folder: Path) -> dict[str, list[tuple[int, str, dict[str, float]]]]:
    """What a run logged, less what depends on the clock."""
    logged = {}
    for path in folder.glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        logged[path.parent.name] = [(line["round"], line["phase"], line["metrics"]) for line in lines]
    return logged


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `SMALL` that nothing happened to, in one process."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    command = Command(cwd, ["run", *SMALL, "--engine=inprocess", "--out=run"])
    assert command.wait() == 0, command.err
    assert models(cwd / "run").keys() == set(STRATEGIES)
    return cwd / "run"


def resume(cwd: Path) -> Command:
    command = Command(cwd, ["run", "--resume=run"])
    assert command.wait() == 0, command.err
    return command


def descendants(pid: int) -> dict[int, str]:
    """Process id → its start time, of everything that a process has started; for telling ids that are used again."""
    found = {}
    parents = [pid]
    while parents:
        parent = parents.pop()
        for path in Path("/proc", str(parent), "task").glob("*/children"):
            for child in map(int, path.read_text().split()):
                found[child] = _start(child)
                parents.append(child)
    return found


def _start(pid: int) -> str:
    """When a process started, or "" once it has ended."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def survivors(processes: dict[int, str], driver: int) -> list[str]:
    """Command lines of those that still run, and of any that names the driver's Ray session."""
    alive = {pid for pid, start in processes.items() if start and _start(pid) == start}
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if line and (int(path.parent.name) in alive or re.search(rf"/session_[-\d_]+_{driver}\b", line)):
            lines.append(line[:100])
    return lines


def kill(command: Command) -> None:
    """As `kill -9` does; then everything that it had started must end by itself."""
    started = descendants(command.process.pid)
    command.process.kill()
    assert command.wait() == -signal.SIGKILL
    check_all_gone(started, command.process.pid)


def check_all_gone(processes: dict[int, str], driver: int) -> None:
    """Within about 10 s, twice that where the machine is busy; Ray's agents alone would take 60."""
    deadline = time.monotonic() + 20
    while left := survivors(processes, driver):
        assert time.monotonic() < deadline, f"still there after 20 s: {left}"
        time.sleep(0.05)


def check_resumed(cwd: Path, undisturbed: Path) -> None:
    resume(cwd)
    check_same(cwd, undisturbed)


def check_same(cwd: Path, undisturbed: Path) -> None:
    assert models(cwd / "run") == models(undisturbed)
    assert events(cwd / "run") == events(undisturbed)
    assert (cwd / "run/report.html").is_file()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_bytes(tmp_path: Path, undisturbed: Path, workers: int) -> None:
    settings = config.parse({**VALUES, "workers": workers})
    with open_engine("ray", workers=workers) as engine:
        app = make_app(tmp_path, lambda strategy, event: None)
        simulate(app, client_app, settings.num_clients, engine=engine, run_config=settings.to_run_config())
    assert models(tmp_path) == models(undisturbed)
    assert events(tmp_path) == events(undisturbed)


def resume_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on with a run in this process, whatever engine it began on."""
    with monkeypatch.context() as patch:
        patch.setattr(run, "open_engine", lambda *_, **__: open_engine("inprocess"))
        run.resume(folder, Console(file=StringIO()))


@pytest.mark.parametrize("engine", ["inprocess", "ray"])
@pytest.mark.parametrize("times", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_killed_at_random_moments(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, engine: str, times: int
) -> None:
    """One moment at random in each part of the time that the run takes from the first file in its folder on.

    Every third is gone on with as it began, the others in this process.
    """
    program = (str(FEDWSA),) if engine == "inprocess" else (sys.executable, "-c", ON_RAY)

    def begin(name: str) -> Command:
        command = Command(
            tmp_path / name, ["run", *SMALL, f"--engine={engine}", "--set=workers=2", "--out=run"], program
        )
        command.wait_until((command.cwd / "run/config.toml").exists)
        return command

    whole, start = begin("whole"), time.monotonic()
    assert whole.wait() == 0
    took = time.monotonic() - start
    assert models(whole.cwd / "run") == models(undisturbed)
    rng = random.Random(times)
    started, killed = {}, 0
    for number in range(times):
        status, attempt = 0, 0
        while status == 0 and attempt < 4:  # it came too late: other work on the machine has ended since
            command = begin(f"killed-{number}-{attempt}")
            time.sleep(took * (number + rng.random()) / times / 2**attempt)
            started[command.process.pid] = descendants(command.process.pid)
            command.process.kill()
            status, attempt = command.wait(), attempt + 1
            assert status in (-signal.SIGKILL, 0)
        killed += status != 0
        if number % 3 == 2:
            command = Command(command.cwd, ["run", "--resume=run"], program)
            assert command.wait() == 0, command.err
        else:
            resume_here(command.cwd / "run", monkeypatch)
        check_same(command.cwd, undisturbed)
    assert killed == times
    assert any(len(processes) > 5 for processes in started.values()) == (engine == "ray")  # Ray was there
    for driver, processes in started.items():
        check_all_gone(processes, driver)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path, undisturbed: Path) -> None:
    """Each start gets one round further, then is killed."""
    arguments = ["run", *SMALL, "--engine=inprocess", "--out=run"]
    for name in STRATEGIES:
        for server_round in (1, 3):
            command = Command(tmp_path, arguments)
            command.wait_until((tmp_path / f"run/{name}/checkpoints/round-{server_round:06}.safetensors").exists)
            kill(command)
            arguments = ["run", "--resume=run"]
    check_resumed(tmp_path, undisturbed)


def test_ctrl_c_while_ray_starts(tmp_path: Path) -> None:
    """It reaches all processes of the terminal."""
    command = Command(tmp_path, ["run", *SMALL, "--out=run"])
    command.wait_until((tmp_path / "run/fedavg/checkpoints/round-000001.safetensors").exists)
    started = descendants(command.process.pid)
    os.killpg(command.process.pid, signal.SIGINT)
    assert command.wait() == 130
    assert command.err == "fedwsa: interrupted; go on with: fedwsa run --resume run\n"
    check_all_gone(started, command.process.pid)
    assert "np-merge" not in models(tmp_path / "run")


STUCK = """
import os
import time
from pathlib import Path

from torch import nn


class Stuck(nn.Sequential):
    def __init__(self, input_shape, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))

    def forward(self, images):
        if self.training and Path({first!r}).exists():
            Path({folder!r}, f"training-{{os.getpid()}}").touch()
            time.sleep(600)
        return super().forward(images)
"""


def test_ctrl_c_in_the_middle_of_clients_on_ray(tmp_path: Path) -> None:
    """As it is typed: the terminal sends it to all processes in it, and is as before when they have ended."""
    shared_memory = set(os.listdir("/dev/shm"))
    first = tmp_path / "run/fedavg/checkpoints/round-000001.safetensors"
    (tmp_path / "stuck.py").write_text(STUCK.format(first=str(first), folder=str(tmp_path)))
    arguments = ["run", *SMALL, "--set=model=stuck:Stuck", "--set=workers=2", "--out=run"]
    terminal = Terminal([sys.executable, "-c", ON_RAY, *arguments], tmp_path, columns=100)
    before = termios.tcgetattr(terminal.file)
    terminal.read_until(lambda: len(list(tmp_path.glob("training-*"))) == 2)
    started = descendants(terminal.pid)
    assert {int(path.name.split("-")[1]) for path in tmp_path.glob("training-*")} <= started.keys()
    os.write(terminal.file, b"\x03")
    start = time.monotonic()
    terminal.read_until(lambda: False)
    assert termios.tcgetattr(terminal.file) == before
    assert terminal.wait() == 130
    assert time.monotonic() - start < 15
    assert terminal.written.count("\x1b[?25l") == terminal.written.count("\x1b[?25h") == 1  # the cursor
    assert [line for line in screen(terminal.written) if line][-1] == (
        "fedwsa: interrupted; go on with: fedwsa run --resume run"
    )
    assert not any(word in terminal.written for word in ("Traceback", "raylet", "Killed"))
    check_all_gone(started, terminal.pid)
    assert set(os.listdir("/dev/shm")) <= shared_memory


def test_sigterm(tmp_path: Path, undisturbed: Path) -> None:
    command = Command(tmp_path, ["run", *SMALL, "--engine=inprocess", "--out=run"])
    command.wait_until((tmp_path / "run/fedavg/checkpoints/round-000002.safetensors").exists)
    command.process.terminate()
    assert command.wait() == 128 + signal.SIGTERM
    assert command.err == "fedwsa: interrupted; go on with: fedwsa run --resume run\n"
    check_resumed(tmp_path, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two checkpoints of 220 kB each, and not for the third."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", path], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_full_disk(small_disk: Path, undisturbed: Path) -> None:
    command = Command(small_disk, ["run", *SMALL, "--engine=inprocess", "--out=run"])
    assert command.wait() == 1
    assert command.err == (
        "fedwsa: run/fedavg/checkpoints/round-000003.safetensors: cannot be written: No space left on device; "
        "once this is mended, go on with: fedwsa run --resume run\n"
    )
    checkpoints = small_disk / "run/fedavg/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"round-00000{n}.safetensors" for n in (1, 2)]
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    check_resumed(small_disk, undisturbed)


class Terminal:
    """A command in a terminal of its own, whose output is kept."""

    def __init__(self, arguments: list[str], cwd: Path, columns: int) -> None:
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "24"}
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execve(arguments[0], arguments, environment)
        self._written = b""

    def read_until(self, condition: Callable[[], bool]) -> None:
        """Or until the command has ended."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"it did not come to this point: {self.written}"
            if not select.select([self.file], [], [], 0.05)[0]:
                continue
            try:
                part = os.read(self.file, 65536)
            except OSError:  # the other side has closed
                return
            if not part:
                return
            self._written += part

    @property
    def written(self) -> str:
        return self._written.decode()

    def wait(self) -> int:
        os.close(self.file)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def screen(written: str) -> list[str]:
    """What a terminal shows in the end: it knows new lines, one line up, and erasing a line."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] not in "\x1b\r":
            lines[row] += part  # all here are written from the left, into an erased line
    return [line.rstrip() for line in lines]


def test_terminal(tmp_path: Path) -> None:
    arguments = [str(FEDWSA), "run", *SMALL, "--engine=inprocess", "--seed=0,1", "--out=run"]
    terminal = Terminal(arguments, tmp_path, columns=80)
    terminal.read_until(lambda: False)
    assert terminal.wait() == 0
    written = terminal.written
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1  # the cursor is hidden, and shown again
    assert written.index("\x1b[?25l") < written.index("\x1b[?25h")
    shown = ESCAPES.sub("", written).replace("\r", "\n").splitlines()
    frames = [line for line in shown if "━" in line]
    assert any(re.fullmatch(r"α = 0.1, seed 1: scaffold-wsa +━+ +4/4 +\d+\.\d% *", line) for line in frames)
    assert any(re.fullmatch(r"all rounds +━+ +2\d/24 +ETA \d+ s *", line) for line in frames)
    assert not any("ETA" in line for line in frames if "all rounds" not in line)
    last = ESCAPES.sub("", written[written.rindex("━", 0, written.index("\x1b[?25h")) :])
    assert "seed 0: fedavg" not in last  # no bar of the federation that had ended
    left = [line for line in screen(written) if line]
    assert left[0] == "run folder: run"
    assert left[1].startswith("main: final accuracy (%), mean")  # the bars are gone
    assert left[-1] == "report: run/report.html"
    assert [line.split()[0] for line in left if line.startswith(STRATEGIES)] == list(STRATEGIES)
    assert all(len(line) <= 80 and "…" not in line for line in left)


@pytest.mark.slow
def test_partition_of_a_hundred_clients_takes_less_than_three_seconds(tmp_path: Path) -> None:
    times = []
    for _ in range(3):
        start = time.monotonic()
        command = Command(tmp_path, ["partition", "--num-clients=100", "--data=fashion-mnist", "--alpha=0.1"])
        assert command.wait() == 0, command.err
        times.append(time.monotonic() - start)
    assert min(times) < 3
