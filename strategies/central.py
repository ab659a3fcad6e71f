"""Central training: the upper end of the scale, what one machine with all the data reaches."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.serverapp import Grid

from fedwsa import messages
from fedwsa.errors import RunError
from fedwsa.simulation.grid import SimulationGrid
from strategies.fedavg import FedAvg
from strategies.sampling import broadcast


def check_simulated(grid: Grid) -> None:
    """RunError over any other grid than our simulation's."""
    if not isinstance(grid, SimulationGrid):
        raise RunError("central: no real client has all samples; allowed in a simulation by `fedwsa run`")


class Central(FedAvg):
    """One model trained on all clients' training samples together, `local-epochs` a round.

    The first client does it, by the loop that trains every client, with batches from (seed, round, 0) and a fresh
    optimiser each round; BatchNorm has nobody to be local to. Clients evaluate as with FedAvg. It sees every client's
    samples in each round, where a cohort of FedAvg's sees its own: a round is num-clients/cohort times the work.
    For our simulation alone (RunError elsewhere, before the first round of any strategy): no real client can have the
    others' samples. Minimises the mean loss over all samples, Σ p_k f_k.
    """

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The model to one client, who is told to take everybody's samples."""
        check_simulated(grid)
        config = ConfigRecord({**config, messages.LOCAL: "aggregate", messages.POOLED: True})
        return broadcast(sorted(grid.get_node_ids())[:1], MessageType.TRAIN, server_round, arrays, config)
