"""Label skew: every client holds a few stretches of the samples sorted by label."""

import numpy as np
from numpy.typing import ArrayLike

from partitions._indices import IndexArray, check_integer, check_labels, indices_by_owner, shuffle_by_class


def shards(
    labels: ArrayLike, num_clients: int, shards_per_client: int = 2, *, rng: np.random.Generator
) -> list[IndexArray]:
    """Sort the samples by label, cut them into equal shards (± 1) and deal each client so many at random.

    A shard that lies across the border of two classes holds both, so that a client may hold more classes than shards.

    labels: integers [n]; within a label the order is random.
    shards_per_client: shards of each client; num_clients · shards_per_client <= n.
    Returns sorted int64 arrays, one per client, that hold every index exactly once.
    Raises ValueError for arguments out of range.

    Source: the pathological non-IID split of McMahan et al., arXiv 1602.05629, with two shards a client.
    """
    labels = check_labels(labels)
    check_integer("num_clients", num_clients, 1)
    check_integer("shards_per_client", shards_per_client, 1)
    num_shards = num_clients * shards_per_client
    if num_shards > len(labels):
        raise ValueError(
            f"{num_clients} clients with shards_per_client={shards_per_client} need {num_shards} samples, got "
            f"{len(labels)}; use fewer shards or fewer clients"
        )
    client_of_shard = rng.permutation(np.arange(num_shards) % num_clients)
    owner = np.empty(len(labels), np.int64)
    owner[shuffle_by_class(labels, rng)] = client_of_shard[np.arange(len(labels)) * num_shards // len(labels)]
    return indices_by_owner(owner, num_clients)
