"""How unlike clients are, in numbers that need no α: from the samples of each class that each client holds."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class Heterogeneity:
    """Four numbers; what is a mean over clients leaves out empty clients and weighs all others the same.

    total_variation: mean of ½ Σ_c |q_c − p_c| between a client's label distribution q and p, that of all the clients'
        samples together; 0 (alike) … 1.
    jensen_shannon: mean Jensen–Shannon distance of the same two, the square root of the divergence in bits; 0 … 1.
    effective_classes: mean of exp(H(q)), H the entropy in nats: as many equally frequent classes have this entropy;
        1 … number of classes.
    size_gini: Gini coefficient of the clients' sizes, Σ_ij |n_i − n_j| / (2 K Σ_i n_i), empty clients among them;
        0 (equal sizes) … (K − 1)/K (one of K holds all).
    """

    total_variation: float
    jensen_shannon: float
    effective_classes: float
    size_gini: float


def heterogeneity(label_counts: ArrayLike) -> Heterogeneity:
    """Measure how unlike the clients are.

    label_counts: integers [clients, classes] ≥ 0, as `label_counts` returns them.
    Raises ValueError for another shape or a negative count, and where no client holds a sample.
    The distances are common ones; to take them from the pooled distribution, and to weigh clients alike, is ours.
    """
    counts = np.asarray(label_counts, np.float64)
    if counts.ndim != 2 or not (counts >= 0).all() or not counts.sum() > 0:
        raise ValueError(f"label counts must be [clients, classes], >= 0 and not all 0, got shape {counts.shape}")
    sizes = counts.sum(axis=1)
    q = counts[sizes > 0] / sizes[sizes > 0, None]
    p = counts.sum(axis=0) / counts.sum()
    middle = (q + p) / 2
    divergence = (_kl(q, middle) + _kl(p, middle)) / (2 * np.log(2))
    return Heterogeneity(
        total_variation=float((np.abs(q - p).sum(axis=1) / 2).mean()),
        jensen_shannon=float(np.sqrt(np.clip(divergence, 0, 1)).mean()),
        effective_classes=float(np.exp(-_kl(q, np.ones(1))).mean()),
        size_gini=_gini(sizes),
    )


def _kl(q: NDArray[np.float64], p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Σ_c q_c ln(q_c / p_c) over the last axis, in nats; 0 ln 0 = 0, and p > 0 where q is. With p = 1, −H(q)."""
    ratio = np.divide(q, p, out=np.ones(np.broadcast_shapes(q.shape, p.shape)), where=q > 0)
    divergence: NDArray[np.float64] = (q * np.log(ratio)).sum(axis=-1)
    return divergence


def _gini(sizes: NDArray[np.float64]) -> float:
    """By the sorted sizes: Σ_i (2i − K − 1) n_(i) / (K Σ n), i = 1 … K."""
    clients = len(sizes)
    rank = np.arange(1, clients + 1)
    return float(((2 * rank - clients - 1) * np.sort(sizes)).sum() / (clients * sizes.sum()))
