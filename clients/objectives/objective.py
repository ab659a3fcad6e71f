"""What every client objective is."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from flwr.app import Array, Context, Message, RecordDict
from torch import Tensor, nn

from clients.memory import recall, remember
from fedwsa import messages
from fedwsa.arrays import load
from fedwsa.config import Config


@dataclass(frozen=True, slots=True)
class Task:
    """What a client was asked to train.

    model: filled with what the server sent. parameters: those that train and that the server averages, by name; at
    this point with the server's numbers. message: the server's, with its settings and what it sent besides the model.
    context: the client's, for what it keeps from round to round (`clients.memory`). gradient: gives that of the mean
    loss over all the client's samples, where the model stands at the call, by the names of all parameters that train;
    None for a client that has no way to it.
    """

    model: nn.Module
    parameters: dict[str, Tensor]
    message: Message
    context: Context
    config: Config
    gradient: Callable[[], dict[str, Tensor]] | None = None


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


def kept(task: Task, what: str) -> list[Tensor]:
    """What the client kept by this name after its last training, a tensor a parameter; zeros before the first."""
    return filled(task, recall(task.context, messages.config_of(task.message), what))


def keep(task: Task, what: str, numbers: Iterable[Tensor]) -> None:
    """Keep a tensor a parameter, whose memory is handed over, for the next training."""
    named = dict(zip(task.parameters, numbers, strict=True))
    remember(task.context, messages.config_of(task.message), what, named)


def filled(task: Task, record: Mapping[str, Array] | None) -> list[Tensor]:
    """The record's numbers as the parameters are, in their order; zeros without one."""
    tensors = {name: torch.zeros_like(weights) for name, weights in task.parameters.items()}
    if record is not None:
        load(tensors, record)
    return list(tensors.values())


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Their `.grad`, to be added to; made, as zeros, where the loss does not reach a parameter."""
    gradients = []
    for weights in parameters:
        if weights.grad is None:
            weights.grad = torch.zeros_like(weights)
        gradients.append(weights.grad)
    return gradients
