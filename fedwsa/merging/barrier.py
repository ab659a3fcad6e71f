"""The straight line between two models, and the barrier that the loss has on it."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from torch import Tensor

from fedwsa.merging.average import average, check_alike

Baseline = Literal["line", "mean"]


def interpolate(a: Mapping[str, Tensor], b: Mapping[str, Tensor], t: float) -> dict[str, Tensor]:
    """The model (1 − t) A + t B, every tensor in its own type; 0 gives A, 1 gives B.

    It is `average` with the weights 1 − t and t: sums in float64, integers rounded, a bool tensor A's for t < 1.

    t: in [0, 1]. Beyond the ends is refused, because a running variance could turn negative there.
    Raises ValueError for another t, and where names, shapes or types differ.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t must lie in [0, 1], got {t!r}")
    check_alike([a, b])
    parts = [(model, share) for model, share in ((a, 1 - t), (b, t)) if share > 0]  # 0 · ∞ is no 0
    return average([model for model, _ in parts], [share for _, share in parts])


class Barrier(NamedTuple):
    """The height, in the unit of the values, and the first t at which the path is so high above its baseline."""

    height: float
    t: float


def barrier(points: Sequence[float], losses: Sequence[float], baseline: Baseline = "line") -> Barrier:
    """How far the loss rises on the path between A and B: max over t of L((1 − t) A + t B) − baseline(t).

    baseline: "line" is (1 − t) L(A) + t L(B), as in Entezari et al., arXiv 2110.06296. It is 0 at both ends, so that
    the barrier is ≥ 0, and 0 where the loss is convex. "mean" is ½ (L(A) + L(B)), as in Frankle et al., arXiv
    1912.05671; that barrier is ≥ ½ |L(A) − L(B)| even without any rise. Both ends count, and nothing is clipped.

    points: t in rising order, the first 0 and the last 1. losses: one a point, in any unit.
    Raises ValueError for other points, another number of losses, losses that are not finite, or an unknown baseline.
    """
    _check(points, losses, baseline)
    places = points if baseline == "line" else [0.5] * len(points)
    below = [(1 - t) * losses[0] + t * losses[-1] for t in places]
    heights = [loss - base for loss, base in zip(losses, below, strict=True)]
    height = max(heights)
    return Barrier(height, points[heights.index(height)])


def accuracy_drop(points: Sequence[float], accuracies: Sequence[float], baseline: Baseline = "line") -> Barrier:
    """How far the accuracy falls on the path: max over t of baseline(t) − accuracy, with the baselines of `barrier`.

    In the unit of the accuracies. Raises ValueError as `barrier` does.
    """
    return barrier(points, [-accuracy for accuracy in accuracies], baseline)


def _check(points: Sequence[float], values: Sequence[float], baseline: str) -> None:
    if baseline not in ("line", "mean"):
        raise ValueError(f'baseline must be "line" or "mean", got {baseline!r}')
    if len(points) < 2 or (points[0], points[-1]) != (0, 1) or not all(s < t for s, t in pairwise(points)):
        raise ValueError(f"points must rise from 0 to 1, both included, got {list(points)}")
    if len(values) != len(points):
        raise ValueError(f"one value a point is needed, got {len(values)} for {len(points)} points")
    if odd := [t for t, value in zip(points, values, strict=True) if not math.isfinite(value)]:
        raise ValueError(f"losses and accuracies must be finite, one is not at t = {', '.join(f'{t:g}' for t in odd)}")
