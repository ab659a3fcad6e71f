"""Rescale a model's layers to a target weight scope, with no training."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedwsa.scope import WeightScope, degenerate, measure


class Rescaled(NamedTuple):
    """The model, and the layers of the target that could not be rescaled because they or their targets are degenerate.

    A layer is so with σ = 0 (a single weight, a constant), or if something is not finite.
    """

    state: dict[str, Tensor]
    left_alone: list[str]


def align_scopes(model: Mapping[str, Tensor], target: WeightScope) -> Rescaled:
    """Give each layer of `target` the target's mean and variance: w′ = μ_t + (w − μ) σ_t/σ.

    The post-hoc baseline for training with the regulariser; ours. It changes what the model computes. Computed in
    float64; the result is in the tensors' own types, in which the scope is the target's up to rounding, and shares no
    memory with `model`. Tensors that the target does not name, biases among them, are copied.

    model: state dict; one weight under two names is to be named twice in the target, as `measure` of it does.
    Raises ValueError where the target names a tensor that is not there, or that is not floating point.
    """
    if odd := [name for name in target.names if name not in model or not model[name].is_floating_point()]:
        raise ValueError(f"the target names layers that the model does not have as floating-point tensors: {odd}")
    scope = measure({name: model[name] for name in target.names}, lambda name, tensor: True)
    state = {name: tensor.detach().clone() for name, tensor in model.items()}
    left_alone = [name for name, odd in zip(target.names, degenerate(scope, target).tolist(), strict=True) if odd]
    scales = (target.variances / scope.variances).sqrt().tolist()
    for name, mean, wanted, scale in zip(
        target.names, scope.means.tolist(), target.means.tolist(), scales, strict=True
    ):
        if name not in left_alone:
            state[name] = (wanted + (model[name].detach().to(torch.float64) - mean) * scale).to(model[name].dtype)
    return Rescaled(state, left_alone)
