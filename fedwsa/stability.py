"""For which λ loss mode settles.

Gradient descent with step η settles on a quadratic of curvature h iff ηh < 2; with heavy-ball momentum β, as in
PyTorch's SGD, iff ηh < 2(1 + β); with Nesterov's, in PyTorch's form, iff ηh < 2(1 + β)/(1 + 2β). At the target the
largest curvature of a forward or reverse KL is 2/(nσ_t²), in the direction of σ; that of the 2-Wasserstein term is 2/n.
So λ is bounded by the layer with the smallest nσ_t². The task's own curvature comes on top, and Adam has no such bound.
Proximal mode is stable for every λ.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedwsa.divergence import divergence_of, usable
from fedwsa.scope import WeightScope


@dataclass(frozen=True, slots=True)
class Descent:
    """SGD's step: learning rate η >= 0, momentum 0 <= β < 1, and whether it is Nesterov's."""

    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False

    def bound(self) -> float:
        """Below it η times half the curvature must stay."""
        return (1 + self.momentum) / (1 + 2 * self.momentum) if self.nesterov else 1 + self.momentum


def stable_strength(
    target: WeightScope,
    sizes: Mapping[str, int],
    descent: Descent,
    *,
    reduction: str = "sum",
    divergence: str = "forward-kl",
) -> float:
    """λ below which loss mode settles near the target; infinite where nothing bounds it.

    sizes: n of each of the target's units that counts. reduction: `mean` divides λ by the number of the target's units.
    divergence: a name of `fedwsa.divergence`.
    """
    steepest, _ = _steepest(target, sizes, divergence)
    per_strength = descent.learning_rate * steepest
    if per_strength == 0:
        return math.inf
    return descent.bound() / per_strength * (len(target.names) if reduction == "mean" else 1)


def warning(
    target: WeightScope,
    sizes: Mapping[str, int],
    descent: Descent,
    *,
    strength: float,
    reduction: str = "sum",
    divergence: str = "forward-kl",
) -> str | None:
    """What to tell whoever trains in loss mode with this λ = strength, in one line; None if it is below the bound."""
    allowed = stable_strength(target, sizes, descent, reduction=reduction, divergence=divergence)
    if strength < allowed:
        return None
    steepest, unit = _steepest(target, sizes, divergence)
    row, beta = divergence_of(divergence), descent.momentum
    strength_of_one = strength / (len(target.names) if reduction == "mean" else 1)
    ratio = descent.learning_rate * strength_of_one * steepest
    bound = f"(1 + β)/(1 + 2β) = {descent.bound():.4g}" if descent.nesterov else f"1 + β = {descent.bound():.4g}"
    remedy = f"take a strength < {allowed:.4g}" + (", or mode proximal, stable for every λ" if row.proximal else "")
    return (
        f"weight scope: in loss mode ηλ/({row.curved}) = {ratio:.4g} of {unit} is not below {bound} "
        f"(η = {descent.learning_rate:g}, β = {beta:g}, λ = {strength_of_one:.4g} a unit, n = {sizes[unit]}, "
        f"σ_t = {target.variances[target.names.index(unit)].item() ** 0.5:.4g}), so that it does not settle; {remedy}"
    )


def _steepest(target: WeightScope, sizes: Mapping[str, int], divergence: str) -> tuple[float, str]:
    """Half the largest curvature and the unit that has it; (0, "") where no unit is usable."""
    of = divergence_of(divergence).curvature
    numbers = zip(target.names, target.means.tolist(), target.variances.tolist(), strict=True)
    curvatures = [(of(s, sizes[name]), name) for name, m, s in numbers if usable(m, s) and sizes.get(name, 0) > 1]
    return max(curvatures, default=(0.0, ""), key=lambda pair: pair[0])
