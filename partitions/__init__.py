"""Who holds which sample: labels in, one index array per client out. NumPy alone.

A partitioner is a function `(labels, num_clients, ..., *, ..., rng) -> list[int64 array]`: the arrays are sorted and
together hold every index 0 … n−1 exactly once. To add one: one file, one line in `PARTITIONERS`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from partitions._indices import IndexArray, check_labels
from partitions.dirichlet import dirichlet
from partitions.dirichlet_client import dirichlet_client
from partitions.heterogeneity import Heterogeneity, heterogeneity
from partitions.iid import iid
from partitions.label_skew import label_skew
from partitions.natural import natural
from partitions.quantity_skew import quantity_skew
from partitions.shards import shards

__all__ = [
    "PARTITIONERS",
    "Heterogeneity",
    "dirichlet",
    "dirichlet_client",
    "heterogeneity",
    "iid",
    "label_counts",
    "label_skew",
    "natural",
    "quantity_skew",
    "shards",
]

PARTITIONERS: dict[str, Callable[..., list[IndexArray]]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "dirichlet_client": dirichlet_client,
    "shards": shards,
    "label_skew": label_skew,
    "quantity_skew": quantity_skew,
    "natural": natural,
}


def label_counts(labels: ArrayLike, parts: Sequence[IndexArray], num_classes: int) -> IndexArray:
    """Samples of each class that each client holds: int64 [clients, classes].

    labels: integers [n] in 0 … num_classes − 1, else ValueError. parts: one index array per client.
    """
    labels = check_labels(labels)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}")
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    held = labels[np.concatenate([np.empty(0, np.int64), *parts])]
    counts = np.bincount(owner * num_classes + held, minlength=len(parts) * num_classes)
    return counts.astype(np.int64, copy=False).reshape(len(parts), num_classes)
