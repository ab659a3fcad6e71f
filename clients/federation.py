"""Who holds what: the data set, split between server and clients as the config says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import partitions
from fedwsa import data
from fedwsa.config import Config
from fedwsa.data.shift import SHIFTS, FeatureShift
from fedwsa.registry import check_call, lookup, signature_of
from fedwsa.seeding import generator
from partitions import stored

if TYPE_CHECKING:
    from torch import Tensor

Indices = NDArray[np.int64]
OPTIONS = (  # of partitioners, named as the config's keys are, besides alpha
    "min_size", "balanced", "shards_per_client", "classes_per_client", "beta", "size_sigma",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FederatedData:
    """Indices into the training split of `dataset`, disjoint: the server's, and for each client two parts.

    parts: for each client both parts together, in the order in which the partition has them.
    made_by: how the partition was made: partitioner, its options and the seed.
    shift: what is done to the clients' images, but to neither the server's nor the central test split, which is that
    of `dataset`.
    """

    dataset: data.Dataset
    server: Indices
    training: list[Indices]
    validation: list[Indices]
    parts: list[Indices]
    made_by: dict[str, Any]
    shift: FeatureShift | None

    def training_tensors(self, client: int) -> tuple[Tensor, Tensor]:
        """Copy a client's training samples: (float32 [n, C, H, W] normalised, int64 [n])."""
        change = self.shift.change(client, "shift-training") if self.shift else None
        return self.dataset.train_tensors(self.training[client], change)

    def validation_tensors(self, client: int) -> tuple[Tensor, Tensor]:
        """Copy a client's validation samples, n ≥ 0."""
        change = self.shift.change(client, "shift-validation") if self.shift else None
        return self.dataset.train_tensors(self.validation[client], change)

    def label_counts(self) -> NDArray[np.int64]:
        """Samples of each class (column) at each client (row), both parts together."""
        return partitions.label_counts(self.dataset.train_labels, self.parts, self.dataset.num_classes)


@lru_cache(maxsize=4)
def federation(config: Config) -> FederatedData:
    """The split for a config of one α and one seed; it depends on nothing but the config and the data.

    Raises ValueError (`data.DataError` for missing data) where the split is impossible or leaves a client empty.
    """
    dataset = data.of_config(config)
    server, parts, made_by = _partition(config, dataset)
    if len(parts) != config.num_clients:
        raise ValueError(
            f"partitioner {config.partitioner!r} made {len(parts)} parts; allowed is num-clients = {config.num_clients}"
        )
    _check_sizes(config, [len(part) for part in parts], len(dataset.train_labels) - len(server))
    split = [_validation_split(config, client, part) for client, part in enumerate(parts)]
    training, validation = [kept for kept, _ in split], [held for _, held in split]
    return FederatedData(dataset, server, training, validation, parts, made_by, _shift(config))


def _check_sizes(config: Config, sizes: list[int], pool: int) -> None:
    """ValueError if a client holds less than `min-size` of the `pool` samples that the server has not."""
    size = min(sizes)
    if size >= config.min_size:
        return
    if config.partition_file:
        who, remedy = config.partition_file, "allowed is another file"
    else:
        who = f"partitioner {config.partitioner!r}"
        remedy = f"allowed are fewer clients than {config.num_clients} or another partitioner"
    smaller = ", or a smaller min-size" if size > 0 else ""  # there is no min-size of 0
    raise ValueError(
        f"{who}: client {sizes.index(size)} would hold {size} of {pool} samples, min-size = {config.min_size}; "
        f"{remedy}{smaller}"
    )


def _shift(config: Config) -> FeatureShift | None:
    if not config.feature_shift:
        return None
    shift = lookup(SHIFTS, config.feature_shift, "feature shift")
    check_call(shift, f"feature shift {config.feature_shift!r}", "(pixels, amount, rng)", None, 0.0, None)
    return FeatureShift(shift, config.shift_strength, config.num_clients, config.seed[0])


def _partition(config: Config, dataset: data.Dataset) -> tuple[Indices, list[Indices], dict[str, Any]]:
    """The server's indices, each client's, and how they were made: read, or by the partitioner from the config.

    The partitioner is called with those of the config's values that it takes, and `groups`, those of the data set.
    """
    labels, seed = dataset.train_labels, config.seed[0]
    if config.partition_file:
        found = stored.read(
            Path(config.partition_file),
            labels,
            num_clients=config.num_clients,
            server_samples=config.server_samples,
            sha256=config.partition_sha256,
        )
        return found.server, found.clients, found.made_by
    server, pool = data.held_out(config, labels)
    partitioner: Callable[..., list[Indices]] = lookup(partitions.PARTITIONERS, config.partitioner, "partitioner")
    options = {"alpha": config.alpha[0], **{name: getattr(config, name) for name in OPTIONS}}
    who = f"partitioner {config.partitioner!r}"
    way = f"(labels, num_clients, *, rng) and those that it names of {', '.join(options)} and groups"
    taken = signature_of(partitioner, who, way).parameters
    chosen = {name: value for name, value in options.items() if name in taken}
    made_by = {"partitioner": config.partitioner, **chosen, "seed": seed}
    if "groups" in taken:
        groups = dataset.train_groups
        if groups is None:
            raise data.DataError(
                f"{who}: data set {dataset.name!r} has no train_groups; allowed is a data set that says who made each "
                "sample, or another partitioner"
            )
        chosen["groups"] = groups[pool]
    arguments, keywords = (labels[pool], config.num_clients), {**chosen, "rng": generator(seed, "partition")}
    check_call(partitioner, who, way, *arguments, **keywords)
    try:
        parts = stored.checked(partitioner(*arguments, **keywords), len(pool))
    except ValueError as error:
        raise ValueError(f"{who}: {_with_keys(str(error))}") from error
    return server, [pool[part] for part in parts], made_by


def _with_keys(text: str) -> str:
    """What a partitioner says of its parameters, said of the config's keys."""
    for name in ("num_clients", *OPTIONS):
        text = text.replace(name, name.replace("_", "-"))
    return text


def _validation_split(config: Config, client: int, part: Indices) -> tuple[Indices, Indices]:
    """Training and validation samples; both have one at least where the client holds two, else it trains on its one."""
    size = round(config.validation_fraction * len(part))
    if config.validation_fraction > 0:
        size = min(max(size, 1), len(part) - 1)
    shuffled = generator(config.seed[0], "validation", partition_id=client).permutation(part)
    return np.sort(shuffled[size:]), np.sort(shuffled[:size])
