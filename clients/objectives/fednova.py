"""FedNova, on the client. Wang et al., arXiv 2007.07481."""

from typing import cast

from flwr.app import MetricRecord, RecordDict

from clients.objectives.objective import Objective
from fedwsa import messages


class FedNova(Objective):
    """The task's loss; the server is told how many steps were made, by which it divides the update."""

    def finish(self, reply: RecordDict, steps: int) -> None:
        """Add `local-steps` to the metrics."""
        cast(MetricRecord, reply[messages.METRICS])[messages.LOCAL_STEPS] = steps
