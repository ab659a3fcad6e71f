"""Gradients of an `MLP` without autograd, to the bits of autograd's.

Autograd's own work is a fifth of a step with 50 samples and a quarter of one with 10; and where each parameter is
changed while its gradient is in the processor's cache, that is not read from memory again.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fedwsa.models.linear import Linear, multiplying
from fedwsa.models.mlp import MLP

Take = Callable[[Tensor, Tensor], None]
"""Gets a parameter and its gradient as soon as nothing needs the parameter any more: it may be changed at once."""

Backpropagate = Callable[[Take, Tensor, Tensor], Tensor]
"""Gives the mean cross-entropy, nats a sample, of images [n, C, H, W] and labels int64 [n], and takes its gradients."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")  # of a module

# The derivatives that autograd itself calls; by their overloads, which PyTorch looks for at each call otherwise.
threshold_backward = torch.ops.aten.threshold_backward.default
nll_loss_forward = torch.ops.aten.nll_loss_forward.default
nll_loss_backward = torch.ops.aten.nll_loss_backward.default
log_softmax_backward = torch.ops.aten._log_softmax_backward_data.default


def by_hand(model: nn.Module) -> Backpropagate | None:
    """How to backpropagate through a model; None where it has to be left to autograd.

    It can be done through an `MLP` on the CPU, all of which trains, that was not rebuilt after it was made, and whose
    tensors nobody watches by a hook. For a layer of one unit and a batch of one sample bits are not those of autograd.
    """
    if type(model) is not MLP or list(model._modules) != ["layers"] or model._parameters or _is_watched(model):
        return None
    layers = [layer for layer in model.layers if isinstance(layer, nn.Linear)]
    tensors = [tensor for layer in layers for tensor in layer._parameters.values()]
    distinct = len(set(map(id, tensors)))
    if not len(model.layers) == len(layers) == distinct / 2 > 0 or not all(map(_is_plain, tensors)):
        return None
    if any(type(layer) not in (nn.Linear, Linear) or _is_watched(layer) for layer in layers):
        return None
    if _has_any_global_hook() or torch.is_autocast_enabled("cpu"):  # type: ignore[no-untyped-call]
        return None
    return partial(_backpropagate, layers)


def _is_plain(tensor: Tensor | None) -> bool:
    """Whether it is a dense parameter that trains, and nobody watches its gradient."""
    if type(tensor) is not nn.Parameter or not (tensor.requires_grad and tensor.is_cpu and tensor.is_contiguous()):
        return False
    return not (tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def _is_watched(module: nn.Module) -> bool:
    """Whether a call of it does more, or something else, than its class says."""
    own = vars(module)
    return any(own[hooks] for hooks in HOOKS) or "forward" in own


def _backpropagate(layers: list[nn.Linear], take: Take, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        outputs = images.flatten(1)
        passed = []  # each layer, its input, and how its products are made
        for number, layer in enumerate(layers, 1):
            multiply = multiplying(layer, outputs)
            passed.append((layer, outputs, multiply))
            outputs = multiply(outputs, layer.weight, layer.bias)
            if number < len(layers):
                outputs.relu_()
        loss, gradient = _cross_entropy(outputs, labels)
        for layer, inputs, multiply in reversed(passed):
            above = gradient
            if layer is not layers[0]:
                gradient = threshold_backward(multiply(above, layer.weight.t(), None), inputs, 0)
            take(layer.weight, multiply(above.t(), inputs.t(), None))
            take(layer.bias, above.sum(0))
        return loss


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the samples, and its gradient [n, num_classes]."""
    logs = logits.log_softmax(1)
    mean, ignored = 1, -100  # how `F.cross_entropy` reduces, and the label that it leaves out
    loss, counted = nll_loss_forward(logs, labels, None, mean, ignored)
    gradient = nll_loss_backward(loss.new_ones(()), logs, labels, None, mean, ignored, counted)
    return loss, log_softmax_backward(gradient, logs, 1, logs.dtype)
