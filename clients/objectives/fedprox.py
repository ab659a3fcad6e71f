"""FedProx, on the client. Li et al., arXiv 1812.06127, equation 2."""

from typing import cast

import torch
from torch import Tensor

from clients.objectives.objective import Objective, Task
from fedwsa import messages


class FedProx(Objective):
    """The loss and μ/2 ‖w − x‖², x the weights that the server sent: its gradient is μ (w − x), no autograd needed.

    μ ≥ 0 comes with the message; so it does from Flower's own FedProx.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.mu = float(cast(float, messages.config_of(task.message)[messages.PROXIMAL_MU]))
        self.start = [weights.detach().clone() for weights in task.parameters.values()]

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add μ (w − x)."""
        reached = [(w, x) for w, x in zip(self.task.parameters.values(), self.start, strict=True) if w.grad is not None]
        weights, starts = [w for w, _ in reached], [x for _, x in reached]
        gradients = [cast(Tensor, w.grad) for w in weights]
        torch._foreach_add_(gradients, torch._foreach_sub(weights, starts), alpha=self.mu)
