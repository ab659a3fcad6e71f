"""Central evaluation on the test split, which nothing else on the server looks at."""

import time
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import nn

from fedwsa import arrays as flower_arrays
from fedwsa import messages
from fedwsa.data import Dataset
from fedwsa.evaluation import BATCH, evaluate
from fedwsa.simulation.grid import SimulationGrid
from fedwsa.tracing import span


class CentralEvaluation:
    """Loss and accuracy of a model: here, or in a simulation on the workers, a batch each; the same numbers.

    model: of the federation's architecture, filled anew at each call. timeout: seconds to wait for the workers.
    """

    def __init__(self, model: nn.Module, dataset: Dataset, grid: Grid, timeout: float) -> None:
        self.model = model
        self.dataset = dataset
        self.timeout = timeout
        several = len(dataset.test_labels) > BATCH
        self.grid = grid if several and isinstance(grid, SimulationGrid) and grid.num_clients > 1 else None

    def __call__(self, arrays: ArrayRecord) -> dict[str, Any]:
        """The event of an evaluation, as metrics.jsonl has it."""
        start = time.perf_counter()
        with span("evaluate"):
            loss, accuracy = self._by_workers(arrays) or self._here(arrays)
        return {
            "phase": "evaluate-server",
            "metrics": {"loss": loss, "accuracy": accuracy},
            "num_examples": len(self.dataset.test_labels),
            "seconds": time.perf_counter() - start,
        }

    def _here(self, arrays: ArrayRecord) -> tuple[float, float]:
        flower_arrays.load(self.model.state_dict(), arrays)
        return evaluate(self.model, *self.dataset.test_tensors())

    def _by_workers(self, arrays: ArrayRecord) -> tuple[float, float] | None:
        """None where they cannot: the client app is another, or a worker failed."""
        if self.grid is None:
            return None
        total = len(self.dataset.test_labels)
        replies = self.grid.send_and_receive(
            [self._message(arrays, first, total) for first in range(0, total, BATCH)], timeout=self.timeout
        )
        metrics = [messages.metrics_of(reply) for reply in replies if reply.has_content()]
        sizes = [int(each[messages.NUM_EXAMPLES]) for each in metrics]  # type: ignore[arg-type]
        if sum(sizes) != total:
            self.grid = None
            return None
        means = np.array([[each[messages.LOSS], each[messages.ACCURACY]] for each in metrics], np.float64)
        loss, accuracy = np.array(sizes) @ means / total
        return float(loss), float(accuracy)

    def _message(self, arrays: ArrayRecord, first: int, total: int) -> Message:
        assert self.grid is not None
        part = {messages.FIRST_SAMPLE: first, messages.LAST_SAMPLE: min(first + BATCH, total)}
        settings = ConfigRecord({messages.VERSION: messages.SCHEMA_VERSION, **part})
        nodes = self.grid.get_node_ids()
        content = RecordDict({messages.ARRAYS: arrays, messages.CONFIG: settings})
        return Message(content, nodes[first // BATCH % len(nodes)], messages.TEST_SPLIT)
