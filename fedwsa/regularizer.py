"""Weight scope alignment inside any PyTorch training loop, without autograd.

Gradient and proximal map of the divergence are affine in a layer's weights (`fedwsa.divergence`), so that a step costs
two sums and one affine update per layer (`fedwsa.aligned`).
"""

import logging
import math
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from fedwsa.aligned import UNITS, Held, Units
from fedwsa.divergence import divergence_of
from fedwsa.granularity import layer_of, units
from fedwsa.scope import WeightScope, degenerate, divergence, gradient_coefficients, is_layer, measure
from fedwsa.stability import Descent, stable_strength, warning

_LOG = logging.getLogger("fedwsa")

SAFE = 0.5
"""Share of the stability bound that a relative strength may reach, since the task's curvature comes on top. Ours."""


Method = TypeVar("Method", bound=Callable[..., None])


def _untraced(method: Method) -> Method:
    """A method that `torch.compile` leaves alone, or it would trace Numba's compiler; it is not imported for that."""
    disabled: Any = None

    @wraps(method)
    def call(*args: Any) -> None:
        nonlocal disabled
        if disabled is None and "torch._dynamo" in sys.modules:
            disabled = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
        (disabled or method)(*args)

    return cast("Method", call)


class WeightScopeRegularizer:
    """Pulls each layer of a model towards a target scope while it trains.

    The term is λ R with R = Σ_l D(layer l ‖ target), or the mean over the target's layers with reduction="mean".
    mode="loss" adds its gradient to `.grad` before the optimiser's step. mode="proximal" applies its proximal map to
    the weights after the step; it is stable for every λ, and Adam does not rescale it.

    Layers that the target does not name are free. A layer is left alone while it is frozen (`requires_grad` false) or
    degenerate: constant, fewer than two elements, not finite, or too narrow for its dtype, here or in the target.
    Degenerate layers are reported once to the logger "fedwsa". strength=0 changes no bit.

    named_parameters: as `model.named_parameters()` gives them. target: see `fedwsa.scope.measure`, of the same
    granularity. strength: λ >= 0. divergence: D, see `fedwsa.divergence`; mode="proximal" has none for "reverse-kl".
    granularity: what is said here of layers holds for "layer"s, "channel"s, or for all layers of `named_parameters` as
    the one unit "model" (`fedwsa.granularity`), of which those that train are a part; so should they be of its target.
    Raises ValueError for a λ that is negative or not finite, an unknown mode, reduction, divergence or granularity, or
    a target layer that is not a floating-point parameter.

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
        divergence: str = "forward-kl",
        granularity: str = "layer",
    ) -> None:
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be >= 0 and finite, got {strength!r}")
        if mode not in ("loss", "proximal"):
            raise ValueError(f"mode must be 'loss' or 'proximal', got {mode!r}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        self.target = target
        self.mode = mode
        self.granularity = granularity
        self._divergence = divergence_of(divergence, mode)
        self._parameters = _named_by(target, dict(named_parameters), granularity)
        self._reduction = reduction
        self._share = 1 / max(1, len(target.names)) if reduction == "mean" else 1.0
        self._strength = float(strength) * self._share  # λ per layer
        self._reported: set[str] = set()
        self._units: Units = UNITS[granularity](self._parameters, target, (divergence, mode), self._report)

    @property
    def strength(self) -> float:
        """λ, as it was given or `fix_strength` has set it."""
        return self._strength / self._share

    def penalty(self) -> float:
        """R, without λ, in the divergence's unit; for logs. Degenerate units count 0, frozen layers as others do.

        But for the unit "model", which is of the layers that train.
        """
        return divergence(self._scope(), self.target, self._divergence.name).sum().item() * self._share

    def add_gradient(self) -> None:
        """Loss mode: add λ ∂R/∂w to `.grad`, as the autograd of λ R would. Does nothing in proximal mode."""
        if self.mode == "loss":
            self._add_gradient(None)

    def descend(self, learning_rate: float) -> None:
        """Loss mode: w ← w − η λ ∂R/∂w, what `add_gradient` comes to under SGD without momentum, in half the time.

        To be called after the task's gradient is there and before the optimiser's step. learning_rate: η >= 0, else
        ValueError. Does nothing in proximal mode.
        """
        _check_rate(learning_rate)
        strength = self._strength * float(learning_rate)
        if self.mode == "loss" and strength:
            self._pull(-strength, None)

    @_untraced
    def _pull(self, s: float, held: Held) -> None:
        self._units.pull(s, held, into_gradient=False)

    def one_by_one(self, learning_rate: float) -> Callable[[Tensor, Tensor], None] | None:
        """A function of a parameter that trains and its gradient: makes its whole step of plain SGD.

        Before it in loss mode, or after it in proximal mode, a layer of the target gets what `descend` or
        `proximal_step` would give it. To be called under `torch.no_grad()`. None for the unit "model", whose terms need
        all weights at the same time. learning_rate: η >= 0, else ValueError. A λ that is fixed later is not noticed.
        """
        _check_rate(learning_rate)
        if self.granularity == "model":
            return None
        rate, strength, loss = float(learning_rate), self._strength * float(learning_rate), self.mode == "loss"
        layers = {id(parameter): {id(parameter)} for parameter in self._parameters.values()} if strength else {}

        def step(parameter: Tensor, gradient: Tensor) -> None:
            held = layers.get(id(parameter))
            if held and loss:
                self._pull(-strength, held)
            parameter.add_(gradient, alpha=-rate)
            if held and not loss:
                self._pull(strength, held)

        return step

    def proximal_step(self, learning_rate: float, momentum: float = 0.0) -> None:
        """Proximal mode: replace the weights by the minimiser of ½‖w′ − w‖² + c R(w′), c = η λ/(1 − β).

        learning_rate: η >= 0; momentum: 0 <= β < 1, the optimiser's heavy-ball factor, 0 without. Else ValueError.
        Does nothing in loss mode.
        """
        if self.mode == "proximal":
            self._proximal_step(None, learning_rate, momentum)

    def fix_strength(
        self, share: float, learning_rate: float, momentum: float = 0.0, *, nesterov: bool = False
    ) -> None:
        """Set λ such that ‖λ ∂R/∂w‖ = share · ‖∂task/∂w‖ at this point, both over the target's layers that train.

        The task's gradient is what stands in `.grad` now. λ is at most SAFE times the bound of `fedwsa.stability` for
        SGD with this step, in either mode; where ∂R/∂w = 0, or nearly, it is that. It is 0 where there is nothing to
        pull, or the task's gradient is not finite. Raises ValueError for a share that is negative or not finite. Ours.
        """
        if not 0 <= share < math.inf:
            raise ValueError(f"share must be >= 0 and finite, got {share!r}")
        descent = Descent(learning_rate, momentum, nesterov)
        cap = SAFE * stable_strength(
            self.target, self._pulled(), descent, reduction=self._reduction, divergence=self._divergence.name
        )
        gradients = [each.grad for each in self._parameters.values() if each.requires_grad and each.grad is not None]
        task = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
        term = self._share * self._gradient_norm()
        strength = min(share * task / term, cap) if term else cap
        self._strength = self._share * strength if share and math.isfinite(task) and math.isfinite(strength) else 0.0

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Have every `optimizer.step()` do the mode's work on the layers that the optimiser holds, at their group's η.

        β is the group's momentum for `torch.optim.SGD` and 0 for all others. Loss mode works on the gradients that are
        there when `step()` is called, hence after clipping, once for all that was accumulated, and neither with a
        closure nor with sparse gradients (ValueError at the step); gradients that a GradScaler has scaled must be
        unscaled by then, as its own `step` does but for optimisers with fused=True. Where loss mode under SGD is beyond
        the bound of `fedwsa.stability` the logger "fedwsa" is told. Once per optimiser: each call adds the term anew.
        Raises ValueError if the optimiser holds none of the target's parameters.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if self._parameters and held.isdisjoint(map(id, self._parameters.values())):
            raise ValueError("the optimiser holds none of the target's parameters; is it another model's?")
        if self.mode == "loss":
            self._warn(optimizer)
            optimizer.register_step_pre_hook(self._before_step)
        else:
            optimizer.register_step_post_hook(self._after_step)

    def _warn(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.SGD):
            return
        for group in optimizer.param_groups:
            held = self._held_by(group)
            layers = {name for name, weights in self._parameters.items() if id(weights) in held}
            whole = self.granularity == "model" and layers
            sizes = {n: size for n, size in self._pulled().items() if whole or layer_of(n, self.granularity) in layers}
            descent = Descent(float(group["lr"]), group["momentum"], group["nesterov"])
            kind = self._divergence.name
            if line := warning(
                self.target, sizes, descent, strength=self.strength, reduction=self._reduction, divergence=kind
            ):
                _LOG.warning(line)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        if any(callable(value) for value in (*args[1:], *kwargs.values())):  # args[0] is the optimiser
            raise ValueError(
                "mode='loss' misses gradients made by a closure; use mode='proximal' or step() without one"
            )
        for sign in (1.0, -1.0):  # `maximize` climbs, and would climb the term too
            groups = [group for group in optimizer.param_groups if bool(group.get("maximize")) == (sign < 0)]
            if held := {id(parameter) for group in groups for parameter in group["params"]}:
                self._add_gradient(held, sign)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        heavy_ball = isinstance(optimizer, torch.optim.SGD)
        rates: dict[tuple[float, float], set[int]] = {}
        for group in optimizer.param_groups:
            if held := self._held_by(group):
                rate = float(group["lr"]), float(group["momentum"]) if heavy_ball else 0.0
                rates.setdefault(rate, set()).update(held)
        if self.granularity == "model" and len(rates) > 1:
            raise ValueError(
                "granularity 'model' in mode 'proximal' needs one learning rate and momentum for all of its layers, "
                f"got {sorted(rates)}"
            )
        for (learning_rate, momentum), held in rates.items():
            self._proximal_step(held, learning_rate, momentum)

    def _held_by(self, group: dict[str, Any]) -> set[int]:
        return {id(parameter) for parameter in group["params"]} & {id(each) for each in self._parameters.values()}

    @_untraced
    def _add_gradient(self, held: Held, sign: float = 1.0) -> None:
        if self._strength:
            self._units.pull(sign * self._strength, held, into_gradient=True)

    @_untraced
    def _proximal_step(self, held: Held, learning_rate: float, momentum: float) -> None:
        _check_rate(learning_rate)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
        if c := float(learning_rate) * self._strength / (1 - momentum):
            self._units.pull(c, held, into_gradient=False)

    def _counted(self) -> dict[str, Tensor]:
        """The parameters that the units consist of."""
        if self.granularity != "model":
            return self._parameters
        return {name: tensor for name, tensor in self._parameters.items() if tensor.requires_grad} or self._parameters

    @property
    def _sizes(self) -> dict[str, int]:
        return units({name: tensor.shape for name, tensor in self._counted().items()}, self.granularity)

    def _pulled(self) -> dict[str, int]:
        """Sizes of the units that train."""
        frozen = {name for name, tensor in self._parameters.items() if not tensor.requires_grad}
        return {name: n for name, n in self._sizes.items() if layer_of(name, self.granularity) not in frozen}

    def _scope(self) -> WeightScope:
        return measure(self._counted(), lambda name, tensor: True, self.granularity)

    def _gradient_norm(self) -> float:
        """‖∂ΣD/∂w‖ over the layers that train: Σ (a + b w)² of a unit is n ((a + b μ)² + b² σ²)."""
        scope, target = self._scope(), self.target
        # From means of 0 on a + b μ is a, and nothing cancels.
        centred = WeightScope(scope.names, torch.zeros_like(scope.means), scope.variances)
        shifted = WeightScope(target.names, target.means - scope.means, target.variances)
        sizes = torch.tensor(list(self._sizes.values()), dtype=torch.float64)
        a, b = gradient_coefficients(centred, shifted, list(self._sizes.values()), self._divergence.name)
        squares = sizes * (a.square() + b.square() * scope.variances)
        pulled = self._pulled()
        still = torch.tensor([name not in pulled for name in scope.names], dtype=torch.bool)
        return math.sqrt(squares.masked_fill(still | degenerate(centred, shifted), 0).sum().item())

    def _report(self, names: list[str]) -> None:
        fresh = [name for name in names if name not in self._reported]
        self._reported.update(fresh)
        if fresh:
            _LOG.warning("weight scope: degenerate layers are left alone: %s", ", ".join(fresh))


def _check_rate(learning_rate: float) -> None:
    if not 0 <= learning_rate < math.inf:
        raise ValueError(f"learning rate must be >= 0 and finite, got {learning_rate!r}")


def _named_by(target: WeightScope, parameters: dict[str, Tensor], granularity: str) -> dict[str, Tensor]:
    """The floating-point parameters whose units the target names; ValueError if it names others, or not all of one."""
    able = {name: tensor for name, tensor in parameters.items() if tensor.is_floating_point()}
    if granularity == "model":
        named = {name: tensor for name, tensor in able.items() if is_layer(name, tensor)}
    else:
        names = dict.fromkeys(layer_of(unit, granularity) for unit in target.names)
        if odd := [name for name in names if name not in able]:
            raise ValueError(
                f"the target must name floating-point parameters of the model, got {odd}; "
                "measure it on dict(model.named_parameters()), which has no buffers and tied weights once"
            )
        named = {name: able[name] for name in names}
    if not target.names:
        return {}
    expected = tuple(units({name: tensor.shape for name, tensor in named.items()}, granularity))
    if expected != target.names:
        odd = sorted(set(expected) ^ set(target.names))[:5]
        raise ValueError(f"the target must name the units of granularity {granularity!r} in order, odd are {odd}")
    return named
