"""CIFAR-10 and CIFAR-100 from their original Python files: 50,000 training and 10,000 test images of 32×32.

The files are pickles, which can run code. torchvision's reader lets them, after a comparison with the checksums of the
published files; this one takes arrays and numbers and nothing else, and says what is wrong with a damaged file.
"""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedwsa.data.cache import cached
from fedwsa.data.dataset import DataError, Dataset
from fedwsa.data.sources import find_files

ALLOWED = {  # what pickled arrays are made of, by Python 2 and 3 and all versions of NumPy
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


def load_cifar10(data_dir: Path | None = None) -> Dataset:
    """Load CIFAR-10 from data_dir or data_dir/cifar-10-batches-py (as torchvision unpacks it).

    Raises DataError if neither has the files (nothing is downloaded), or a file is damaged.
    """
    training = [f"data_batch_{i}" for i in range(1, 6)]
    return _load("cifar10", data_dir, "cifar-10-batches-py", training, ["test_batch"], "labels", 10)


def load_cifar100(data_dir: Path | None = None) -> Dataset:
    """Load CIFAR-100, its 100 fine classes, from data_dir or data_dir/cifar-100-python; else as `load_cifar10`."""
    return _load("cifar100", data_dir, "cifar-100-python", ["train"], ["test"], "fine_labels", 100)


def _load(
    name: str,
    data_dir: Path | None,
    subfolder: str,
    training: Sequence[str],
    test: Sequence[str],
    key: str,
    num_classes: int,
) -> Dataset:
    folders = [] if data_dir is None else [Path(data_dir), Path(data_dir, subfolder)]
    kind = name.upper()
    remedy = f"get them by torchvision.datasets.{kind}(DIR, download=True) and give DIR as the data dir"
    paths = find_files(name, [*training, *test], folders, remedy)

    def read() -> Dataset:
        batches = [read_batch(path, key) for path in paths]
        splits = batches[: len(training)], batches[len(training) :]
        (train_images, train_labels), (test_images, test_labels) = (
            tuple(np.concatenate(arrays) for arrays in zip(*split, strict=True)) for split in splits
        )
        return Dataset(name, train_images, train_labels, test_images, test_labels, num_classes, scale=255.0)

    return cached(name, paths, read)


def read_batch(path: Path, key: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images, uint8 [N, 3, 32, 32], and the labels under `key`, int64 [N], of one file; DataError has its path."""
    try:
        entry = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read ({reason}); get the file again") from error
    if not isinstance(entry, dict) or "data" not in entry or key not in entry:
        raise DataError(f"{path}: not a file of CIFAR, it must hold data and {key}")
    images, labels = np.asarray(entry["data"]), np.asarray(entry[key])
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        raise DataError(f"{path}: data must be uint8 [N, 3072], got {images.dtype} {images.shape}")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: {len(images)} images, but its {key} are {labels.dtype} {labels.shape}")
    return images.reshape(-1, 3, 32, 32), labels.astype(np.int64)


class _ArraysOnly(pickle.Unpickler):
    """Refuses all that is not a part of an array."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # as it was called before NumPy 2
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return super().find_class(module, name)
