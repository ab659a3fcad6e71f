"""Decoded data sets as .npy files, which all processes of a machine map into memory: the data are there once.

Nothing that is read from here can execute code. The folder may be deleted at any time.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedwsa.data.dataset import Dataset
from fedwsa.files import replace, replacing

FORMAT = 1  # raised when a loader makes something else of the same files
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "mean", "std", "train_groups")
MANIFEST = "dataset.json"
LOCK = "lock"


def cache_folder() -> Path:
    """FEDWSA_CACHE, else XDG_CACHE_HOME/fedwsa, else ~/.cache/fedwsa."""
    if own := os.environ.get("FEDWSA_CACHE"):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fedwsa").absolute()


def cached(name: str, sources: Sequence[Path], read: Callable[[], Dataset], *settings: object) -> Dataset:
    """What `read()` returns, with arrays that are read-only and mapped from the cache.

    sources: the files that `read` reads; with their sizes and times of change, and `settings`, whatever else the
    result depends on, they are the key. The first process reads and writes, others wait for it. A cached file that
    has changed since it was written is made again. Where the cache cannot be written the arrays are in memory.
    """
    folder = cache_folder() / f"{name}-{_key(name, sources, settings)}"
    if (dataset := _open(folder)) is not None:
        return dataset
    with _locked(folder):
        return _open(folder) or _written(folder, read())


def _key(name: str, sources: Sequence[Path], settings: Sequence[object]) -> str:
    parts = [f"{FORMAT}", name, *map(repr, settings), *(f"{source.absolute()} {_stamp(source)}" for source in sources)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _stamp(path: Path) -> list[int]:
    """Size in bytes and time of the last change in nanoseconds: other content, another stamp."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _open(folder: Path) -> Dataset | None:
    """The cached data set, or None where there is none or a file is not what was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        arrays = {field: _mapped(folder / f"{field}.npy", stamp) for field, stamp in manifest["stamps"].items()}
        return Dataset(**manifest["fields"], **arrays)  # type: ignore[arg-type]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # a ValueError may be a DataError
        return None


def _mapped(path: Path, stamp: list[int]) -> NDArray[Any]:
    if _stamp(path) != stamp:
        raise ValueError(f"{path}: has changed")
    return np.asarray(np.load(path, mmap_mode="r"))  # without memmap's own, slower, indexing


def _written(folder: Path, dataset: Dataset) -> Dataset:
    """Write it, the manifest last, and open what was written; where that fails, the data set as it is."""
    try:
        stamps = {}
        for field in ARRAYS:
            if (array := getattr(dataset, field)) is not None:
                path = folder / f"{field}.npy"
                with replacing(path) as file:
                    np.save(file, array, allow_pickle=False)
                stamps[field] = _stamp(path)
        fields = {"name": dataset.name, "num_classes": int(dataset.num_classes), "scale": float(dataset.scale)}
        replace(folder / MANIFEST, json.dumps({"fields": fields, "stamps": stamps}).encode())
    except OSError as error:
        logging.getLogger(__name__).warning(
            "%s cannot be written (%s): each process holds %s by itself; FEDWSA_CACHE may name another folder",
            folder,
            error.strerror or error,
            dataset.name,
        )
        return dataset
    return _open(folder) or dataset


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; where the folder cannot be made or locked, any number, and each does the same."""
    lock = None
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets it go when the process ends, however it does
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
