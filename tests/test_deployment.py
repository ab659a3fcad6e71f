"""docs/deployment.md, followed to the letter over real processes; only ports and the results' folder are others."""

import os
import signal
import tomllib
from pathlib import Path

import pytest
import torch
from flower_processes import Flower, copy_app, events, fenced, free_ports, last_run, shape, wait_for_superlink
from safetensors.torch import load_file

from clients.client_app import app as client_app
from fedwsa.config import parse
from fedwsa.simulation import simulate
from strategies.server_app import make_app

OUT_DIR = "/tmp/fedwsa-deployed"
PORTS = ("18100", "18110", "18111")


@pytest.mark.process
@pytest.mark.timeout(150)
def test_deployment_as_documented(tmp_path: Path) -> None:
    environment, superlink, node_0, node_1, run, status = fenced("sh")[:6]
    (connection,) = fenced("toml")
    ports = free_ports(len(PORTS))

    def own(text: str) -> str:
        for documented, port in zip(PORTS, ports, strict=True):
            text = text.replace(f":{documented}", f":{port}").replace(f"--port {documented}", f"--port {port}")
        return text.replace(OUT_DIR, str(tmp_path / "results"))

    elsewhere = tmp_path / "elsewhere"  # the results' folder does not depend on where the processes are started
    elsewhere.mkdir()
    flower = Flower(tmp_path / "flwr")
    (flower.home / "config.toml").write_text(own(connection))
    app = copy_app(tmp_path / "app")
    try:
        long_running = [flower.start(environment + own(superlink), elsewhere, tmp_path / "superlink.log")]
        wait_for_superlink(ports[0], timeout=40)
        for number, node in enumerate((node_0, node_1)):
            long_running.append(flower.start(environment + own(node), elsewhere, tmp_path / f"node-{number}.log"))
        exit_status, output = flower.run(environment + own(run), app, timeout=100)
        assert exit_status == 0, output
        answer = flower.run(environment + own(status), app, timeout=30)[1]
        assert last_run(answer)["status"] == "finished:completed", output
        for process in reversed(long_running):
            os.killpg(process.pid, signal.SIGINT)  # Ctrl-C in each terminal
        assert flower.wait_until_none(20) == {}
    finally:
        flower.kill()

    assert f"models and metrics are in {tmp_path / 'results'}" in output
    assert list(elsewhere.iterdir()) == []
    _hold_against_our_engine(tmp_path / "results", tmp_path / "ours")


def _hold_against_our_engine(deployed: Path, folder: Path) -> None:
    """The same config on our own engine gives the same model, up to the order in which two scopes are added."""
    values = tomllib.loads((deployed / "config.toml").read_text())
    assert (values["strategies"], values["rounds"], values["num-clients"]) == (["fedavg-wsa"], 2, 2)
    config = parse(values | {"out-dir": ""})
    simulate(make_app(folder), client_app, 2, engine="inprocess", run_config=config.to_run_config())
    theirs, ours = events(deployed, "fedavg-wsa"), events(folder, "fedavg-wsa")
    assert [shape(event) for event in theirs] == [shape(event) for event in ours]
    models = [load_file(one / "fedavg-wsa" / "final.safetensors") for one in (deployed, folder)]
    assert models[0].keys() == models[1].keys()
    for name, values_there in models[0].items():
        torch.testing.assert_close(values_there, models[1][name], rtol=0, atol=1e-6)
