"""Several models merged in stages, two at a time."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fedwsa.merging.average import check_alike, shares_of

PairMerge = Callable[[dict[str, Tensor], dict[str, Tensor], float], dict[str, Tensor]]
"""merge(a, b, share): one model of two; share is A's part of the weight of both, in (0, 1)."""


def merge_in_stages(
    states: Sequence[Mapping[str, Tensor]], merge: PairMerge, weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Merge neighbours in pairs, the results in pairs, and so on until one model is left.

    Of an odd number the last goes on to the next stage as it is. With a merge that only averages, the result is the
    average of all, up to rounding; what a merge does besides (alignment, a scope, training) is done in every stage.

    merge: gets copies and the share of the first by its accumulated weight. weights: > 0 and finite; None: all alike.
    Raises ValueError for no models, unlike models, or other weights.
    """
    if not states:
        raise ValueError("merge_in_stages needs at least one model, got none")
    check_alike(states)
    shares = shares_of([1.0] * len(states) if weights is None else weights, len(states))
    if 0 in shares:
        raise ValueError(f"weights must be > 0 here, got {list(weights or [])}; leave the model out")
    stage = [
        ({name: tensor.detach().clone() for name, tensor in state.items()}, share)
        for state, share in zip(states, shares, strict=True)
    ]
    while len(stage) > 1:
        merged = [
            (merge(a, b, first / (first + second)), first + second)
            for (a, first), (b, second) in zip(stage[::2], stage[1::2], strict=False)
        ]
        stage = merged + stage[2 * len(merged) :]
    return stage[0][0]
