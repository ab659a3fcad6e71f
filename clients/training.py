"""Local training: the loop that every objective shares."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clients.objectives import Objective
from clients.optimizers import step_of
from fedwsa.config import Config
from fedwsa.data.augmentation import Augmented
from fedwsa.granularity import layer_of
from fedwsa.messages import Alignment
from fedwsa.models.backpropagation import Backpropagate, Take, by_hand

if TYPE_CHECKING:
    from fedwsa.regularizer import WeightScopeRegularizer

TrainStep = Callable[[Tensor, Tensor], Tensor]
"""Takes images and labels of a batch, makes a step with them, and gives the task loss before it."""


@dataclass(frozen=True, slots=True)
class Training:
    """Mean task loss over all steps, nats a sample; how many steps there were; and λ of the alignment, 0 without."""

    loss: float
    steps: int
    strength: float = 0.0


def train(
    model: nn.Module,
    images: Tensor | Augmented,
    labels: Tensor,
    config: Config,
    generator: torch.Generator,
    alignment: Alignment | None = None,
    objective: Objective | None = None,
) -> Training:
    """Train in place for `local-epochs`, with a fresh optimiser.

    images: [N, C, H, W] float32, maybe `Augmented`, labels: [N] int64, N ≥ 1, on the model's device. Each epoch is a
    new permutation from `generator`; for its last batch see `_batches`. Without an objective it is the task's loss.
    `clip-norm` bounds the norm of the task's gradient, with that of the objective's penalty (MOON's contrast); what the
    objective and the alignment add to it comes after, and a share that fixes λ is of the gradient before that.
    """
    if not model.training:  # it goes through all modules
        model.train()
    regularizer = _regularizer(model, alignment)
    backpropagate = None if objective else by_hand(model)
    quick = _quick_step(backpropagate, config, alignment, regularizer) if backpropagate else None
    step = quick or _usual_step(model, config, alignment, regularizer, objective, backpropagate)
    total, steps = torch.zeros((), device=labels.device), 0
    for _ in range(config.local_epochs):
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for batch in _batches(order, config.batch_size, model):
            total += step(images[batch], labels[batch])
            steps += 1
    return Training(float(total) / steps, steps, regularizer.strength if regularizer else 0.0)


def _quick_step(
    backpropagate: Backpropagate,
    config: Config,
    alignment: Alignment | None,
    regularizer: "WeightScopeRegularizer | None",
) -> TrainStep | None:
    """Changes each parameter while its gradient is in the cache, to the same bits as `_usual_step`.

    None where a step needs all of the gradient, or more than it.
    """
    if not _is_plain(config) or config.clip_norm:
        return None
    if regularizer:
        take = None if alignment and alignment.share > 0 else regularizer.one_by_one(config.learning_rate)
    else:
        take = _one_by_one(config.learning_rate)
    return partial(backpropagate, take) if take else None


def _one_by_one(learning_rate: float) -> Take:
    def step(parameter: Tensor, gradient: Tensor) -> None:
        parameter.add_(gradient, alpha=-learning_rate)

    return step


def _usual_step(
    model: nn.Module,
    config: Config,
    alignment: Alignment | None,
    regularizer: "WeightScopeRegularizer | None",
    objective: Objective | None,
    backpropagate: Backpropagate | None,
) -> TrainStep:
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    optimize, momentum = step_of(parameters, config), config.momentum if config.optimizer == "sgd" else 0.0
    plain = _is_plain(config)
    share = alignment.share if alignment and regularizer else 0.0  # until it has fixed λ

    def step(images: Tensor, labels: Tensor) -> Tensor:
        nonlocal share
        if backpropagate:
            loss = backpropagate(_keep, images, labels)
        else:
            loss = _gradient(model, parameters, images, labels, objective)
        with torch.no_grad():
            if config.clip_norm:
                nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            if regularizer and share > 0:
                regularizer.fix_strength(share, config.learning_rate, momentum)
                share = 0.0
            if objective:
                objective.add_gradient()
            if regularizer:
                regularizer.descend(config.learning_rate) if plain else regularizer.add_gradient()
            optimize()
            if regularizer:
                regularizer.proximal_step(config.learning_rate, momentum)
        return loss

    return step


def _is_plain(config: Config) -> bool:
    """Whether the optimiser is SGD that adds the gradient and nothing else."""
    return config.optimizer == "sgd" and config.momentum == config.weight_decay == 0


def mean_gradient(model: nn.Module, images: Tensor, labels: Tensor, config: Config, seed: int) -> dict[str, Tensor]:
    """Gradient of the mean task loss over all samples, by parameter that trains; nats a sample.

    In train mode and in the batches of an epoch, whose order `seed` decides: what steps descend is the loss with
    BatchNorm's batch statistics. Weights, `.grad`, buffers, which modules may move in train mode, and the state of
    PyTorch's random numbers are afterwards as they were. The other arguments are those of `train`.
    """
    model.train()
    parameters = {name: weights for name, weights in model.named_parameters() if weights.requires_grad}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    total = [torch.zeros_like(weights) for weights in parameters.values()]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    with torch.random.fork_rng(devices=[labels.device] if labels.is_cuda else []):
        for batch in _batches(order, config.batch_size, model):
            logits = torch.func.functional_call(model, buffers, (images[batch],))
            loss = F.cross_entropy(logits, labels[batch], reduction="sum")
            # A parameter that the loss does not reach has a gradient of 0.
            found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            torch._foreach_add_(total, found)
    torch._foreach_div_(total, float(len(labels)))
    return dict(zip(parameters, total, strict=True))


def _keep(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient


def _gradient(
    model: nn.Module, parameters: list[Tensor], images: Tensor, labels: Tensor, objective: Objective | None
) -> Tensor:
    """The batch's task loss; `.grad` is then its gradient, with that of the objective's penalty."""
    loss = F.cross_entropy(model(images), labels)
    penalty = objective.penalty(images) if objective else None
    for parameter in parameters:
        parameter.grad = None
    (loss if penalty is None else loss + penalty).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _batches(order: Tensor, size: int, model: nn.Module) -> list[Tensor]:
    """Runs of `size` samples and a smaller one; with BatchNorm a last single sample, which has no variance, joins them.

    A client with one sample in all keeps its batch of one.
    """
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if len(batches) > 1 and len(batches[-1]) == 1 and any(isinstance(each, _BatchNorm) for each in model.modules()):
        return [*batches[:-2], torch.cat(batches[-2:])]
    return batches


_LAST: "list[tuple[Alignment, dict[str, Tensor], WeightScopeRegularizer]]" = []  # one at the most


def _regularizer(model: nn.Module, alignment: Alignment | None) -> "WeightScopeRegularizer | None":
    """What aligns; the clients of a round have one together, unless each finds its own λ."""
    if alignment is None or alignment.strength == 0:
        return None
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    for known, before, regularizer in _LAST:
        same = list(before) == list(parameters) and all(map(is_, before.values(), parameters.values()))
        if same and known == alignment:
            return regularizer
    regularizer = _make_regularizer(model, parameters, alignment)
    _LAST[:] = [] if alignment.share > 0 else [(alignment, parameters, regularizer)]
    return regularizer


def _make_regularizer(
    model: nn.Module, parameters: dict[str, Tensor], alignment: Alignment
) -> "WeightScopeRegularizer":
    # Its compiler takes time and memory that others need not spend.
    from fedwsa.regularizer import WeightScopeRegularizer

    target = alignment.target
    if alignment.layers:
        parameters = {name: weights for name, weights in parameters.items() if name in alignment.layers}
    layers = [layer_of(name, alignment.granularity) for name in target.names]
    if not parameters.keys() >= set(layers):
        # A server sees arrays; which of them are buffers, or one weight under two names, is known here.
        others = model.state_dict().keys() - parameters.keys()
        target = target.only([name for name, layer in zip(target.names, layers, strict=True) if layer not in others])
    return WeightScopeRegularizer(
        parameters.items(),
        target,
        strength=alignment.strength,
        mode=alignment.mode,  # type: ignore[arg-type]
        reduction=alignment.reduction,  # type: ignore[arg-type]
        divergence=alignment.divergence,
        granularity=alignment.granularity,
    )
