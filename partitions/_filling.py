"""Equally many samples for every client, of classes that it prefers."""

import numpy as np
from numpy.typing import NDArray

from partitions._indices import IndexArray


def fill(class_sizes: IndexArray, log_weights: NDArray[np.float64], rng: np.random.Generator) -> IndexArray:
    """Let the clients, in a random order, draw equally many samples (± 1) from those that are left.

    Client k draws without replacement, one after another, each time a sample of class c with a probability in the
    proportion of its weight w_kc. So equal weights make an even draw of all samples, as `iid` does; and who comes late
    may find that the others have left little of what it prefers.

    Drawn all at once for a client: with a waiting time of Exp(1) / w for each sample, the first to arrive are such a
    draw. Of a class with L samples left, the time between the j-th and the next arrival is Exp(1) / ((L − j) w).

    class_sizes: int64 [classes]. log_weights: float64 [clients, classes], finite: ln w but for a constant a row.
    Returns the samples of each class for each client: int64 [classes, clients]; row c sums to class_sizes[c].
    """
    num_clients, total = len(log_weights), int(class_sizes.sum())
    sizes = total // num_clients + (np.arange(num_clients) < total % num_clients)
    left = class_sizes.copy()
    counts = np.zeros((len(class_sizes), num_clients), np.int64)
    with np.errstate(divide="ignore"):  # what is not there never arrives: Exp(1) / 0
        for client in rng.permutation(num_clients):
            most = min(sizes[client], left.max())  # of one class
            waiting = np.maximum(left[:, None] - np.arange(most), 0)
            arrival = np.cumsum(rng.standard_exponential(waiting.shape) / waiting, axis=1)
            log_arrival = np.log(arrival) - log_weights[client][:, None]
            first = np.argpartition(log_arrival, sizes[client] - 1, axis=None)[: sizes[client]]
            counts[:, client] = np.bincount(first // most, minlength=len(left))
            left -= counts[:, client]
    return counts
