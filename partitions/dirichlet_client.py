"""Label skew: every client has its own label distribution, a Dirichlet draw around that of all samples."""

import numpy as np
from numpy.typing import ArrayLike

from partitions._filling import fill
from partitions._indices import IndexArray, check_even_split, check_labels, deal
from partitions.dirichlet import check_alpha, log_proportions


def dirichlet_client(
    labels: ArrayLike, num_clients: int, alpha: float, *, rng: np.random.Generator
) -> list[IndexArray]:
    """Give every client equally many samples (± 1) whose labels are drawn from its own q ~ Dir(α · prior).

    The prior is the label distribution of all samples, so that α is the sum of the Dirichlet's parameters and
    E q_c = prior_c, Var q_c = prior_c (1 − prior_c) / (α + 1). Small α: one class a client; α → ∞: as `iid`. The α
    of `dirichlet` is each parameter by itself: with C equal classes this one's α / C is comparable.

    The clients, in a random order, draw their samples without replacement from those that are left, one of class c with
    a probability in the proportion of q_c / prior_c; so the first samples of the first client have labels from its q.
    No sample is left over: a client whose classes have run out goes on with what there is. The last clients' label
    distributions are further from their q.

    labels: integers [n]; the classes are the values that occur.
    alpha: α, finite and > 0. Every such float works, however small.
    Returns sorted int64 arrays, one per client, that hold every index exactly once.
    Raises ValueError for alpha out of range, and unless 1 <= num_clients <= n.

    Source: the populations of Hsu et al., arXiv 1909.06335; that no sample is left over, and how, is ours.
    """
    labels = check_labels(labels)
    check_even_split(num_clients, len(labels))
    check_alpha(alpha)
    class_sizes = np.unique(labels, return_counts=True)[1]
    prior = class_sizes / len(labels)
    log_weights = log_proportions(num_clients, len(prior), alpha * prior, rng) - np.log(prior)
    return deal(labels, fill(class_sizes, log_weights, rng), rng)
