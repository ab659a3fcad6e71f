"""MOON, on the client. Li, He, Song, arXiv 2103.16257, algorithm 1."""

import copy
import weakref
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor, nn

from clients.memory import recall, remember
from clients.objectives.objective import Objective, Task
from fedwsa import messages
from fedwsa.arrays import load

KEPT = "previous"


class Moon(Objective):
    """The loss and μ ℓ_con, which draws what the model makes of a sample to the server's and away from the client's.

    ℓ_con: see `contrastive`, with the representations by the model that trains, by the one that the server sent, and by
    the client's own after its last training, which it keeps whole, BatchNorm's statistics included. Before a client's
    first training there is none, and the loss is the task's alone, as in round 1 of the authors' code.

    A representation is what goes into the last `nn.Linear` in the order of the modules, whatever the model; the authors
    add a projection head of two layers before it, which changes the model. ValueError for a model without such a layer.

    The two other models are copies in eval mode, as in the authors' code: BatchNorm is by their running statistics and
    these stay as they are, nothing is drawn for dropout, and no gradient goes into them.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        settings = messages.config_of(task.message)
        self.mu = float(cast(float, settings[messages.CONTRASTIVE_MU]))
        self.temperature = float(cast(float, settings[messages.TEMPERATURE]))
        self.own: _Representation | None = None
        previous = recall(task.context, settings, KEPT)
        if self.mu and previous is not None:
            self.others = [_frozen(task.model), _frozen(task.model, previous)]
            self.theirs = [_Representation(model) for model in self.others]
            self.own = _Representation(task.model)

    def penalty(self, images: Tensor) -> Tensor | None:
        """μ ℓ_con of the batch, nats a sample."""
        if self.own is None:
            return None
        with torch.no_grad():
            for model in self.others:
                model(images)
        received, previous = (each.of_batch for each in self.theirs)
        return self.mu * contrastive(self.own.of_batch, received, previous, self.temperature)

    def finish(self, reply: RecordDict, steps: int) -> None:
        """Keep the model; the module is as it was, for others to train."""
        if self.own is not None:
            self.own.remove()
        if self.mu:
            kept = {name: tensor.detach() for name, tensor in self.task.model.state_dict().items()}
            remember(self.task.context, messages.config_of(self.task.message), KEPT, kept)


def contrastive(own: Tensor, received: Tensor, previous: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of −log(e^{s_r/τ} / (e^{s_r/τ} + e^{s_p/τ})), nats, with the cosines of `own` with either.

    Representations: [n, d] each. Computed as log(1 + e^{(s_p − s_r)/τ}). log 2 where the two others agree.
    """
    towards, away = (F.cosine_similarity(own, other, dim=1) for other in (received, previous))
    return F.softplus((away - towards) / temperature).mean()


class _Representation:
    """What last went into a model's last linear layer: [n, d]."""

    def __init__(self, model: nn.Module) -> None:
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(f"moon: contrasts what goes into the last nn.Linear; {type(model).__name__} has none")
        self._held: list[Tensor] = []
        handle = linear[-1].register_forward_pre_hook(partial(_hold, self._held))
        # The module serves other messages too: also where training fails, and nobody calls `remove`, the hook goes.
        self.remove = weakref.finalize(self, handle.remove)

    @property
    def of_batch(self) -> Tensor:
        return self._held[0].flatten(1)


def _hold(held: list[Tensor], module: nn.Module, inputs: tuple[Any, ...]) -> None:
    held[:] = inputs[:1]


def _frozen(model: nn.Module, record: ArrayRecord | None = None) -> nn.Module:
    """A copy that stays as it is, with other numbers if such are given."""
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    if record is not None:
        load(copied.state_dict(), record)
    return copied
