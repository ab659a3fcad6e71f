"""Simulated federations: any Flower ServerApp and ClientApp, unchanged, on this machine's cores."""

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from weakref import WeakSet

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedwsa.simulation.engine import Engine, InProcessEngine, Population, RunConfig, identify
from fedwsa.simulation.grid import SimulationGrid

__all__ = ["Engine", "open_engine", "simulate"]

ENGINES = ("inprocess", "ray")
RAY_SETTINGS = {  # which Ray reads when it is imported; a user's own stand
    "worker_niceness": "0",  # Ray's default of 15 costs a fifth of the speed
    "USAGE_STATS_ENABLED": "0",
    "gcs_rpc_server_reconnect_timeout_s": "3",  # of 60, which Ray's agents outlive a kill -9 by
    "process_group_cleanup_enabled": "1",  # what a client started ends with its worker
    "DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed while executing",  # the engine copes, and says what it must
    "ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning on machines without a GPU
}
for _key, _value in RAY_SETTINGS.items():
    os.environ.setdefault(f"RAY_{_key}", _value)

_in_use: WeakSet[Engine] = WeakSet()


@contextmanager
def open_engine(
    name: str = "ray",
    *,
    workers: int = 0,
    threads_per_client: int = 1,
    start_here: bool = False,
    cpus_per_client: float = 1.0,
    gpus_per_client: float = 0.0,
    ray_address: str = "",
) -> Iterator[Engine]:
    """An engine for as many simulations as one likes, closed at the end.

    name: `inprocess` (the clients one after another, here) or `ray` (persistent actors side by side).
    workers: clients that compute at the same time (`ray` only); 0: as many as fit.
    threads_per_client: PyTorch threads of each; the results depend on it, not on `workers`.
    start_here: (`ray` only) let this process answer while the workers start; not for a ServerApp that draws from the
        global `random`.
    cpus_per_client, gpus_per_client: (`ray` only) what each of them gets; 0.25 puts four clients on a core or card.
    ray_address: (`ray` only) the cluster to join, "auto" for the one on this machine; empty: Ray is started here.
    Raises ValueError for another name, or a number out of range.
    """
    if name not in ENGINES:
        raise ValueError(f"engine = {name!r}: allowed are {', '.join(ENGINES)}")
    for option, value, needed, met in (
        ("workers", workers, "≥ 0", workers >= 0),
        ("threads_per_client", threads_per_client, "≥ 1", threads_per_client >= 1),
        ("cpus_per_client", cpus_per_client, "finite and > 0", 0 < cpus_per_client < inf),
        ("gpus_per_client", gpus_per_client, "finite and ≥ 0", 0 <= gpus_per_client < inf),
    ):
        if not met:
            raise ValueError(f"{option} must be {needed}, got {value!r}")
    engine: Engine
    if name == "ray":  # Ray is imported only where it is used: it takes 0.3 s
        module = importlib.import_module("fedwsa.simulation.ray_engine")
        resources = module.Resources(cpus_per_client, gpus_per_client, ray_address)
        engine = module.RayEngine(workers, threads_per_client, start_here=start_here, resources=resources)
    else:
        engine = InProcessEngine(threads_per_client)
    try:
        yield engine
    finally:
        engine.close()


def simulate(
    server_app: ServerApp,
    client_app: ClientApp,
    num_clients: int,
    *,
    engine: Engine | str = "ray",
    run_config: RunConfig | None = None,
    client_sizes: Sequence[int] | None = None,
) -> Context:
    """Run a federation: `server_app` against `num_clients` clients that run `client_app`.

    The clients see `partition-id` (0 … num_clients − 1) and `num-partitions` in their node config, and both apps see
    `run_config`. engine: an open one, or the name of one to open for this simulation alone.
    client_sizes: samples of each client, so that the first round can begin with the longest; later ones know.
    Returns the server's context after the run; what the ServerApp raises is raised here. Raises RuntimeError for an
    engine that is running another simulation.
    """
    if not num_clients >= 1:
        raise ValueError(f"num_clients must be ≥ 1, got {num_clients!r}")
    if isinstance(engine, str):
        with open_engine(engine) as opened:
            return simulate(
                server_app, client_app, num_clients, engine=opened, run_config=run_config, client_sizes=client_sizes
            )
    identify()
    config = dict(run_config or {})
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config))
    with _alone(engine):
        engine.begin(Population(client_app, num_clients, config))
        grid = SimulationGrid(engine, num_clients, client_sizes)
        try:
            server_app(grid, context)
            grid.finish()
        finally:
            grid.close()
    return context


@contextmanager
def _alone(engine: Engine) -> Iterator[None]:
    """It would give one simulation's clients and replies to another."""
    if engine in _in_use:
        raise RuntimeError("this engine is running another simulation; open an engine for each")
    _in_use.add(engine)
    try:
        yield
    finally:
        _in_use.discard(engine)
