"""Image data sets: read from disk, never downloaded in silence.

A loader is a function `(data_dir: Path | None) -> Dataset`, with an argument `image_size: int` where its images can be
scaled. To add a data set: one file, one line in `DATASETS` (or none: `load` takes an import path too).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedwsa.data import cifar, cub_200, digits, fashion_mnist, image_folder, mnist, svhn
from fedwsa.data.cache import cached
from fedwsa.data.dataset import DataError, Dataset
from fedwsa.data.map_style import from_map_style, is_map_style
from fedwsa.data.split import server_split
from fedwsa.registry import check_call, lookup, signature_of
from fedwsa.seeding import generator

if TYPE_CHECKING:
    from fedwsa.config import Config

__all__ = ["DATASETS", "DataError", "Dataset", "cached", "held_out", "load", "of_config", "server_split"]

DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": digits.load,
    "mnist": mnist.load,
    "fashion-mnist": fashion_mnist.load,
    "cifar10": cifar.load_cifar10,
    "cifar100": cifar.load_cifar100,
    "svhn": svhn.load,
    "image-folder": image_folder.load,
    "cub-200": cub_200.load,
}
WITHOUT_FILES = ("digits",)  # that come with a package


def of_config(config: Config) -> Dataset:
    """The data set that a config names; loaded once a process, see `load`."""
    return _once(config.data, config.data_dir, config.image_size)


def held_out(config: Config, labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the training samples that a config's server holds, and of those left for the clients.

    Raises DataError where none would be left.
    """
    size = config.server_samples
    if size >= len(labels):
        raise DataError(f"server-samples = {size}: allowed is less than the {len(labels)} training samples there are")
    return server_split(labels, size, generator(config.seed[0], "server-split"))


@lru_cache(maxsize=2)
def _once(name: str, data_dir: str, image_size: int) -> Dataset:
    return load(name, Path(data_dir) if data_dir else None, image_size)


def load(name: str, data_dir: Path | None = None, image_size: int = 0) -> Dataset:
    """Load a data set by its registered name, or by an import path "package.module:attribute".

    The attribute is a `Dataset`, a pair (train, test) of map-style PyTorch data sets, or a function
    `(data_dir: Path | None) -> ` one of the two.
    data_dir: where the data set's own files lie; without it the loader looks in the usual places.
    image_size: images are cut and scaled to that many pixels a side; 0: left as they are, and all of one size.
    Raises ValueError for an unknown name and a function that does not take `data_dir`, DataError (a ValueError) for
    files that are missing or damaged, and a data_dir of a registered data set that is no folder or means nothing to it.
    """
    found: Any = lookup(DATASETS, name, "data set")
    if data_dir is not None and name in DATASETS:  # a user's own loader knows what it is given
        _check_dir(name, data_dir)
    scaled = image_size == 0
    if callable(found):
        who, way = f"data set {name!r}", "(data_dir), and image_size where it names it"
        takes_size = "image_size" in signature_of(found, who, way).parameters
        options = {"image_size": image_size} if takes_size else {}
        check_call(found, who, way, data_dir, **options)
        found = found(data_dir, **options)
        scaled |= takes_size
    if isinstance(found, tuple) and len(found) == 2 and all(map(is_map_style, found)):
        return from_map_style(name, *found, image_size=image_size)
    if not isinstance(found, Dataset):
        raise DataError(
            f"{name}: the loader must return a fedwsa.data.Dataset, or (train, test), two map-style PyTorch data sets, "
            f"got {type(found).__name__}"
        )
    if not scaled:
        raise DataError(f"image-size = {image_size}: the images of {name} have one size; allowed is 0")
    if image_size and found.input_shape[1:] != (image_size, image_size):
        height, width = found.input_shape[1:]
        raise DataError(f"image-size = {image_size}: the loader of {name} made images of {height}×{width}")
    return found


def _check_dir(name: str, data_dir: Path) -> None:
    """Else a loader that also looks elsewhere would take other files than those that were meant."""
    if name in WITHOUT_FILES:
        raise DataError(f"data-dir = {data_dir}: {name} has no files of its own; allowed with it is none")
    if not os.path.isdir(data_dir):
        raise DataError(f"data-dir = {data_dir}: there is no such folder")
