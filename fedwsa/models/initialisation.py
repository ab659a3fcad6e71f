"""Named schemes for the initial weights, from which the weight scopes start."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

SCHEMES: dict[str, Callable[..., Tensor]] = {
    "kaiming-normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "kaiming-uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "xavier-normal": nn.init.xavier_normal_,
    "xavier-uniform": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
}


def initialise(model: nn.Module, scheme: str, seed: int) -> None:
    """Draw anew the weights of all linear, convolution and attention layers; their biases become zero.

    Standard deviations: kaiming √(2/fan_in), He et al., arXiv 1502.01852; xavier √(2/(fan_in + fan_out)), Glorot &
    Bengio 2010; uniform and normal alike. orthogonal: rows or columns of the (out, rest) matrix, whichever are fewer,
    are orthonormal (Saxe et al., arXiv 1312.6120), so that the root mean square is 1/√max(out, rest). Fans are
    PyTorch's, which counts all of a grouped convolution's outputs as its fan_out. The last layer is no exception,
    which is ours; all else (normalisation, tables of positions) stays as the model made it.

    scheme: one of SCHEMES. seed: decides the numbers, and nothing else does.
    Raises ValueError for a scheme that is not there, or a model without any such layer.
    """
    _check(scheme)
    generator = torch.Generator().manual_seed(seed)
    layers = [pair for module in model.modules() if (pair := _weight_and_bias(module))]
    if not layers:
        raise ValueError(f"init = {scheme}: the model has no linear, convolution or attention layer; use default")
    for weight, bias in layers:
        SCHEMES[scheme](weight, generator=generator)
        if bias is not None:
            nn.init.zeros_(bias)


def _check(scheme: str) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"unknown init {scheme!r}: allowed are default, {', '.join(SCHEMES)}")


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    if isinstance(module, nn.Linear | _ConvNd):
        return module.weight, module.bias
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return module.in_proj_weight, module.in_proj_bias
    return None


def initial_std(module: nn.Module, weight: Tensor, scheme: str = "default") -> float | None:
    """Standard deviation with which a scheme draws a module's weight, by its shape alone; see `initialise`.

    "default" is PyTorch's: linear layers and convolutions uniform in ±1/√fan_in, attention's joint input projection
    xavier-uniform, embeddings N(0, 1) whatever the scheme. orthogonal: the root mean square.
    None for a weight whose initialiser is not known. Raises ValueError for a scheme that is not there.
    """
    if scheme != "default":
        _check(scheme)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return 1.0
    known = _weight_and_bias(module)
    if known is None or known[0] is not weight:
        return None
    outputs, inputs = weight.shape[:2]
    field = math.prod(weight.shape[2:])
    fan_in, fan_out = inputs * field, outputs * field
    if scheme == "default":
        scheme = "xavier" if isinstance(module, nn.MultiheadAttention) else "pytorch"
    if scheme.startswith("kaiming"):
        return math.sqrt(2 / fan_in)
    if scheme.startswith("xavier"):
        return math.sqrt(2 / (fan_in + fan_out))
    if scheme == "orthogonal":
        return 1 / math.sqrt(max(outputs, fan_in))
    return 1 / math.sqrt(3 * fan_in)
