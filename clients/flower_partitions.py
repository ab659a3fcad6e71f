"""Any partitioner of Flower's package `flwr-datasets` as one of ours. The package is the user's to install."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def indices_of(partitioner: Any, **columns: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Who holds which sample by a partitioner of flwr-datasets: one int64 array a client, in its order.

    It is given a data set of these columns, so one of them has the name that the partitioner's `partition_by` says.
    In a module of your own, for `--partitioner my_split:linear` (a config's values come as arguments, as for ours):

        def linear(labels, num_clients, *, rng):
            return indices_of(LinearPartitioner(num_clients), label=labels)

    partitioner: without a data set yet. Its random numbers are its own: give it a seed drawn from `rng`.
    columns: int64 [n] each, at least one.
    Raises what the partitioner does.
    """
    from datasets import Dataset  # comes with flwr-datasets

    size = len(next(iter(columns.values())))
    partitioner.dataset = Dataset.from_dict({**columns, "_index": np.arange(size)})
    return [
        np.asarray(partitioner.load_partition(client)["_index"], np.int64)
        for client in range(partitioner.num_partitions)
    ]
