"""SCAFFOLD, on the client. Karimireddy et al., arXiv 1910.06378, algorithm 1, lines 7 to 14."""

from typing import cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from clients.objectives.objective import Objective, Task, filled, gradients_of, keep, kept
from fedwsa import messages
from fedwsa.arrays import pack
from fedwsa.momentum import accumulated

KEPT = "control"


class Scaffold(Objective):
    """Steps with gradient + c − c_i; c is the server's control variate, c_i the client's, kept from round to round.

    c comes in a record of its own, over the server's parameters that train, and the reply has c_i⁺ − c_i in its place:
    0 for parameters that stay with the client or do not train there, which have no c_i. c_i = 0 before the first
    training. What the new c_i⁺ is, the message says:

    option II: c_i − c + (x − y)/(η‖a‖₁), the mean of the gradients that led from x to y; for SGD alone. The paper's
        ‖a‖₁ = K counts steps without momentum; that with it gradients count as often as they moved y
        (`fedwsa.momentum`) is ours. All that moves the weights is in it: weight decay, and weight scope alignment too.
    option I: the gradient at x of the mean loss over all the client's samples, one more pass; for any optimiser. It
        is the task's alone, not clipped, of samples that are not augmented.

    Raises ValueError for option II with another optimiser, for option I where the client cannot give the gradient,
    and for a c without a parameter that trains here.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        option = messages.config_of(task.message)[messages.CONTROL_OPTION]
        self.sent = cast(ArrayRecord, task.message.content[messages.CONTROL])
        self.weights = list(task.parameters.values())
        self.start = [weights.detach().clone() for weights in self.weights]
        self.server = filled(task, {name: self.sent[name] for name in task.parameters.keys() & self.sent.keys()})
        self.own = kept(task, KEPT)
        self.correction = torch._foreach_sub(self.server, self.own)
        self.gradient: list[Tensor] | None = None  # at x, where the option has it
        if option == "I":
            if task.gradient is None:
                raise ValueError("scaffold: option I needs the gradient over all the client's samples")
            found = task.gradient()
            self.gradient = [found[name] for name in task.parameters]
        elif task.config.optimizer != "sgd":
            raise ValueError(
                f'scaffold: option II knows steps of "sgd", not of "{task.config.optimizer}"; take option I'
            )

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add c − c_i, also where the loss has no gradient."""
        torch._foreach_add_(gradients_of(self.weights), self.correction)

    @torch.no_grad()
    def finish(self, reply: RecordDict, steps: int) -> None:
        """Keep c_i⁺; the reply gets c_i⁺ − c_i."""
        new = self._mean_gradient(steps) if self.gradient is None else self.gradient
        changes = dict(zip(self.task.parameters, torch._foreach_sub(new, self.own), strict=True))
        reply[messages.CONTROL] = pack({name: changes.get(name, _zeros(array)) for name, array in self.sent.items()})
        keep(self.task, KEPT, new)

    def _mean_gradient(self, steps: int) -> list[Tensor]:
        """Of the task, over the steps: (x − y)/(η‖a‖₁) less the correction."""
        config = self.task.config
        mean = torch._foreach_sub(self.start, self.weights)
        torch._foreach_div_(mean, config.learning_rate * accumulated(steps, config.momentum))
        torch._foreach_sub_(mean, self.correction)
        return list(mean)


def _zeros(array: Array) -> Tensor:
    return torch.from_numpy(np.zeros(array.shape, array.dtype))
