"""Models that clients train.

A model is made by a callable `(input_shape, num_classes, **options) -> nn.Module`. To add one: one file, one line in
`MODELS` (or none: `build` takes an import path too). Merging reads the hidden units off the order of the state dict,
so keep it a chain: weight and bias of each layer, in the order in which forward uses them.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedwsa.models.cnn import CNN
from fedwsa.models.mlp import MLP
from fedwsa.registry import lookup

__all__ = ["CNN", "MLP", "MODELS", "build", "placed"]

MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "cnn": CNN}


def build(name: str, input_shape: tuple[int, int, int], num_classes: int, seed: int, **options: Any) -> nn.Module:
    """Make a model by its registered name, or by an import path "package.module:factory"; on the CPU.

    input_shape: channels, height, width. options: what the model's own factory takes besides.
    seed: decides the initial weights, and nothing else does; the global generator is left as it was.
    Raises ValueError for an unknown name or options that the model does not take.
    """
    factory = lookup(MODELS, name, "model")
    try:
        inspect.signature(factory).bind(input_shape, num_classes, **options)
    except TypeError as error:
        raise ValueError(f"model {name!r} does not take (input_shape, num_classes, **options): {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU's generator too
        model = factory(input_shape, num_classes, **options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} must be a torch.nn.Module, got {type(model).__name__}")
    return model


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """The module on a device, laid out for speed there: channels last where there are convolutions."""
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
    return model.to(device)
