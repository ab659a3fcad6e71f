"""Label skew: every class is shared out by its own Dirichlet draw over the clients."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from partitions._indices import IndexArray, check_integer, check_labels, indices_by_owner


def dirichlet(
    labels: ArrayLike,
    num_clients: int,
    alpha: float,
    *,
    min_size: int = 0,
    rng: np.random.Generator,
    max_tries: int = 1000,
) -> list[IndexArray]:
    """Share out each class by proportions drawn from Dir(α, …, α) over the clients.

    Of class c with n_c samples, in random order, client k gets those from floor(n_c · P_{k−1}) to floor(n_c · P_k),
    where P are the cumulative proportions; so every sample lands exactly once. Small α: few clients hold a class;
    α → ∞: every class is split evenly.

    labels: integers [n]; the classes are the values that occur.
    alpha: α, the concentration, finite and > 0. Every such float works, however small.
    min_size: samples that every client must have. Proportions are drawn again until they have, `max_tries` times at
        most; this favours even splits, so the proportions are no longer exactly Dirichlet. With 0, the default,
        clients may be empty.
    Returns sorted int64 arrays, one per client, that hold every index exactly once.
    Raises ValueError for arguments out of range (num_clients · min_size > n too), and if no draw reached min_size.

    Source: Dirichlet label skew of Hsu et al., arXiv 1909.06335, in the form of Li et al., arXiv 2102.02079 (per class
    over clients; Hsu et al. draw per client over classes). Unlike the code of the latter, a client that already has
    its even share goes on receiving, so that the proportions are Dirichlet.
    """
    labels = check_labels(labels)
    check_integer("num_clients", num_clients, 1)
    check_integer("min_size", min_size, 0)
    check_integer("max_tries", max_tries, 1)
    if not 0 < alpha < np.inf:
        raise ValueError(f"alpha must be finite and > 0, got {alpha!r}; for an even split use partitions.iid")
    if num_clients * min_size > len(labels):
        raise ValueError(
            f"{num_clients} clients with min_size={min_size} need {num_clients * min_size} samples, got {len(labels)}; "
            "use a smaller min_size or fewer clients"
        )

    class_sizes = np.unique(labels, return_counts=True)[1]
    smallest = -1
    for _ in range(max_tries):
        counts = share_out(class_sizes, draw_proportions(len(class_sizes), num_clients, alpha, rng))
        smallest = max(smallest, int(counts.sum(axis=0).min()))
        if smallest >= min_size:
            break
    else:
        raise ValueError(
            f"no draw of {max_tries} gave every client min_size={min_size} samples, the best left the smallest with "
            f"{smallest}; use a smaller min_size, a larger alpha than {alpha} or fewer clients than {num_clients}"
        )

    owner = np.empty(len(labels), np.int64)
    shuffled_by_class = np.lexsort((rng.random(len(labels)), labels))
    owner[shuffled_by_class] = np.repeat(np.tile(np.arange(num_clients), len(class_sizes)), counts.ravel())
    return indices_by_owner(owner, num_clients)


def draw_proportions(num_draws: int, num_clients: int, alpha: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw from Dir(α, …, α): float64 [num_draws, num_clients]; rows sum to 1.

    Gamma(α) variates, normalised, but by their logarithms, ln Gamma(α) = ln Gamma(α+1) + ln(U)/α: the variates
    themselves are all zero in float64 for small α, and their proportions then NaN.
    """
    shape = (num_draws, num_clients)
    log_uniform = -rng.standard_exponential(shape)
    exponent = max(alpha, 1e-300)  # below, 1/α overflows; far above, a draw is already one-hot to the last bit
    log_gamma = np.log(rng.standard_gamma(alpha + 1.0, shape)) + log_uniform / exponent
    gamma = np.exp(log_gamma - log_gamma.max(axis=1, keepdims=True))
    proportions: NDArray[np.float64] = gamma / gamma.sum(axis=1, keepdims=True)
    return proportions


def share_out(class_sizes: IndexArray, proportions: NDArray[np.float64]) -> IndexArray:
    """Samples of each class for each client: int64 [classes, clients]; row c sums to class_sizes[c].

    class_sizes: int64 [classes]. proportions: float64 [classes, clients], rows sum to 1 but for rounding.
    """
    cumulative = np.cumsum(proportions, axis=1)
    cumulative /= cumulative[:, -1:]  # ends in 1 exactly, so that no sample is left over
    ends = np.floor(cumulative * class_sizes[:, None]).astype(np.int64)
    return np.diff(ends, axis=1, prepend=0)
