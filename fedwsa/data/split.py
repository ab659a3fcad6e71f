"""Stratified splits."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def server_split(labels: ArrayLike, size: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hold out `size` samples for the server, drawn at random within each class: (server, client) indices.

    labels: integers [n]. Each class gives its share size · n_c / n, rounded down or up (the largest remainders up) so
    that the total is `size`. Both arrays are sorted int64; together they hold every index exactly once.
    Raises ValueError unless 0 <= size < n: the clients need a sample at least.
    """
    labels = np.asarray(labels)
    if not 0 <= size < len(labels):
        raise ValueError(f"the server's split must have 0 <= size < {len(labels)} samples (all there are), got {size}")
    _, class_of, class_sizes = np.unique(labels, return_inverse=True, return_counts=True)
    quota, remainder = np.divmod(class_sizes * size, len(labels))
    quota[np.argsort(-remainder, kind="stable")[: size - quota.sum()]] += 1

    by_class = np.lexsort((rng.random(len(labels)), class_of))
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(class_sizes) - class_sizes, class_sizes)
    held_out = np.zeros(len(labels), bool)
    held_out[by_class[rank_in_class < np.repeat(quota, class_sizes)]] = True
    return np.flatnonzero(held_out), np.flatnonzero(~held_out)
