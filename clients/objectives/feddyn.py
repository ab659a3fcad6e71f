"""FedDyn, on the client. Acar et al., arXiv 2111.04263, algorithm 1."""

from typing import cast

import torch
from flwr.app import RecordDict

from clients.objectives.objective import Objective, Task, gradients_of, keep, kept
from fedwsa import messages

KEPT = "feddyn-gradient"


class FedDyn(Objective):
    """The loss, − ⟨g_i, w⟩ and α/2 ‖w − x‖², x the weights that the server sent; α > 0 comes with the message.

    g_i is kept from round to round: 0 at first, after each training g_i − α (w − x). That is the gradient of the
    client's loss at w, where w is an exact minimum of the three terms.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.alpha = float(cast(float, messages.config_of(task.message)[messages.DYNAMIC_ALPHA]))
        self.weights = list(task.parameters.values())
        self.start = [weights.detach().clone() for weights in self.weights]
        self.own = kept(task, KEPT)

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add α (w − x) − g_i, also where the loss has no gradient."""
        gradients = gradients_of(self.weights)
        torch._foreach_add_(gradients, torch._foreach_sub(self.weights, self.start), alpha=self.alpha)
        torch._foreach_sub_(gradients, self.own)

    @torch.no_grad()
    def finish(self, reply: RecordDict, steps: int) -> None:
        """Keep g_i − α (w − x)."""
        new = torch._foreach_sub(self.own, torch._foreach_sub(self.weights, self.start), alpha=self.alpha)
        keep(self.task, KEPT, new)
