"""Start Flower's own commands, and find and end every process that came of them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "deployment.md"


def fenced(language: str) -> list[str]:
    """The document's code blocks in this language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listened at a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def copy_app(folder: Path) -> Path:
    """What git tracks, or would: nothing that Flower writes reaches the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@dataclass
class Flower:
    """A Flower home of its own; each process started here, and what it starts, carries its path in the environment.

    The rest of Flower's settings come from the document's first block, which every command is to be preceded by.
    """

    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True)
        self._mark = f"FLWR_HOME={self.home}".encode()
        self._all = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.home),
            "SPT_NOENV": "1",  # processes that rename themselves keep their environment readable
            "PYTHONUNBUFFERED": "1",
            **self.environment,
        }

    def start(self, command: str, folder: Path, log: Path) -> subprocess.Popen[bytes]:
        """A command of the shell that goes on running; its output goes to `log`."""
        with log.open("wb") as output:
            return subprocess.Popen(
                ["bash", "-c", command],
                cwd=folder, env=self._all, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def run(self, command: str, folder: Path, timeout: float) -> tuple[int, str]:
        """Exit status and output of a command that ends; AssertionError with the output if it does not in time."""
        log = self.home / "command.log"
        process = self.start(command, folder, log)
        try:
            return process.wait(timeout), log.read_text(encoding="utf-8", errors="replace")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise AssertionError(f"{command}\ndid not end in {timeout} s:\n{log.read_text(errors='replace')}") from None

    def processes(self) -> dict[int, str]:
        """Command lines of all that live, by process id."""
        alive = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self._mark in (entry / "environ").read_bytes().split(b"\0"):
                    alive[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # ended meanwhile, or somebody else's
                continue
        return alive

    def wait_until_none(self, timeout: float) -> dict[int, str]:
        """Those that still live after all have ended, or `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (alive := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return alive

    def kill(self) -> None:
        """End whatever is left at once."""
        while alive := self.processes():
            for pid in alive:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)


def wait_for_superlink(port: int, timeout: float) -> None:
    """Until the SuperLink at this port answers; AssertionError if it does not in time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"no SuperLink answers at port {port} after {timeout} s")


def last_run(listing: str) -> dict[str, Any]:
    """The newest run in what `flwr list … --format json` prints."""
    run: dict[str, Any] = json.loads(listing[listing.index("{") :])["runs"][0]
    return run


def events(folder: Path, strategy: str) -> list[dict[str, Any]]:
    """Lines of a strategy's metrics.jsonl."""
    return [json.loads(line) for line in (folder / strategy / "metrics.jsonl").read_text().splitlines()]


def shape(event: dict[str, Any]) -> tuple[Any, ...]:
    """Round, phase and every key of an event, without the values."""
    return event["round"], event["phase"], sorted(event), sorted(event["metrics"])
