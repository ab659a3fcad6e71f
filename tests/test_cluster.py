"""Ray where several machines share it: joined by its address, cards and cores in parts, and nodes that die."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import apps
import numpy as np
import pytest
import ray
import torch
from federations import client_app, tiny
from flower_processes import Flower, free_ports
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from test_ray_engine import descendants, federate, is_running, messages, reply, values, wait_until, write
from torch import nn

from clients.client_app import evaluate_message, train_message
from fedwsa.errors import RunError
from fedwsa.run_folder import FINAL
from fedwsa.simulation import open_engine, simulate
from fedwsa.simulation.links import ObjectStoreLink, SharedMemoryLink
from strategies.server_app import make_app

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

RAY = Path(sys.executable).parent / "ray"
SOON = {"RAY_health_check_initial_delay_ms": "500", "RAY_health_check_period_ms": "300"}  # of 5 s and 3 s
SOON |= {"RAY_health_check_failure_threshold": "2"}  # so that a node that is gone is missed after a second, not 15
SOON |= {"RAY_worker_register_timeout_seconds": "20"}  # of 60, which Ray waits for a process that died as it started
# kills the node, a process group of its own, when this process dies without having done so
WATCH = f"(while kill -0 {os.getpid()}; do sleep 1; done; kill -9 0) 2>/dev/null &"
LARGE = 300_000  # float64s; Ray carries replies below 100 kB without its object store


@dataclass
class Node:
    """One of Ray's nodes; the Flower home in its environment tells its processes from the other's."""

    flower: Flower
    process: subprocess.Popen[bytes]
    raylet: int = 0

    def kill(self) -> None:
        """As if the machine lost its power."""
        self.flower.kill()
        self.process.wait()


@dataclass
class Cluster:
    """A head and a second node with a core each; `folder` is short, for the sake of Ray's sockets."""

    folder: Path
    ports: list[int] = field(default_factory=lambda: free_ports(2))
    nodes: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports[0]}"

    def start_head(self) -> Node:
        port, client_port = self.ports
        ports = f"--port={port} --ray-client-server-port={client_port}"
        return self._start(f"--head {ports} --temp-dir={self.folder}/ray --include-dashboard=false", {})

    def start_other(self, **settings: str) -> Node:
        return self._start(f"--address={self.address}", settings)

    def _start(self, options: str, settings: Mapping[str, str]) -> Node:
        flower = Flower(self.folder / str(len(self.nodes)), {**SOON, **settings})
        common = "--node-ip-address=127.0.0.1 --num-cpus=1 --num-gpus=0 --object-store-memory=100000000"
        log = self.folder / f"{len(self.nodes)}.log"
        start = f"{RAY} start {options} {common} --include-log-monitor=false --disable-usage-stats --block"
        command = f"{WATCH} exec {start}"
        node = Node(flower, flower.start(command, self.folder, log))
        self.nodes.append(node)
        wait_until(lambda: "Ray runtime started" in log.read_text() or node.process.poll() is not None, seconds=40)
        assert node.process.poll() is None, log.read_text()
        (node.raylet,) = (pid for pid, line in flower.processes().items() if "/raylet/raylet " in line)
        return node

    @property
    def head(self) -> Node:
        return self.nodes[0]

    def kill_other(self) -> None:
        for node in self.nodes[1:]:
            node.kill()

    def other(self) -> Node:
        """The second node; started if there is none or the last one was killed."""
        return self.nodes[-1] if is_running(self.nodes[-1].raylet) and len(self.nodes) > 1 else self.start_other()


