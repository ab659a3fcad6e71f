"""Ray itself: started on this machine, or joined where it runs; and how many clients fit on it side by side."""

import logging
import os
import random
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray

from fedwsa.errors import RunError

CONNECT_TIMEOUT = 10.0  # seconds
END_TIMEOUT = 10.0  # seconds for a process that was killed


@dataclass(frozen=True, slots=True)
class Resources:
    """What a client gets, and where.

    cpus_per_client > 0, gpus_per_client >= 0: fractions share a core or a card (0.25: four clients on one).
    address: of a Ray cluster to join ("auto": the one on this machine); empty: Ray is started here, and ended.
    """

    cpus_per_client: float = 1.0
    gpus_per_client: float = 0.0
    address: str = ""

    def slots(self, cpus: float, gpus: float) -> int:
        """Clients that fit on a machine side by side."""
        by_cpu = int(cpus / self.cpus_per_client + 1e-6)
        return min(by_cpu, int(gpus / self.gpus_per_client + 1e-6)) if self.gpus_per_client else by_cpu


def bring_up(resources: Resources, workers: int) -> None:
    """Start or join Ray unless this process has done so.

    workers: that will be wanted here, where Ray is started; 0: as many as there are cores for.
    """
    if ray.is_initialized():
        return
    if resources.address:
        _check_that_somebody_listens(resources.address)
        ray.init(address=resources.address, log_to_driver=False, logging_level=logging.ERROR)
        return
    cpus = workers * resources.cpus_per_client if workers else float(len(os.sched_getaffinity(0)))
    ray.init(
        address="local",  # else Ray joins what RAY_ADDRESS names, or what was started here by `ray start`
        num_cpus=max(1, round(cpus + 0.499)),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def shut_down() -> None:
    """End the Ray that `bring_up` started, with all its processes: those that Ray has to kill it leaves as zombies."""
    node = ray._private.worker._global_node
    started: list[list[Any]] = list(node.all_processes.values()) if node else []
    processes: list[subprocess.Popen[bytes]] = [info.process for infos in started for info in infos]
    with random_kept():
        ray.shutdown()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_TIMEOUT)


def _check_that_somebody_listens(address: str) -> None:
    """Raises RunError, where Ray would end this process."""
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = named.rpartition(":")
    if not port.isdigit():  # for Ray to find, or to refuse
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise RunError(f"ray-address = {address}: there is no Ray at {named} ({error})") from error


def count_workers(resources: Resources) -> int:
    """Clients that fit on all of Ray's machines side by side. Raises RunError if none does."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    number = sum(resources.slots(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes)
    if number:
        return number
    best = ", ".join(f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in nodes)
    raise RunError(
        f"no client fits on a machine: it needs {resources.cpus_per_client:g} CPU and {resources.gpus_per_client:g} "
        f"GPU, Ray has {best}; allowed is less, by cpus-per-client and gpus-per-client"
    )


@contextmanager
def random_kept() -> Iterator[None]:
    """Ray draws from the global `random`, from which a ServerApp's strategy may draw its cohorts."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
