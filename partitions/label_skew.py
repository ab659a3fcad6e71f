"""Label skew: every client holds a fixed number of classes."""

import numpy as np
from numpy.typing import ArrayLike

from partitions._indices import IndexArray, check_integer, check_labels, deal, shuffle_by_class


def label_skew(
    labels: ArrayLike, num_clients: int, classes_per_client: int = 2, *, rng: np.random.Generator
) -> list[IndexArray]:
    """Give every client exactly so many classes at random, and share each class evenly (± 1) among its holders.

    Every class has a holder, and the numbers of holders differ by one at most.

    labels: integers [n]; the classes are the values that occur.
    classes_per_client: from 1 to the number of classes, and at least as many as it takes for every class to have a
        holder: num_clients · classes_per_client >= classes.
    Returns sorted int64 arrays, one per client, that hold every index exactly once.
    Raises ValueError for arguments out of range, and where a class has fewer samples than holders.

    Source: quantity-based label imbalance (#C = k) of Li et al., arXiv 2102.02079, whose classes' holders are drawn
    independently; that their numbers are even is ours.
    """
    labels = check_labels(labels)
    check_integer("num_clients", num_clients, 1)
    check_integer("classes_per_client", classes_per_client, 1)
    values, class_sizes = np.unique(labels, return_counts=True)
    if classes_per_client > len(values):
        raise ValueError(
            f"classes_per_client must be <= the number of classes, {len(values)}, got {classes_per_client}"
        )
    if num_clients * classes_per_client < len(values):
        raise ValueError(
            f"{num_clients} clients with classes_per_client={classes_per_client} cannot hold all of {len(values)} "
            "classes; use more classes_per_client or more clients"
        )
    class_of_holding = deal_classes(num_clients, len(values), classes_per_client, rng)
    holders = np.bincount(class_of_holding, minlength=len(values))
    if (short := class_sizes < holders).any():
        first = int(np.argmax(short))
        raise ValueError(
            f"class {values[first]} has {class_sizes[first]} samples for {holders[first]} clients; "
            f"use a smaller classes_per_client than {classes_per_client} or fewer clients than {num_clients}"
        )

    holdings = shuffle_by_class(class_of_holding, rng)
    rank = np.arange(len(holdings)) - np.repeat(np.cumsum(holders) - holders, holders)  # among a class's holders
    share, over = np.divmod(class_sizes, holders)
    counts = np.zeros((len(values), num_clients), np.int64)
    counts[class_of_holding[holdings], holdings // classes_per_client] = (share.repeat(holders)) + (
        rank < over.repeat(holders)
    )
    return deal(labels, counts, rng)


def deal_classes(num_clients: int, num_classes: int, classes_per_client: int, rng: np.random.Generator) -> IndexArray:
    """Classes of client 0, then of client 1, …: int64 [clients · classes_per_client], a client's all different.

    Dealt from shuffled decks that hold each class once. The client who gets the end of one deck and the start of the
    next must not get a class twice: what it holds is kept back from the cards that it is dealt.
    """
    needed = num_clients * classes_per_client
    decks: list[IndexArray] = []
    held = np.empty(0, np.int64)
    for dealt in range(0, needed, num_classes):
        fresh = rng.permutation(np.setdiff1d(np.arange(num_classes), held))
        first, others = np.split(fresh, [classes_per_client - len(held)])
        decks.append(np.concatenate([first, rng.permutation(np.concatenate([others, held]))]))
        held = decks[-1][num_classes - (dealt + num_classes) % classes_per_client :]
    return np.concatenate(decks)[:needed]
