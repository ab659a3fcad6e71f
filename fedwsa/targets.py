"""Target scopes that no training decides: one Gaussian for all layers, or what each layer's initialiser gives.

Both targets are ours, but for the idea of a pre-defined one, which is arXiv 2408.12237's.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedwsa.granularity import units
from fedwsa.models.initialisation import initial_std
from fedwsa.scope import LayerPredicate, WeightScope, is_layer, pooled


def gaussian(
    tensors: Mapping[str, Tensor],
    mean: float,
    std: float,
    is_layer: LayerPredicate = is_layer,
    granularity: str = "layer",
) -> WeightScope:
    """The same N(mean, std²) for every unit of the tensors that are layers, as `fedwsa.scope.measure` orders them.

    Raises ValueError unless mean is finite and 0 < std < ∞.
    """
    if not math.isfinite(mean) or not 0 < std < math.inf:
        raise ValueError(f"a Gaussian target needs a finite mean and 0 < std < ∞, got mean {mean!r}, std {std!r}")
    shapes = {name: tensor.shape for name, tensor in tensors.items() if is_layer(name, tensor)}
    names = tuple(units(shapes, granularity))
    means = torch.full((len(names),), mean, dtype=torch.float64)
    return WeightScope(names, means, torch.full_like(means, std**2))


def init_scheme(
    model: nn.Module, scheme: str = "default", is_layer: LayerPredicate = is_layer, granularity: str = "layer"
) -> WeightScope:
    """Mean 0 and the standard deviation with which each layer's own initialiser draws it; no weight is looked at.

    scheme: as `init` in the config; "default" is PyTorch's own for the kind of layer, and not what a model's own
    constructor may draw instead. Channels of a layer have the layer's; the model's variance is the mean over weights.
    Raises ValueError for an unknown scheme, or layers whose initialiser is not known.
    """
    layers = {name: tensor for name, tensor in model.named_parameters() if is_layer(name, tensor)}
    kinds = {id(tensor): module for module in model.modules() for tensor in module.parameters(recurse=False)}
    stds = {name: initial_std(kinds[id(tensor)], tensor, scheme) for name, tensor in layers.items()}
    if unknown := [name for name, std in stds.items() if std is None]:
        raise ValueError(
            f"target init-scheme: no initialiser is known for {', '.join(unknown)}; known are those of linear, "
            "convolution, attention and embedding layers; allowed is another target"
        )
    sizes = torch.tensor([tensor.numel() for tensor in layers.values()], dtype=torch.float64)
    variances = torch.tensor([std**2 for std in stds.values() if std is not None], dtype=torch.float64)
    if granularity == "model" and layers:
        _, variances = pooled(torch.zeros_like(variances), variances, sizes)
    elif granularity == "channel":
        variances = variances.repeat_interleave(torch.tensor([len(tensor) for tensor in layers.values()]))
    names = tuple(units({name: tensor.shape for name, tensor in layers.items()}, granularity))
    return WeightScope(names, torch.zeros_like(variances), variances)
