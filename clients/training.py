"""Local training: the loop that every objective shares."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.sgd import sgd

from fedwsa.config import Config
from fedwsa.data.augmentation import Augmented
from fedwsa.granularity import layer_of
from fedwsa.messages import Alignment
from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.scope import WeightScope


def train(
    model: nn.Module,
    images: Tensor | Augmented,
    labels: Tensor,
    config: Config,
    generator: torch.Generator,
    alignment: Alignment | None = None,
) -> float:
    """SGD in place for `local-epochs`; returns the mean task loss over all steps, nats a sample.

    images: [N, C, H, W] float32, maybe `Augmented`, labels: [N] int64, N ≥ 1, on the model's device. Each epoch is a
    new permutation from `generator`; for its last batch see `_batches`. Momentum buffers start at zero at each call.
    The functional form of PyTorch's SGD is used: building a `torch.optim.Optimizer` imports its compiler, a second.
    """
    if not model.training:  # it goes through all modules
        model.train()
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    buffers: list[Tensor | None] = [None] * len(parameters)
    regularizer = _regularizer(model, alignment)
    total, steps = torch.zeros((), device=labels.device), 0
    for _ in range(config.local_epochs):
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for batch in _batches(order, config.batch_size, model):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            for parameter in parameters:
                parameter.grad = None
            loss.backward()  # type: ignore[no-untyped-call]
            if regularizer:
                if steps == 0 and alignment and alignment.share > 0:
                    regularizer.fix_strength(alignment.share, config.learning_rate, config.momentum)
                regularizer.add_gradient()
            _sgd_step(parameters, buffers, config)
            if regularizer:
                regularizer.proximal_step(config.learning_rate, config.momentum)
            total += loss.detach()
            steps += 1
    return float(total) / steps


def _batches(order: Tensor, size: int, model: nn.Module) -> tuple[Tensor, ...]:
    """Runs of `size` samples and a smaller one; with BatchNorm a last single sample, which has no variance, joins them.

    A client with one sample in all keeps its batch of one.
    """
    batches = torch.split(order, size)
    if len(batches) > 1 and len(batches[-1]) == 1 and any(isinstance(each, _BatchNorm) for each in model.modules()):
        return *batches[:-2], torch.cat(batches[-2:])
    return batches


def _regularizer(model: nn.Module, alignment: Alignment | None) -> WeightScopeRegularizer | None:
    if alignment is None or alignment.strength == 0:
        return None
    parameters, target = dict(model.named_parameters()), alignment.target
    # A server sees arrays; which of them are buffers, or one weight under two names, is known here.
    others = model.state_dict().keys() - parameters.keys()
    kept = [i for i, name in enumerate(target.names) if layer_of(name, alignment.granularity) not in others]
    return WeightScopeRegularizer(
        parameters.items(),
        WeightScope(tuple(target.names[i] for i in kept), target.means[kept], target.variances[kept]),
        strength=alignment.strength,
        mode=alignment.mode,  # type: ignore[arg-type]
        reduction=alignment.reduction,  # type: ignore[arg-type]
        divergence=alignment.divergence,
        granularity=alignment.granularity,
    )


@torch.no_grad()
def _sgd_step(parameters: list[Tensor], buffers: list[Tensor | None], config: Config) -> None:
    used = [(i, parameter, parameter.grad) for i, parameter in enumerate(parameters) if parameter.grad is not None]
    weights, gradients = [weight for _, weight, _ in used], [gradient for _, _, gradient in used]
    if config.momentum == 0 and config.weight_decay == 0:  # what PyTorch's would do too, without its overhead
        torch._foreach_add_(weights, gradients, alpha=-config.learning_rate)
        return
    momenta: list[Tensor | None] = [buffers[i] for i, _, _ in used]
    sgd(
        weights,
        gradients,
        momenta,
        foreach=True,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        lr=config.learning_rate,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )
    for (i, _, _), momentum in zip(used, momenta, strict=True):
        buffers[i] = momentum
