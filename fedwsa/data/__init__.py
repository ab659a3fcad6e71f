"""Image data sets: read from disk, never downloaded in silence.

A loader is a function `(data_dir: Path | None) -> Dataset`. To add a data set: one file, one line in `DATASETS` (or
none: `load` takes an import path to a loader too).
"""

from collections.abc import Callable
from pathlib import Path

from fedwsa.data import digits, fashion_mnist
from fedwsa.data.dataset import DataError, Dataset
from fedwsa.data.split import server_split
from fedwsa.registry import lookup

__all__ = ["DATASETS", "DataError", "Dataset", "load", "server_split"]

DATASETS: dict[str, Callable[[Path | None], Dataset]] = {"digits": digits.load, "fashion-mnist": fashion_mnist.load}


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Load a data set by its registered name, or by an import path "package.module:loader".

    data_dir: where the data set's own files lie; without it the loader looks in the usual places.
    Raises ValueError for an unknown name, DataError (a ValueError) for files that are missing or damaged.
    """
    dataset = lookup(DATASETS, name, "data set")(data_dir)
    if not isinstance(dataset, Dataset):
        raise DataError(f"{name}: the loader must return a fedwsa.data.Dataset, got {type(dataset).__name__}")
    return dataset
