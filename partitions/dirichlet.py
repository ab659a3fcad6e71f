"""Label skew: every class is shared out by its own Dirichlet draw over the clients."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from partitions._filling import fill
from partitions._indices import (
    IndexArray,
    check_even_split,
    check_labels,
    check_min_size,
    deal,
    draw_until_large_enough,
)


def dirichlet(
    labels: ArrayLike,
    num_clients: int,
    alpha: float,
    *,
    min_size: int = 0,
    balanced: bool = False,
    rng: np.random.Generator,
    max_tries: int = 1000,
) -> list[IndexArray]:
    """Share out each class by proportions drawn from Dir(α, …, α) over the clients.

    Of class c with n_c samples, in random order, client k gets those from floor(n_c · P_{k−1}) to floor(n_c · P_k),
    where P are the cumulative proportions; so every sample lands exactly once, and the last client gets what rounding
    leaves of each class, one sample at least of nearly all. Small α: few clients hold a class; α → ∞: every class is
    split evenly.

    labels: integers [n]; the classes are the values that occur.
    alpha: α, the concentration, finite and > 0. Every such float works, however small.
    min_size: samples that every client must have. Proportions are drawn again until they have, `max_tries` times at
        most; this favours even splits, so the proportions are no longer exactly Dirichlet. With 0, the default,
        clients may be empty.
    balanced: equal sizes (± 1) instead. Proportions p_ck are drawn once, and the clients, in a random order, draw their
        samples without replacement from those that are left, client k one of class c with a probability in the
        proportion of p_ck. No sample is left over; the last clients' label distributions are further from n_c · p_ck.
    Returns sorted int64 arrays, one per client, that hold every index exactly once.
    Raises ValueError for arguments out of range (num_clients · min_size > n too, or balanced and num_clients > n), and
    if no draw reached min_size.

    Source: Dirichlet label skew of Hsu et al., arXiv 1909.06335, in the form of Li et al., arXiv 2102.02079 (per class
    over clients; Hsu et al. draw per client over classes). Unlike the code of the latter, a client that already has
    its even share goes on receiving, so that the proportions are Dirichlet. `balanced` is ours.
    """
    labels = check_labels(labels)
    check_min_size(min_size, max_tries, num_clients, len(labels))
    check_alpha(alpha)
    class_sizes = np.unique(labels, return_counts=True)[1]
    if balanced:
        check_even_split(num_clients, len(labels))
        return deal(labels, fill(class_sizes, log_proportions(len(class_sizes), num_clients, alpha, rng).T, rng), rng)
    counts = draw_until_large_enough(
        lambda: share_out(class_sizes, draw_proportions(len(class_sizes), num_clients, alpha, rng)),
        min_size,
        max_tries,
        f"a larger alpha than {alpha}",
    )
    return deal(labels, counts, rng)


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless alpha is finite and > 0."""
    if not 0 < alpha < np.inf:
        raise ValueError(f"alpha must be finite and > 0, got {alpha!r}; for an even split use partitions.iid")


def draw_proportions(num_draws: int, num_clients: int, alpha: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw from Dir(α, …, α): float64 [num_draws, num_clients]; rows sum to 1."""
    log_gamma = draw_log_gamma((num_draws, num_clients), alpha, rng)
    gamma = np.exp(log_gamma - log_gamma.max(axis=1, keepdims=True))
    proportions: NDArray[np.float64] = gamma / gamma.sum(axis=1, keepdims=True)
    return proportions


def log_proportions(
    num_draws: int, num_parts: int, alpha: float | NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Logarithms of draws from Dir(α): float64 [num_draws, num_parts], all finite, however small α.

    alpha: one for all parts, or float64 [num_parts], each > 0 or so small that it has become 0.
    """
    log_gamma = draw_log_gamma((num_draws, num_parts), alpha, rng)
    logarithms: NDArray[np.float64] = log_gamma - log_gamma.max(axis=1, keepdims=True)
    logarithms -= np.log(np.exp(logarithms).sum(axis=1, keepdims=True))
    return logarithms


def draw_log_gamma(
    shape: tuple[int, int], alpha: float | NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Logarithms of Gamma(α) variates; a row of the variates, normalised, is a draw from Dir(α).

    ln Gamma(α) = ln Gamma(α+1) + ln(U)/α: the variates themselves are all zero in float64 for small α, and their
    proportions then NaN.
    """
    log_uniform = -rng.standard_exponential(shape)
    exponent = np.maximum(alpha, 1e-300)  # below, 1/α overflows; far above, a draw is already one-hot to the last bit
    log_gamma: NDArray[np.float64] = np.log(rng.standard_gamma(alpha + 1.0, shape)) + log_uniform / exponent
    return log_gamma


def share_out(class_sizes: IndexArray, proportions: NDArray[np.float64]) -> IndexArray:
    """Samples of each class for each client: int64 [classes, clients]; row c sums to class_sizes[c].

    class_sizes: int64 [classes]. proportions: float64 [classes, clients], rows sum to 1 but for rounding.
    """
    cumulative = np.cumsum(proportions, axis=1)
    cumulative /= cumulative[:, -1:]  # ends in 1 exactly, so that no sample is left over
    ends = np.floor(cumulative * class_sizes[:, None]).astype(np.int64)
    return np.diff(ends, axis=1, prepend=0)
