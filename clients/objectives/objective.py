"""What every client objective is."""

from dataclasses import dataclass

from flwr.app import Context, Message, RecordDict
from torch import Tensor, nn

from fedwsa.config import Config


@dataclass(frozen=True, slots=True)
class Task:
    """What a client was asked to train.

    model: filled with what the server sent. parameters: those that train and that the server averages, by name; at
    this point with the server's numbers. message: the server's, with its settings and what it sent besides the model.
    context: the client's, for what it keeps from round to round (`clients.memory`).
    """

    model: nn.Module
    parameters: dict[str, Tensor]
    message: Message
    context: Context
    config: Config


class Objective:
    """The task's loss and nothing else; what an objective adds to it, it overrides.

    A new one is made for each training. Of what happens in a step the order is: the gradient of loss and penalty, by
    autograd; clipping, if any; `add_gradient`; weight scope alignment, if any; the optimiser's step.
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def penalty(self, images: Tensor) -> Tensor | None:
        """A scalar that joins the batch's loss for autograd, nats; called after the model has seen the batch."""
        return None

    def add_gradient(self) -> None:
        """Add to `.grad` what has a closed form. Parameters that the loss does not reach have none (None)."""

    def finish(self, reply: RecordDict, steps: int) -> None:
        """After so many steps, the model as it will be sent: keep what is to be kept, add what the server is to get."""
