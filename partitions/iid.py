"""Every client's samples are a uniform draw from all."""

import numpy as np
from numpy.typing import ArrayLike

from partitions._indices import IndexArray, check_even_split, check_labels, indices_by_owner


def iid(labels: ArrayLike, num_clients: int, *, rng: np.random.Generator) -> list[IndexArray]:
    """Deal the shuffled samples out in turn, so that clients' sizes differ by one at most.

    labels: integers [n]; only their number matters.
    Returns sorted int64 arrays, one per client, that hold every index exactly once.
    Raises ValueError unless 1 <= num_clients <= n: an even split leaves no client empty.
    """
    num_samples = len(check_labels(labels))
    check_even_split(num_clients, num_samples)
    return indices_by_owner(rng.permutation(np.arange(num_samples) % num_clients), num_clients)
