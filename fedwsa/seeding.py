"""One stream of random numbers per purpose, so that a draw added in one place moves nothing elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

PURPOSES = (  # append only: a purpose's position is part of its seed
    "server-split",
    "partition",
    "model",
    "cohort",
    "evaluation-cohort",
    "client",
    "np-merge",
    "validation",
    "shift-training",
    "shift-validation",
    "augmentation",
    "barrier",
    "client-module",
    "np-merge-module",
)


def generator(seed: int, purpose: str, server_round: int = 0, partition_id: int = 0) -> np.random.Generator:
    """NumPy generator for one purpose; equal arguments give equal streams, different ones independent streams."""
    return np.random.default_rng([seed, PURPOSES.index(purpose), server_round, partition_id])


def torch_seed(seed: int, purpose: str, server_round: int = 0, partition_id: int = 0) -> int:
    """Seed in [0, 2⁶³) for PyTorch: what `generator` with the same arguments would draw first, without making it."""
    numbers = [seed, PURPOSES.index(purpose), server_round, partition_id]
    entropy = np.array(numbers, np.uint32) if max(numbers) < 2**32 else numbers  # the same to NumPy, and faster
    return int(np.random.PCG64(entropy).random_raw()) >> 1


def torch_generator(seed: int, purpose: str, server_round: int = 0, partition_id: int = 0) -> torch.Generator:
    """CPU generator of PyTorch, seeded by `torch_seed`."""
    import torch  # here, since the splits of the data need none of it

    return torch.Generator().manual_seed(torch_seed(seed, purpose, server_round, partition_id))
