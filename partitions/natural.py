"""The split that the data come with: by writer, user or site."""

import numpy as np
from numpy.typing import ArrayLike

from partitions._indices import IndexArray, check_integer, check_labels, indices_by_owner


def natural(labels: ArrayLike, num_clients: int, groups: ArrayLike, *, rng: np.random.Generator) -> list[IndexArray]:
    """Give every client whole groups.

    With as many clients as groups, client i holds the i-th group in ascending order of their numbers. With fewer, the
    groups are dealt at random, so that the clients' numbers of groups differ by one at most; their sizes need not.

    labels: integers [n]; only their number matters.
    groups: integers [n], the group of each sample; the groups are the values that occur.
    Returns sorted int64 arrays, one per client, that hold every index exactly once.
    Raises ValueError unless 1 <= num_clients <= number of groups and there is one group number a sample.
    """
    num_samples = len(check_labels(labels))
    check_integer("num_clients", num_clients, 1)
    column = np.asarray(groups)
    if column.shape != (num_samples,) or not np.issubdtype(column.dtype, np.integer):
        raise ValueError(f"groups must be {num_samples} integers, got shape {column.shape} of {column.dtype}")
    values, group = np.unique(column, return_inverse=True)
    if num_clients > len(values):
        raise ValueError(f"num_clients must be <= the number of groups, {len(values)}, got {num_clients}")
    client_of_group = np.arange(len(values)) % num_clients
    if num_clients < len(values):
        client_of_group = rng.permutation(client_of_group)
    return indices_by_owner(client_of_group[group], num_clients)
