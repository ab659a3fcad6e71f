"""Our ServerApp's rounds; over a grid that is not our simulation's too, where replies come as they come."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import ask, finals, grid_of, lines, run, tiny
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from clients.client_app import app as client_app
from clients.client_app import evaluate_message, train_message
from clients.federation import federation
from experiments.partition_view import partition_json
from fedwsa import messages
from fedwsa.config import Config
from fedwsa.data import digits
from fedwsa.errors import RunError
from fedwsa.run_folder import StrategyFolder
from fedwsa.simulation.engine import identify
from partitions import stored
from strategies.rounds import CLOCKS
from strategies.sampling import TooFewClientsError
from strategies.server_app import make_app


class Network(Grid):
    """Clients behind something else than our grid; the last reply first. `leaves`: a phase before which one goes."""

    def __init__(self, config: Config, leaves: str = "") -> None:
        self.grid = grid_of(client_app, config.num_clients, config.to_run_config())
        self.leaves, self.sent, self.gone = leaves, [], 0

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        return self.grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return self.grid.get_node_ids()[self.gone :]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = list(messages)
        self.sent += sent
        replies = list(self.grid.send_and_receive(sent))[::-1]
        if self.leaves and sent[0].metadata.message_type.startswith(self.leaves):
            self.gone = 1
        return replies


def serve(grid: Grid, config: Config, folder: Path) -> list[tuple[str, int, str]]:
    """Strategy, round and phase of all events."""
    heard: list[tuple[str, int, str]] = []
    identify()
    app = make_app(folder, lambda strategy, event: heard.append((strategy, event["round"], event["phase"])))
    app(grid, Context(1, 1, {}, RecordDict(), config.to_run_config()))
    return heard


def test_results_do_not_depend_on_the_order_in_which_replies_come(tmp_path):
    """NP-Merge merges one model after the other; means differ in their last bits."""
    config = tiny(strategies=("fedavg", "np-merge", "fedadam"))
    run(config, tmp_path / "simulated")
    serve(Network(config), config, tmp_path / "network")
    assert finals(tmp_path / "network", config) == finals(tmp_path / "simulated", config)


def test_messages_do_not_outlive_their_round_by_much(tmp_path):
    config = tiny(strategies=("fedavg",), timeout=50.0)
    network = Network(config)
    serve(network, config, tmp_path)
    assert {message.metadata.ttl for message in network.sent} == {50.0 + CLOCKS}


def test_a_run_that_was_cut_off_goes_on_and_says_what_is_lost(tmp_path, caplog):
    config = tiny(strategies=("scaffold",), rounds=4)
    half = config.model_copy(update={"rounds": 2})
    serve(Network(half), half, tmp_path)
    (tmp_path / "scaffold" / "final.safetensors").unlink()
    with caplog.at_level(logging.WARNING, "fedwsa"):
        heard = serve(Network(config), config, tmp_path)
    assert "scaffold goes on after round 2, and its clients without what they kept" in caplog.text
    assert {server_round for _, server_round, _ in heard} == {3, 4}
    events = lines(tmp_path / "scaffold" / "metrics.jsonl")
    assert [event["round"] for event in events if event["phase"] == "train"] == [1, 2, 3, 4]


EVERYBODY: dict[str, Any] = {"num_clients": 4, "cohort": 3, "evaluation_cohort": 4, "rounds": 1, "timeout": 0.01}


def test_what_was_trained_is_kept_where_too_few_are_left_to_evaluate_it(tmp_path, caplog):
    config = tiny(strategies=("fedavg",), **EVERYBODY)
    with caplog.at_level(logging.WARNING, "fedwsa"):
        heard = serve(Network(config, leaves="train"), config, tmp_path)
    assert "fedavg round 1 is not evaluated by clients: 3 clients connected" in caplog.text
    assert [phase for *_, phase in heard] == ["evaluate-server", "train", "evaluate-server"]
    assert StrategyFolder(tmp_path / "fedavg").final.exists()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"on_client_failure": "fail"}, TooFewClientsError, "^3 clients connected"),
        ({"strategies": ("local-only",)}, RunError, "round 1: 3 clients connected .*; local-only has no other eval"),
    ],
)
def test_it_ends_a_run_that_must_not_go_on_without(changes, error, said, tmp_path):
    config = tiny(**{"strategies": ("fedavg",), **EVERYBODY, **changes})
    with pytest.raises(error, match=said):
        serve(Network(config, leaves="train"), config, tmp_path)


def test_central_is_refused_before_any_strategy_begins(tmp_path):
    config = tiny(strategies=("fedavg", "central"))
    with pytest.raises(RunError, match="central: no real client has all samples; allowed in a simulation"):
        serve(Network(config), config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_strategy_that_cannot_be_built_ends_a_run_before_any_begins(tmp_path):
    config = tiny(strategies=("fedavg", "np-merge"), model="resnet8")
    with pytest.raises(ValueError, match=r"np-merge\.align = true: .*; allowed with this model is false"):
        serve(Network(config), config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_client_whose_partition_file_is_not_the_servers_says_so(tmp_path):
    labels, server = digits.load().train_labels, np.arange(30)
    digests = []
    for name, first in (("there", 100), ("here", 200)):
        clients = [np.arange(start, start + 50) for start in (first, first + 50)]
        content = stored.to_json("digits", labels, clients, server, {})
        (tmp_path / name).write_text(json.dumps(content))
        digests.append(stored.sha256(tmp_path / name))
    config = tiny(num_clients=2, cohort=2, partition_file=str(tmp_path / "here"))
    ask(config, settings={messages.PARTITION: digests[1]})
    with pytest.raises(RuntimeError, match="here: not the partition that the config means, by its partition-sha256"):
        ask(config, settings={messages.PARTITION: digests[0]})


def test_the_server_says_which_partition_it_means(tmp_path):
    made = tiny(strategies=("fedavg",), rounds=1)
    file = tmp_path / "mine.json"
    file.write_bytes(partition_json(federation(made)))
    digest = stored.sha256(file)
    config = made.model_copy(update={"partition_file": str(file), "partition_sha256": digest})
    network = Network(config)
    serve(network, config, tmp_path / "run")
    assert {message.content["config"][messages.PARTITION] for message in network.sent} == {digest}


# ---- in any grid


class Boasting(ClientApp):
    """Ours, whose evaluation claims more than it was asked for."""

    def __init__(self, claims: dict[str, float]) -> None:
        super().__init__()

        @self.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            reply = evaluate_message(message, context)
            reply.content["metrics"].update(claims)
            return reply

        self.train()(train_message)


@pytest.mark.parametrize("keys", [("test-accuracy",), ("test-accuracy", "test-loss", "test-examples")])
def test_what_a_client_calls_its_test_accuracy_is_not_the_servers(keys, tmp_path):
    config = tiny(strategies=("fedavg",), rounds=1)
    run(config, tmp_path / "honest")
    run(config, tmp_path / "boasting", Boasting(dict.fromkeys(keys, 0.99)))
    honest, boasting = (lines(tmp_path / name / "fedavg" / "metrics.jsonl") for name in ("honest", "boasting"))
    assert [event for event in boasting if event["phase"] == "evaluate-server"] == [
        event for event in honest if event["phase"] == "evaluate-server"
    ]
    (claimed,) = (event["metrics"] for event in boasting if event["phase"] == "evaluate-clients")
    assert {key: claimed[key] for key in keys} == {key: pytest.approx(0.99) for key in keys}


def test_evaluations_and_checkpoints_by_their_own_rhythm(tmp_path, monkeypatch):
    """Of five rounds the second, the fourth and the last are evaluated; the run is cut off after the third."""
    config = tiny(strategies=("scaffold",), rounds=5, evaluate_every=2, checkpoint_every=2)
    run(config, tmp_path / "whole")
    events = [(event["round"], event["phase"]) for event in lines(tmp_path / "whole" / "scaffold" / "metrics.jsonl")]
    assert events == [
        (0, "evaluate-server"),
        (1, "train"),
        *((2, phase) for phase in ("train", "evaluate-clients", "evaluate-server")),
        (3, "train"),
        *((4, phase) for phase in ("train", "evaluate-clients", "evaluate-server")),
        *((5, phase) for phase in ("train", "evaluate-clients", "evaluate-server")),
    ]
    names = sorted(path.name for path in (tmp_path / "whole" / "scaffold" / "checkpoints").iterdir())
    assert names == ["clients", "round-000002.safetensors", "round-000004.safetensors"]

    record = StrategyFolder.record

    def cut_off(folder: StrategyFolder, event: dict[str, Any]) -> None:
        record(folder, event)
        if event["round"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StrategyFolder, "record", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "cut")
    run(config, tmp_path / "cut")
    assert finals(tmp_path / "cut", config) == finals(tmp_path / "whole", config)
    of_both = [lines(tmp_path / name / "scaffold" / "metrics.jsonl") for name in ("whole", "cut")]
    assert of_both[0] == of_both[1]
