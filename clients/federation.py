"""Who holds what: the data set, split between server and clients as the config says."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import partitions
from fedwsa import data
from fedwsa.config import Config
from fedwsa.registry import lookup
from fedwsa.seeding import generator

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Federation:
    """Indices into the training split of `dataset`, disjoint: the server's, and for each client two parts."""

    dataset: data.Dataset
    server: Indices
    training: list[Indices]
    validation: list[Indices]

    def label_counts(self) -> NDArray[np.int64]:
        """Samples of each class (column) at each client (row), both parts together."""
        parts = [np.concatenate(pair) for pair in zip(self.training, self.validation, strict=True)]
        return partitions.label_counts(self.dataset.train_labels, parts, self.dataset.num_classes)


@lru_cache(maxsize=2)
def load_data(name: str, directory: str) -> data.Dataset:
    """The data set, once a process."""
    return data.load(name, Path(directory) if directory else None)


@lru_cache(maxsize=4)
def federation(config: Config) -> Federation:
    """The split for a config of one α and one seed; it depends on nothing but the config and the data.

    Raises ValueError (`data.DataError` for missing data) where the split is impossible or leaves a client empty.
    """
    dataset = load_data(config.data, config.data_dir)
    labels, seed = dataset.train_labels, config.seed[0]
    server, pool = data.server_split(labels, config.server_samples, generator(seed, "server-split"))
    parts = [pool[part] for part in _partition(config, labels[pool])]
    smallest = min(range(len(parts)), key=lambda client: len(parts[client]))
    if len(parts[smallest]) < config.min_size:
        raise ValueError(
            f"client {smallest} would hold {len(parts[smallest])} of {len(pool)} samples, "
            f"min-size = {config.min_size}; "
            f"allowed are fewer clients than {config.num_clients} or a smaller min-size"
        )
    split = [_validation_split(config, client, part) for client, part in enumerate(parts)]
    return Federation(dataset, server, [training for training, _ in split], [held for _, held in split])


def _partition(config: Config, labels: Indices) -> list[Indices]:
    """Call the partitioner with those of the config's values that it takes."""
    partitioner: Callable[..., list[Indices]] = lookup(partitions.PARTITIONERS, config.partitioner, "partitioner")
    options: dict[str, Any] = {"alpha": config.alpha[0], "min_size": config.min_size}
    taken = inspect.signature(partitioner).parameters
    chosen = {name: value for name, value in options.items() if name in taken}
    return partitioner(labels, config.num_clients, **chosen, rng=generator(config.seed[0], "partition"))


def _validation_split(config: Config, client: int, part: Indices) -> tuple[Indices, Indices]:
    """Training and validation samples; both have one at least where the client holds two."""
    size = round(config.validation_fraction * len(part))
    if config.validation_fraction > 0 and len(part) > 1:
        size = min(max(size, 1), len(part) - 1)
    shuffled = generator(config.seed[0], "validation", partition_id=client).permutation(part)
    return np.sort(shuffled[size:]), np.sort(shuffled[:size])
