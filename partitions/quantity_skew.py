"""Quantity skew: clients hold unequally many samples of the same label distribution."""

import numpy as np
from numpy.typing import ArrayLike

from partitions._indices import IndexArray, check_labels, check_min_size, draw_until_large_enough, indices_by_owner
from partitions.dirichlet import draw_proportions, share_out


def quantity_skew(
    labels: ArrayLike,
    num_clients: int,
    beta: float = 0.5,
    *,
    size_sigma: float = 0.0,
    min_size: int = 0,
    rng: np.random.Generator,
    max_tries: int = 1000,
) -> list[IndexArray]:
    """Deal the shuffled samples out in parts whose sizes are drawn from Dir(β, …, β), or are log-normal.

    labels: integers [n]; only their number matters.
    beta: β, finite and > 0; the smaller, the more unequal. Not used if size_sigma > 0.
    size_sigma: σ ≥ 0, finite; if > 0, the sizes are in the proportion of exp(σ z), z standard normal, instead.
    min_size: samples that every client must have; sizes are drawn again as `dirichlet` does. With 0, the default,
        clients may be empty.
    Returns sorted int64 arrays, one per client, that hold every index exactly once.
    Raises ValueError for arguments out of range (num_clients · min_size > n too), and if no draw reached min_size.

    Source: quantity skew of Li et al., arXiv 2102.02079; the log-normal alternative is ours.
    """
    num_samples = len(check_labels(labels))
    check_min_size(min_size, max_tries, num_clients, num_samples)
    if not 0 < beta < np.inf:
        raise ValueError(f"beta must be finite and > 0, got {beta!r}; for equal sizes use partitions.iid")
    if not 0 <= size_sigma < np.inf:
        raise ValueError(f"size_sigma must be finite and >= 0, got {size_sigma!r}; with 0 the sizes are Dirichlet")

    def draw_sizes() -> IndexArray:
        if size_sigma == 0:
            return share_out(np.array([num_samples]), draw_proportions(1, num_clients, beta, rng))
        log_sizes = size_sigma * rng.standard_normal((1, num_clients))
        proportions = np.exp(log_sizes - log_sizes.max())  # share_out normalises
        return share_out(np.array([num_samples]), proportions)

    remedy = f"a smaller size_sigma than {size_sigma}" if size_sigma else f"a larger beta than {beta}"
    sizes = draw_until_large_enough(draw_sizes, min_size, max_tries, remedy)[0]
    return indices_by_owner(rng.permutation(np.repeat(np.arange(num_clients), sizes)), num_clients)
