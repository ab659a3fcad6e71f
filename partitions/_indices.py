"""What every partitioner needs: checked arguments, and index arrays from owners."""

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


def indices_by_owner(owner: IndexArray, num_clients: int) -> list[IndexArray]:
    """One sorted int64 array of sample indices per client, from the client that owns each sample (int64 [n])."""
    by_owner = np.argsort(owner, kind="stable").astype(np.int64, copy=False)  # stable: sorted inside a client
    ends = np.cumsum(np.bincount(owner, minlength=num_clients))
    return np.split(by_owner, ends[:-1])