@pytest.fixture(scope="module")
def cluster():
    earlier = descendants(os.getpid())
    with tempfile.TemporaryDirectory(prefix="fw-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        started = Cluster(Path(folder))
        try:
            started.start_head()
            yield started
        finally:
            processes = descendants(os.getpid()) - earlier
            for node in reversed(started.nodes):
                node.kill()
            wait_until(lambda: not any(map(is_running, processes)), seconds=10)


@pytest.fixture
def other(cluster):
    return cluster.other()


@pytest.fixture(scope="module")
def engine(cluster):
    """From its first use to the end of this file: tests that start or join Ray by themselves stand before that."""
    cluster.other()
    with open_engine("ray", ray_address=cluster.address) as opened:
        yield opened


def whereabouts():
    """This process and the Ray node that it is on."""
    return os.getpid(), ray.get_runtime_context().get_node_id()


def where(message, context):
    """A client that says where it is."""
    pid, node = whereabouts()
    return reply(message, value=context.node_config["partition-id"], pid=pid, node=node)


def here():
    """The node that counts as this process's own."""
    return ray.get_runtime_context().get_node_id()


def seen(grid):
    """Process and node of every worker that answers a round."""
    replies = list(grid.send_and_receive(messages(grid)))
    return set(zip(values(replies, "pid"), values(replies, "node"), strict=True))


def look_at_the_end(monkeypatch, engine):
    """Who asks Ray for something when it is shut down, a reply or whether a worker is there: that ends this process."""
    asking, shut_down = [], ray.shutdown

    def look_and_shut_down():
        asking.extend(thread for thread in threading.enumerate() if "_connect" in thread.name)
        asking.extend(engine._coming)
        shut_down()

    monkeypatch.setattr(ray, "shutdown", look_and_shut_down)
    return asking


def links(engine):
    return Counter(type(actor.link) for actor in engine._actors)


def alone(function, *arguments, **environment):
    """What a function of this file prints, in a process where Ray was never started."""
    code = f"import test_cluster; test_cluster.{function}(*{arguments!r})"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def print_errors(*addresses):
    errors = []
    for address in addresses:
        try:
            with open_engine("ray", ray_address=address):
                errors.append("none")
        except RunError as error:
            errors.append(str(error))
    print(json.dumps(errors))


def reporting(folder, before=lambda message: None):
    """Our client; each worker that does anything leaves a file named like its node."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        pid, node = whereabouts()
        write(folder / node, str(pid))
        before(message)
        return train_message(message, context)

    app.evaluate()(evaluate_message)
    return app


def final_model(engine, folder, app=client_app, **changes):
    """The bytes that our ServerApp's fedavg ends with, and how many replies each phase lacked."""
    config = tiny(strategies="fedavg", **{"num_clients": 8, "cohort": 8, **changes})
    events = []
    server = make_app(folder, lambda strategy, event: events.append(event))
    simulate(server, app, config.num_clients, engine=engine, run_config=config.to_run_config())
    return (folder / "fedavg" / FINAL).read_bytes(), sum(event.get("num_failed", 0) for event in events)


# ---- joining and starting


def test_auto_joins_the_cluster_that_the_environment_names_and_leaves_it_running(cluster, other, monkeypatch):
    """Also where it is left while clients compute."""

    def leave(grid):
        grid.push_messages(messages(grid))

    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    with open_engine("ray", ray_address="auto") as engine:
        assert engine.workers == 2
        workers = federate(seen, where, 4, engine)
        assert {node for _, node in workers} == {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        federate(leave, lambda message, context: signal.pause(), 2, engine)
        asking = look_at_the_end(monkeypatch, engine)
    assert asking == []
    wait_until(lambda: not any(is_running(pid) for pid, _ in workers), seconds=10)
    assert is_running(cluster.head.raylet)
    assert is_running(other.raylet)


def test_without_an_address_ray_is_started_here_whatever_runs_beside_it(cluster, other, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    with open_engine("ray", workers=1) as engine:
        ((pid, _),) = federate(seen, where, 2, engine)
        assert pid not in cluster.head.flower.processes() | other.flower.processes()
        assert len(ray.nodes()) == 1


def test_an_address_where_there_is_no_ray_is_an_error_that_says_so():
    """Ray itself would end the process, hence another one here."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    for given, error in zip(
        (address, "auto"), alone("print_errors", address, "auto", RAY_ADDRESS=address), strict=True
    ):
        assert error.startswith(f"ray-address = {given}: there is no Ray at {address} (")


# ---- cores and cards in parts


def side_by_side(engine):
    """What cards each worker was given and sees, and its node; every one has to answer before any is done."""
    workers = engine.workers
    with tempfile.TemporaryDirectory() as folder:

        def client(message, context):
            pid, node = whereabouts()
            (Path(folder) / str(pid)).touch()
            wait_until(lambda: len(os.listdir(folder)) == workers)
            given = [str(card) for card in ray.get_gpu_ids()]
            return reply(message, value=given, sees=os.environ.get("CUDA_VISIBLE_DEVICES", "nothing"), node=node)

        def main(grid):
            replies = list(grid.send_and_receive(messages(grid)))
            return [*zip(values(replies), values(replies, "sees"), values(replies, "node"), strict=True)]

        return federate(main, client, workers, engine)


def test_two_workers_share_each_core(cluster, other):
    with open_engine("ray", ray_address=cluster.address, cpus_per_client=0.5) as engine:
        assert engine.workers == 4
        assert sorted(Counter(node for _, _, node in side_by_side(engine)).values()) == [2, 2]


def print_shares_of_a_card():
    ray.init(num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
    told = []
    for gpus, workers in ((0.25, 0), (0.5, 8)):
        with open_engine("ray", workers=workers, gpus_per_client=gpus, cpus_per_client=0.5) as engine:
            told.append([[given, sees] for given, sees, _ in side_by_side(engine)])
    print(json.dumps(told))


def test_workers_share_a_card_and_see_no_other():
    """A card that Ray is told of. The second time 8 workers are asked for where 2 fit."""
    assert alone("print_shares_of_a_card") == [[[["0"], "0"]] * 4, [[["0"], "0"]] * 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_card_that_ray_does_not_have_is_an_error_that_says_what_there_is(cluster, other, workers):
    start = time.monotonic()
    with (
        pytest.raises(RunError) as raised,
        open_engine("ray", ray_address=cluster.address, workers=workers, gpus_per_client=1.0),
    ):
        pass
    needed, there_is = "1 CPU and 1 GPU", "1 CPU and 0 GPU, 1 CPU and 0 GPU"
    assert f"it needs {needed}, Ray has {there_is};" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - start < 10


def test_more_cores_than_there_are_is_an_error_where_clients_begin_here_too(cluster, other):
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        with (
            pytest.raises(RunError, match=r"it needs 1e\+06 CPU and 0 GPU, Ray has 1 CPU"),
            open_engine("ray", start_here=True, cpus_per_client=1e6),
        ):
            pass
    finally:
        ray.shutdown()


class OnCard(nn.Linear):
    """Refuses to be trained anywhere else."""

    def __init__(self, input_shape, num_classes):
        super().__init__(64, num_classes)

    def forward(self, images):
        devices = {self.weight.device.type, images.device.type}
        assert not self.training or devices == {"cuda"}, f"trained on {devices}"
        return super().forward(images.flatten(1))


class Dropping(nn.Sequential):
    """Draws by itself at each step, on the card from the card's generator."""

    def __init__(self, input_shape, num_classes):
        super().__init__(nn.Flatten(), nn.Dropout(), nn.Linear(64, num_classes))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("model", ["test_cluster:OnCard", "test_cluster:Dropping", "mlp", "cnn"])
def test_clients_train_on_the_card_to_the_same_bits_for_any_number_of_workers(tmp_path, model):
    models = []
    for workers in (1, 4):
        with open_engine("ray", workers=workers, gpus_per_client=0.25, cpus_per_client=0.25) as engine:
            assert engine.workers == workers
            config = {"gpus_per_client": 0.25, "model": model, "on_client_failure": "fail"}
            models.append(final_model(engine, tmp_path / str(workers), **config))
    assert models[0] == models[1]


# ---- a cluster that is joined, and its nodes that die


def test_replies_that_lie_on_a_node_that_dies_are_computed_again(cluster, tmp_path, monkeypatch):
    """The node keeps what lies in its object store, a large reply; a small one overtakes it, and a third hangs."""
    cluster.kill_other()
    other = cluster.start_other(RAY_testing_asio_delay_us="ObjectManagerService.grpc_server.Pull=60000000:60000000")
    killed, third = tmp_path / "killed", tmp_path / "2"

    def client(message, context):
        size = LARGE
        if message.content["config"]["quick"]:  # a worker gets its next task early where tasks are known to be short
            size = 1
        elif whereabouts()[1] == home:
            wait_until(killed.exists)
        else:
            number = len(list(tmp_path.glob("[012]")))
            (tmp_path / str(number)).touch()
            if third.exists():
                signal.pause()
            size = [LARGE, 1][number]
        numbers = np.full(size, float(context.node_config["partition-id"]))
        return Message(RecordDict({"arrays": ArrayRecord([numbers])}), reply_to=message)

    def main(grid):
        len(grid.send_and_receive(messages(grid, quick=True)))
        ids, replies = grid.push_messages(messages(grid, quick=False)), []

        def all_there():  # what was pulled before is an error the next time
            replies.extend(answer for answer in grid.pull_messages(ids) if answer.has_content())
            return len(replies) == len(ids)

        wait_until(all_there, seconds=30)
        return sorted(each.content["arrays"]["0"].numpy()[0] for each in replies)

    def kill():
        wait_until(third.exists)
        other.kill()
        killed.touch()

    with open_engine("ray", ray_address=cluster.address) as engine:
        home = here()
        federate(seen, where, 4, engine)  # loads what the workers need
        killer = threading.Thread(target=kill)
        killer.start()
        assert federate(main, client, 6, engine) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        killer.join()
        wait_until(lambda: not engine._coming)
        asking = look_at_the_end(monkeypatch, engine)
    assert asking == []  # though the worker in place of the lost one found none


def test_clients_run_on_both_nodes_of_a_cluster(cluster, other, engine):
    assert engine.workers == 2
    workers = federate(seen, where, 12, engine)
    assert len({node for _, node in workers}) == len(workers) == 2
    assert here() in {node for _, node in workers}
    for pid, node in workers:
        assert pid in (cluster.head if node == here() else other).flower.processes()
    assert links(engine) == {SharedMemoryLink: 1, ObjectStoreLink: 1}


def test_a_cluster_gives_the_bits_of_this_process(engine, tmp_path):
    run = {"num-rounds": 3, "local-epochs": 2}
    contexts = [
        simulate(apps.server, apps.stateful_client, 7, engine=each, run_config=run) for each in (engine, "inprocess")
    ]
    assert contexts[0].state.object_id == contexts[1].state.object_id


def test_our_server_app_folds_on_both_nodes_to_the_bits_of_this_process(engine, tmp_path, monkeypatch):
    nodes, folds = tmp_path / "nodes", Counter()
    nodes.mkdir()
    for link in (SharedMemoryLink, ObjectStoreLink):

        def receive_and_look(self, link=link, receive=link.receive):
            outcomes = receive(self)
            folds[link] += sum(outcome.fold is not None for outcome in outcomes)
            return outcomes

        monkeypatch.setattr(link, "receive", receive_and_look)
    expected = final_model("inprocess", tmp_path / "here")
    assert final_model(engine, tmp_path / "cluster", reporting(nodes)) == expected
    assert len(list(nodes.iterdir())) == 2
    assert folds[SharedMemoryLink] > 0
    assert folds[ObjectStoreLink] > 0


def test_a_client_that_hangs_on_the_other_node_is_given_up(engine, tmp_path):
    hanging, home = tmp_path / "hanging", here()

    def client(message, context):
        if whereabouts()[1] != home and not hanging.exists():
            write(hanging, str(os.getpid()))
            signal.pause()
        return where(message, context)

    def main(grid):
        return values(grid.send_and_receive(messages(grid), timeout=2))

    assert len(federate(seen, where, 8, engine)) == 2  # and both have loaded what they need
    some = federate(main, client, 8, engine)
    assert 6 <= len(some) < 8  # one more may have waited behind the one that hangs
    wait_until(lambda: not is_running(int(hanging.read_text())))
    wait_until(lambda: len(federate(seen, where, 8, engine)) == 2, pause=0.2)


def test_a_node_killed_while_its_client_computes_costs_nothing(cluster, other, engine, tmp_path):
    """The engine goes on with the node that is left, and takes the next one that comes."""
    nodes, running, home = tmp_path / "nodes", tmp_path / "running", here()
    nodes.mkdir()

    def get_stuck(message):
        if message.content["config"]["server-round"] == 2 and whereabouts()[1] != home and not running.exists():
            write(running, str(os.getpid()))
            signal.pause()

    def kill():
        wait_until(running.exists)
        other.kill()

    expected = final_model("inprocess", tmp_path / "here", rounds=3)
    killer = threading.Thread(target=kill)
    killer.start()
    assert final_model(engine, tmp_path / "cluster", reporting(nodes, get_stuck), rounds=3, timeout=60.0) == expected
    killer.join()
    assert not is_running(int(running.read_text()))
    assert len(list(nodes.iterdir())) == 2
    assert {node for _, node in federate(seen, where, 4, engine)} == {home}
    cluster.start_other()
    wait_until(lambda: len(federate(seen, where, 4, engine)) == 2, pause=0.2)
