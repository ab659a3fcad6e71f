"""What every partitioner needs: checked arguments, and index arrays from owners."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

IndexArray = NDArray[np.int64]


def check_labels(labels: ArrayLike) -> IndexArray:
    """Return the labels as int64 [n], n ≥ 1; ValueError unless they are that many integers in one dimension."""
    array = np.asarray(labels)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"labels must be a non-empty 1-D array of integers, got shape {array.shape} of {array.dtype}; "
            "pass one class index per sample"
        )
    return array.astype(np.int64, copy=False)


def check_integer(name: str, value: int, least: int) -> None:
    """Raise ValueError unless `value` is an integer ≥ `least`."""
    if not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def check_even_split(num_clients: int, num_samples: int) -> None:
    """Raise ValueError unless 1 <= num_clients <= num_samples: an even split leaves no client empty."""
    check_integer("num_clients", num_clients, 1)
    if num_clients > num_samples:
        raise ValueError(f"num_clients must be <= the number of samples, {num_samples}, got {num_clients}")


def check_min_size(min_size: int, max_tries: int, num_clients: int, num_samples: int) -> None:
    """Raise ValueError unless both are integers in range and there are samples enough for every client."""
    check_integer("num_clients", num_clients, 1)
    check_integer("min_size", min_size, 0)
    check_integer("max_tries", max_tries, 1)
    if num_clients * min_size > num_samples:
        raise ValueError(
            f"{num_clients} clients with min_size={min_size} need {num_clients * min_size} samples, got {num_samples}; "
            "use a smaller min_size or fewer clients"
        )


def draw_until_large_enough(draw: Callable[[], IndexArray], min_size: int, max_tries: int, remedy: str) -> IndexArray:
    """Draw counts, int64 [rows, clients], until every client's (a column's sum) is min_size at least.

    remedy: what would help besides a smaller min_size or fewer clients, for the error.
    Raises ValueError if no draw of max_tries was good.
    """
    best = -1
    for _ in range(max_tries):
        counts = draw()
        best = max(best, int(counts.sum(axis=0).min()))
        if best >= min_size:
            return counts
    smaller = "a smaller min_size, " if best > 0 else ""  # one of 0 would but leave clients empty
    raise ValueError(
        f"no draw of {max_tries} gave every client min_size={min_size} samples, the best left the smallest with "
        f"{best}; use {smaller}{remedy} or fewer clients than {counts.shape[1]}"
    )


def deal(labels: IndexArray, counts: IndexArray, rng: np.random.Generator) -> list[IndexArray]:
    """Random samples of each class for each client, as many as counts, int64 [classes, clients], says.

    The classes are the values of labels in ascending order; row c of counts sums to the size of class c.
    """
    num_classes, num_clients = counts.shape
    owner = np.empty(len(labels), np.int64)
    owner[shuffle_by_class(labels, rng)] = np.repeat(np.tile(np.arange(num_clients), num_classes), counts.ravel())
    return indices_by_owner(owner, num_clients)


def shuffle_by_class(labels: IndexArray, rng: np.random.Generator) -> IndexArray:
    """Every sample index once, class after class, at random inside a class: int64 [n]."""
    return np.lexsort((rng.random(len(labels)), labels)).astype(np.int64, copy=False)


def indices_by_owner(owner: IndexArray, num_clients: int) -> list[IndexArray]:
    """One sorted int64 array of sample indices per client, from the client that owns each sample (int64 [n])."""
    by_owner = np.argsort(owner, kind="stable").astype(np.int64, copy=False)  # stable: sorted inside a client
    ends = np.cumsum(np.bincount(owner, minlength=num_clients))
    return np.split(by_owner, ends[:-1])
