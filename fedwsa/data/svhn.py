"""SVHN, house numbers in 32×32 pixels, from its two original MATLAB files: 73,257 training and 26,032 test images."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedwsa.data.cache import cached
from fedwsa.data.dataset import DataError, Dataset
from fedwsa.data.sources import find_files

FILES = ("train_32x32.mat", "test_32x32.mat")


def load(data_dir: Path | None = None) -> Dataset:
    """Load SVHN from data_dir; label 10 of the files is the digit 0 and label 0 here, as torchvision has it.

    Raises DataError if a file is missing (nothing is downloaded) or damaged.
    """
    folders = [] if data_dir is None else [Path(data_dir)]
    remedy = "get them by torchvision.datasets.SVHN(DIR, split=…, download=True) and give DIR as the data dir"
    train, test = find_files("svhn", FILES, folders, remedy)

    def read() -> Dataset:
        return Dataset("svhn", *read_split(train), *read_split(test), num_classes=10, scale=255.0)

    return cached("svhn", [train, test], read)


def read_split(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images, uint8 [N, 3, 32, 32], and labels, int64 [N], of FOLDER/<split>_32x32.mat; DataError has the path."""
    from torchvision.datasets import SVHN  # a second, and only where the cache has none

    class AsItIs(SVHN):  # type: ignore[misc]
        """Without the comparison with one checksum, which cannot say what is wrong."""

        def _check_integrity(self) -> bool:
            return True

    try:
        split = AsItIs(path.parent, split=path.name.removesuffix("_32x32.mat"))
    except Exception as error:  # SciPy's reader raises many kinds for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read ({reason}); get the file again") from error
    images, labels = np.ascontiguousarray(split.data), np.atleast_1d(split.labels)
    if images.dtype != np.uint8 or images.shape[1:] != (3, 32, 32):
        raise DataError(f"{path}: X must be uint8 [32, 32, 3, N], got {images.dtype} {split.data.shape}, N first")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{path}: {len(images)} images, but labels of shape {labels.shape}")
    return images, labels
