"""`fedwsa run --profile`: the table adds up, and the trace is one that a browser takes."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from experiments import profile, run
from fedwsa import tracing
from fedwsa.config import parse

SERVER = [("other", 0.0, 1.0), ("round", 1.0, 1.0), ("train", 1.0, 3.0), ("unheard of", 3.0, 4.0)]
WORKER = [("train", 2.0, 3.0), ("wait", 3.0, 3.5)]


def test_the_table_by_hand():
    wall, server, worker = profile.per_round({"server": SERVER, "one": WORKER, "two": WORKER}, rounds=2)
    assert wall == 2.0
    assert {kind: value for kind, value in server.items() if value} == {"train": 1.0, "other": 1.0}
    # starting from 0 to 2, and waiting from 3 to 4, of which it had told a half
    assert {kind: value for kind, value in worker.items() if value} == {"starting": 1.0, "train": 0.5, "wait": 0.5}


def test_without_workers_there_is_no_worker():
    assert profile.per_round({"server": SERVER}, rounds=1)[2] == {}


def test_slices_out_of_the_time_do_not_count():
    assert profile.totals([("train", -1.0, 0.5), ("train", 0.9, 2.0)], 0.0, 1.0)["train"] == pytest.approx(0.6)


def test_the_trace_has_every_slice_of_every_process():
    events = json.loads(profile.chrome_trace({"server": SERVER, "one": WORKER}))["traceEvents"]
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == ["server", "one"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == len(SERVER) + len(WORKER)
    assert slices[-1] == {"ph": "X", "name": "wait", "pid": 1, "tid": 1, "ts": 3e6, "dur": 0.5e6}


@pytest.mark.parametrize(
    ("engine", "model"),
    [("inprocess", "mlp"), pytest.param("ray", "fedwsa.models.mlp:MLP", marks=pytest.mark.process)],
)
def test_a_run_says_where_its_time_went(tmp_path: Path, engine: str, model: str):
    """A model of somebody's own waits for Ray's workers."""
    rounds, folder = 3, str(tmp_path / "run")
    config = parse({"strategies": "fedavg", "rounds": rounds, "engine": engine, "model": model, "out-dir": folder})
    with Console(record=True, width=100) as console:
        run.start(config, console, profile=True)
    rows = {cells[1]: cells[2:] for line in console.export_text().splitlines() if len(cells := split(line)) > 3}
    wall = float(rows["wall"][0])
    for column in (0, 1) if engine == "ray" else (0,):
        numbers = [float(rows[kind][column]) for kind in profile.KINDS]
        assert sum(numbers) == pytest.approx(wall, rel=0.05)
    events = json.loads((tmp_path / "run" / "trace.json").read_bytes())["traceEvents"]
    assert {"round", "train", "evaluate", "record"} <= {event["name"] for event in events}
    assert sum(event["name"] == "round" for event in events) == rounds
    assert not tracing.is_on()


def split(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("│", "|").split("|")]
