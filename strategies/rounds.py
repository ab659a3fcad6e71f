"""The round loop: one strategy from its start, or its last checkpoint, to its final model."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedwsa import messages, tracing
from fedwsa.arrays import pack, unpack
from fedwsa.config import Config
from fedwsa.errors import RunError
from fedwsa.run_folder import RunFolderError, StrategyFolder
from fedwsa.simulation.grid import SimulationGrid
from fedwsa.simulation.states import ClientStates
from fedwsa.tracing import span
from strategies.gate import Gate
from strategies.sampling import TooFewClientsError

_LOG = logging.getLogger("fedwsa")

Event = dict[str, Any]
Notify = Callable[[str, Event], None]
Evaluate = Callable[[ArrayRecord], Event]

SHOWN_FAILURES = 20  # of a phase, in metrics.jsonl
CLOCKS = 600.0  # seconds that real clients' clocks may differ from the server's


@dataclass(slots=True)
class Rounds:
    """Runs one strategy; every event goes to the folder's metrics.jsonl and to `notify`."""

    name: str
    strategy: Gate
    grid: Grid
    config: Config
    folder: StrategyFolder
    evaluate: Evaluate
    notify: Notify

    def run(self, initial: Mapping[str, Tensor]) -> None:
        """From round 1, or from after the last checkpoint; at the end `final.safetensors` stands."""
        self._check_state()
        checkpoint = self.folder.resume()
        if isinstance(self.grid, SimulationGrid):
            self.grid.keep_states(ClientStates(self.folder.clients, checkpoint.client_states if checkpoint else None))
        if checkpoint is None:
            last_round, arrays = 0, pack(initial)
            self._record({"round": 0, **self.evaluate(arrays)})
        else:
            there, here = ({(n, tensor.shape) for n, tensor in each.items()} for each in (checkpoint.model, initial))
            if unlike := {name for name, _ in there ^ here}:
                raise RunFolderError(
                    f"{self.folder.checkpoints}: of another model than {self.config.model}, {sorted(unlike)} differ; "
                    "allowed is the config with which the run began"
                )
            last_round = checkpoint.server_round
            arrays = pack({name: checkpoint.model[name] for name in initial})  # in the model's own order
            self.strategy.load_state(checkpoint.strategy_state)
        if checkpoint and not isinstance(self.grid, SimulationGrid):
            _LOG.warning(
                "%s goes on after round %d, and its clients without what they kept: Flower gives them an empty "
                "Context.state in each run",
                self.name,
                last_round,
            )
        for server_round in range(last_round + 1, self.config.rounds + 1):
            tracing.mark("round")
            arrays = self._train(server_round, arrays)
            if server_round % self.config.evaluate_every == 0 or server_round == self.config.rounds:
                result = self.strategy.result(arrays)
                by_clients = self._evaluate_clients(server_round, result)
                self._record({"round": server_round, **(by_clients or self.evaluate(result))})
            if isinstance(self.grid, SimulationGrid):
                self.grid.finish()  # a client that has not answered yet may need a file that goes now
            if server_round % self.config.checkpoint_every == 0:
                with span("record"):
                    files = self._client_files()
                    self.folder.save_checkpoint(server_round, unpack(arrays), self.strategy.state(), files)
        self.folder.save_final(unpack(self.strategy.result(arrays)))

    def _client_files(self) -> dict[str, int]:
        """Of what clients keep; real ones keep it themselves."""
        return self.grid.states.synced() if isinstance(self.grid, SimulationGrid) else {}

    def _check_state(self) -> None:
        """Before the first round, not at the first checkpoint."""
        try:
            self.strategy.state()
        except AttributeError as error:
            raise RunError(f"strategy {self.name}: checkpoints need its state() and load_state() ({error})") from error

    def _train(self, server_round: int, arrays: ArrayRecord) -> ArrayRecord:
        start = time.perf_counter()
        outgoing = self.strategy.configure_train(server_round, arrays, self._settings(), self.grid)
        make = self.strategy.folding(server_round)
        if make and isinstance(self.grid, SimulationGrid):
            folded = self.grid.fold(outgoing, make, timeout=self.config.timeout)
            with span("aggregate"):
                updated, metrics = self.strategy.conclude_train(server_round, folded)
        else:
            with span("aggregate"):
                updated, metrics = self.strategy.aggregate_train(server_round, self._replies(outgoing))
        self._record_phase("train", server_round, metrics, start, messages.layer_names(arrays))
        return arrays if updated is None else updated

    def _evaluate_clients(self, server_round: int, arrays: ArrayRecord) -> Event | None:
        """Gives the server's evaluation too where the clients have made it, of models that the server does not have."""
        start, test = time.perf_counter(), None
        try:
            outgoing = list(self.strategy.configure_evaluate(server_round, arrays, self._settings(), self.grid))
        except TooFewClientsError as error:  # what was trained is worth keeping all the same
            if self.strategy.fail:
                raise
            _LOG.warning("%s round %d is not evaluated by clients: %s", self.name, server_round, error)
            return None
        if outgoing:
            metrics = self.strategy.aggregate_evaluate(server_round, self._replies(outgoing))
            if metrics and _asks_for_test_split(outgoing[0]):
                test = _of_test_split(metrics)
            self._record_phase("evaluate-clients", server_round, metrics, start)
        return test

    def _settings(self) -> ConfigRecord:
        """What every message says besides, and real clients cannot know: the strategy, and what the partition must be.

        They keep what they keep by strategy.
        """
        settings = ConfigRecord({messages.STRATEGY: self.name})
        if self.config.partition_sha256:
            settings[messages.PARTITION] = self.config.partition_sha256
        return settings

    def _replies(self, outgoing: Iterable[Message]) -> Iterable[Message]:
        """In the order of the cohort; Flower's own grids give them as they come.

        A real client that was away does not work through the messages of rounds that are long over.
        """
        if isinstance(self.grid, SimulationGrid):
            return self.grid.send_and_receive(outgoing, timeout=self.config.timeout)
        outgoing = list(outgoing)
        for message in outgoing:
            message.metadata.ttl = self.config.timeout + CLOCKS
        replies = self.grid.send_and_receive(outgoing, timeout=self.config.timeout)
        place = {message.metadata.message_id: index for index, message in enumerate(outgoing)}
        return sorted(replies, key=lambda reply: place.get(reply.metadata.reply_to_message_id, len(place)))

    def _record_phase(
        self, phase: str, server_round: int, metrics: MetricRecord | None, start: float, layers: tuple[str, ...] = ()
    ) -> None:
        values: dict[str, Any] = dict(metrics or {})
        event: Event = {
            "round": server_round,
            "phase": phase,
            "num_clients": len(self.strategy.sent),
            "num_failed": len(self.strategy.sent) - self.strategy.usable,
            "metrics": {key: value for key, value in values.items() if not isinstance(value, list)},
            "bytes_down": self.strategy.bytes_down,
            "bytes_up": self.strategy.passage.bytes_up,
            "seconds": time.perf_counter() - start,
        }
        if by_layer := {key: value for key, value in values.items() if isinstance(value, list)}:
            event["layers"] = list(layers)
            event |= {key.replace("-", "_"): [_known(each) for each in value] for key, value in by_layer.items()}
        if self.strategy.failures:
            event["failures"] = self.strategy.failures[:SHOWN_FAILURES]
        self._record(event)

    def _record(self, event: Event) -> None:
        event = {**event, "metrics": {key: _known(value) for key, value in event["metrics"].items()}}
        with span("record"):
            self.folder.record(event)
            self.notify(self.name, event)


def _asks_for_test_split(message: Message) -> bool:
    """Else what a client calls so is a metric of its own."""
    settings = message.content.get(messages.CONFIG)
    return isinstance(settings, ConfigRecord) and bool(settings.get(messages.TEST_TOO))


def _of_test_split(metrics: MetricRecord) -> Event | None:
    """Taken out of the clients' metrics; its time counts there."""
    start = time.perf_counter()
    keys = (messages.TEST_EXAMPLES, messages.TEST_LOSS, messages.TEST_ACCURACY)
    if not metrics.keys() >= set(keys):
        return None
    found: dict[str, Any] = {key: metrics.pop(key) for key in keys}
    return {
        "phase": "evaluate-server",
        "metrics": {"loss": found[messages.TEST_LOSS], "accuracy": found[messages.TEST_ACCURACY]},
        "num_examples": round(found[messages.TEST_EXAMPLES]),
        "seconds": time.perf_counter() - start,
    }


def _known(number: float) -> float | None:
    """JSON has no NaN: null where a number is not finite, as a diverged model's loss, or a layer has none."""
    return number if math.isfinite(number) else None
