"""Gradients of an `MLP` without autograd, to the bits of autograd's.

Autograd's own work is a fifth of a step with 50 samples and a quarter of one with 10; and where each parameter is
changed while its gradient is in the processor's cache, that is not read from memory again.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fedwsa.models.linear import Linear, multiplying
from fedwsa.models.mlp import MLP

Take = Callable[[Tensor, Tensor], None]
"""Gets a parameter and its gradient as soon as nothing needs the parameter any more: it may be changed at once."""

Backpropagate = Callable[[Take, Tensor, Tensor], Tensor]
"""Gives the mean cross-entropy, nats a sample, of images [n, C, H, W] and labels int64 [n], and takes its gradients."""

aten = torch.ops.aten  # with the derivatives that autograd itself calls


def by_hand(model: nn.Module) -> Backpropagate | None:
    """How to backpropagate through a model; None where it is to be left to autograd.

    That is any but an `MLP` all of which trains, and one into which somebody looks while it computes (hooks).
    """
    if type(model) is not MLP:
        return None
    layers = [layer for layer in model.layers if isinstance(layer, nn.Linear) and _is_plain(layer)]
    return partial(_backpropagate, layers) if len(layers) == len(model.layers) else None


def _is_plain(layer: nn.Linear) -> bool:
    trains = layer.weight.requires_grad and layer.bias.requires_grad
    watched = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) in (nn.Linear, Linear) and trains and not watched


def _backpropagate(layers: list[nn.Linear], take: Take, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        rows = images.flatten(1)
        passed = []  # of each layer its input, and how its products are made
        for number, layer in enumerate(layers, 1):
            multiply = multiplying(layer, rows)
            passed.append((layer, rows, multiply))
            rows = multiply(rows, layer.weight, layer.bias)
            if number < len(layers):
                rows.relu_()
        loss, gradient = _cross_entropy(rows, labels)
        for layer, rows, multiply in reversed(passed):
            above = gradient
            if layer is not layers[0]:
                gradient = aten.threshold_backward(multiply(above, layer.weight.t(), None), rows, 0)
            take(layer.weight, multiply(above.t(), rows.t(), None))
            take(layer.bias, above.sum(0))
        return loss


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the samples, and its gradient [n, num_classes]."""
    logs = logits.log_softmax(1)
    mean, ignored = 1, -100  # how `F.cross_entropy` reduces, and the label that it leaves out
    loss, counted = aten.nll_loss_forward(logs, labels, None, mean, ignored)
    gradient = aten.nll_loss_backward(loss.new_ones(()), logs, labels, None, mean, ignored, counted)
    return loss, aten._log_softmax_backward_data(gradient, logs, 1, logs.dtype)
