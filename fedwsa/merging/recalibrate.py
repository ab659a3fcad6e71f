"""New statistics for BatchNorm after a merge."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Estimate the running mean and variance of every BatchNorm layer anew, in place; no parameter changes.

    An average of two models' statistics is not what the averaged model sees: its activations vary less (Jordan et al.,
    REPAIR, arXiv 2211.08403). The batches go through the model once, with BatchNorm in training mode and all else, such
    as dropout, in evaluation mode. Running means and (unbiased) variances become the plain averages of the batches'
    own, without momentum: every batch counts alike, so make them alike in size, and not small.

    batches: what the model takes, on its device; one at least. Modes and momenta are afterwards as they were.
    A model without BatchNorm, or whose BatchNorm keeps no statistics, stays as it is, and no batch is asked for.
    Raises ValueError for no batches; then, as where the model raises, the statistics are those of an untrained model.
    """
    layers = [each for each in model.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]
    if not layers:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
        layer.momentum = None  # PyTorch's word for a cumulative average
    count = 0
    try:
        for batch in batches:
            model(batch)
            count += 1
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode
    if not count:
        raise ValueError("recalibrate needs at least one batch, got none")
