"""Weight scope alignment inside any PyTorch training loop, without autograd.

Gradient and proximal map of the divergence are affine in a layer's weights (`fedwsa.scope`), so that a step costs two
sums and one affine update per layer.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedwsa.scope import SMALLEST_VARIANCE, WeightScope, gradient_terms, kl_divergence, measure, moments, proximal_terms

_LOG = logging.getLogger("fedwsa")


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's parameter and its target; `quick` if sums in the parameter's own dtype can be precise enough."""

    name: str
    parameter: Tensor
    size: float  # n, a float for the formulas
    target_mean: float
    target_variance: float
    largest: float  # of the parameter's dtype
    quick: bool


class WeightScopeRegularizer:
    """Pulls each layer of a model towards a target scope while it trains.

    The term is λ R with R = Σ_l KL(layer l ‖ target), or the mean over the target's layers with reduction="mean".
    mode="loss" adds its gradient to `.grad` before the optimiser's step. mode="proximal" applies its proximal map to
    the weights after the step; it is stable for every λ, and Adam does not rescale it.

    Layers that the target does not name are free. A layer is left alone while it is frozen (`requires_grad` false) or
    degenerate: constant, fewer than two elements, not finite, or too narrow for its dtype, here or in the target.
    Degenerate layers are reported once to the logger "fedwsa". strength=0 changes no bit.

    named_parameters: as `model.named_parameters()` gives them. target: see `fedwsa.scope.measure`. strength: λ >= 0.
    Raises ValueError for a λ that is negative or not finite, an unknown mode or reduction, or a target layer that is
    not a floating-point parameter.

        WeightScopeRegularizer(model.named_parameters(), target, strength=5.0).attach(optimizer)

    Source: the term is arXiv 2408.12237's, with λ in {1, 5, 10, 50}; the proximal mode is ours.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        target: WeightScope,
        *,
        strength: float = 1.0,
        mode: Literal["loss", "proximal"] = "loss",
        reduction: Literal["sum", "mean"] = "sum",
    ) -> None:
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be >= 0 and finite, got {strength!r}")
        if mode not in ("loss", "proximal"):
            raise ValueError(f"mode must be 'loss' or 'proximal', got {mode!r}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        parameters = {name: tensor for name, tensor in named_parameters if tensor.is_floating_point()}
        if odd := [name for name in target.names if name not in parameters]:
            raise ValueError(
                f"the target must name floating-point parameters of the model, got {odd}; "
                "measure it on dict(model.named_parameters()), which has no buffers and tied weights once"
            )
        self.target = target
        self.mode = mode
        self._parameters = {name: parameters[name] for name in target.names}
        self._share = 1 / max(1, len(target.names)) if reduction == "mean" else 1.0
        self._strength = strength * self._share  # λ per layer
        self._reported: set[str] = set()
        self._layers: list[_Layer] = []
        unusable = []
        numbers = zip(target.means.tolist(), target.variances.tolist(), strict=True)
        for (name, parameter), (mean, variance) in zip(self._parameters.items(), numbers, strict=True):
            if _usable(mean, variance) and parameter.numel() > 1:
                size, largest = float(parameter.numel()), torch.finfo(parameter.dtype).max
                quick = parameter.dtype in (torch.float32, torch.float64)
                self._layers.append(_Layer(name, parameter, size, mean, variance, largest, quick))
            else:
                unusable.append(name)
        self._report(unusable)

    def penalty(self) -> float:
        """R, in nats, without λ; for logs. Frozen layers count, degenerate ones count 0."""
        scope = measure(self._parameters, lambda name, tensor: True)
        return kl_divergence(scope, self.target).sum().item() * self._share

    def add_gradient(self) -> None:
        """Loss mode: add λ ∂R/∂w to `.grad`, as the autograd of λ R would. Does nothing in proximal mode."""
        if self.mode == "loss":
            self._add_gradient(self._layers)

    def proximal_step(self, learning_rate: float, momentum: float = 0.0) -> None:
        """Proximal mode: replace the weights by the minimiser of ½‖w′ − w‖² + c R(w′), c = η λ/(1 − β).

        learning_rate: η >= 0; momentum: 0 <= β < 1, the optimiser's heavy-ball factor, 0 without. Else ValueError.
        Does nothing in loss mode.
        """
        if self.mode == "proximal":
            self._proximal_step(self._layers, learning_rate, momentum)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Have every `optimizer.step()` do the mode's work on the layers that the optimiser holds, at their group's η.

        β is the group's momentum for `torch.optim.SGD` and 0 for all others. Loss mode works on the gradients that are
        there when `step()` is called, hence not with a closure (ValueError at the step). Once per optimiser: each call
        adds the term anew. Raises ValueError if the optimiser holds none of the target's parameters.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if self._parameters and held.isdisjoint(map(id, self._parameters.values())):
            raise ValueError("the optimiser holds none of the target's parameters; is it another model's?")
        if self.mode == "loss":
            optimizer.register_step_pre_hook(self._before_step)
        else:
            optimizer.register_step_post_hook(self._after_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        if any(callable(value) for value in (*args[1:], *kwargs.values())):  # args[0] is the optimiser
            raise ValueError(
                "mode='loss' misses gradients made by a closure; use mode='proximal' or step() without one"
            )
        for group in optimizer.param_groups:
            self._add_gradient(self._held_by(group))

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        heavy_ball = isinstance(optimizer, torch.optim.SGD)
        for group in optimizer.param_groups:
            self._proximal_step(self._held_by(group), float(group["lr"]), group["momentum"] if heavy_ball else 0.0)

    def _held_by(self, group: dict[str, Any]) -> list[_Layer]:
        held = {id(parameter) for parameter in group["params"]}
        return [layer for layer in self._layers if id(layer.parameter) in held]

    @torch.no_grad()
    def _add_gradient(self, layers: list[_Layer]) -> None:
        if self._strength == 0:
            return
        for layer, mean, variance, origin in self._scan(layers):
            a, b = gradient_terms(mean, variance, layer.target_mean, layer.target_variance, layer.size)
            a, b = self._strength * a, self._strength * b
            if not self._fits(layer, a, b, mean, variance):
                continue
            weights = layer.parameter
            if weights.grad is None:
                weights.grad = torch.zeros_like(weights)
            centred = weights - origin if origin else weights
            weights.grad.add_(centred, alpha=b).add_(a + b * origin)

    @torch.no_grad()
    def _proximal_step(self, layers: list[_Layer], learning_rate: float, momentum: float) -> None:
        if not 0 <= learning_rate < math.inf:
            raise ValueError(f"learning rate must be >= 0 and finite, got {learning_rate!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
        c = learning_rate * self._strength / (1 - momentum)
        if c == 0:
            return
        for layer, mean, variance, origin in self._scan(layers):
            a, b = proximal_terms(mean, variance, layer.target_mean, layer.target_variance, layer.size, c)
            if not self._fits(layer, a, b, mean, variance):
                continue
            weights = layer.parameter
            if origin:
                weights.sub_(origin)
            weights.mul_(b).add_(a + b * origin)

    def _scan(self, layers: list[_Layer]) -> Iterator[tuple[_Layer, float, float, float]]:
        """Mean and variance of each layer that is to be pulled, and the origin from which to write its affine update.

        E[w²] − μ² in the weights' own dtype is quick, and precise while |μ| < σ; then the origin is 0. Other layers are
        measured in float64, and their origin is μ in their dtype, since a + b w would cancel.
        """
        layers = [layer for layer in layers if layer.parameter.requires_grad]
        if not layers:
            return
        flat = [layer.parameter.reshape(-1) for layer in layers]
        # One transfer for all sums, which would each wait for an accelerator.
        sums = torch.stack([w.sum() for w in flat] + [torch.dot(w, w) for w in flat]).tolist()
        for layer, total, squares in zip(layers, sums[: len(layers)], sums[len(layers) :], strict=True):
            mean, origin = total / layer.size, 0.0
            variance = squares / layer.size - mean * mean
            if not (layer.quick and mean * mean < variance < math.inf):
                mean, variance = moments(layer.parameter)
                if not _usable(mean, variance):
                    self._report([layer.name])
                    continue
                origin = torch.tensor(mean, dtype=layer.parameter.dtype).item()
            yield layer, mean, variance, origin

    def _fits(self, layer: _Layer, a: float, b: float, mean: float, variance: float) -> bool:
        """Tell whether a + b w stays finite in the layer's dtype; report the layer if not."""
        largest_weight = abs(mean) + math.sqrt(layer.size * variance)  # no weight is further from the mean
        if abs(a) + abs(b) * max(1.0, largest_weight) <= layer.largest:
            return True
        self._report([layer.name])
        return False

    def _report(self, names: list[str]) -> None:
        fresh = [name for name in names if name not in self._reported]
        self._reported.update(fresh)
        if fresh:
            _LOG.warning("weight scope: degenerate layers are left alone: %s", ", ".join(fresh))


def _usable(mean: float, variance: float) -> bool:
    return math.isfinite(mean) and SMALLEST_VARIANCE <= variance < math.inf
