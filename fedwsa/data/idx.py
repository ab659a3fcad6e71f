"""The idx files of MNIST and of data sets in its format: four files, plain or gzipped.

torchvision's reader of this format takes unpacked files only and checks them by `assert`; `read_idx` takes the gzipped
ones as they are, and says what is wrong with a damaged file.
"""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedwsa.data.cache import cached
from fedwsa.data.dataset import DataError, Dataset
from fedwsa.data.sources import find_files

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def find_four(data_set: str, folders: Sequence[Path], remedy: str) -> list[Path]:
    """Return the paths of `FILES`, all in one folder; an unpacked file comes before a gzipped one."""
    return find_files(data_set, FILES, folders, remedy, suffixes=("", ".gz"))


def load_four(name: str, paths: Sequence[Path]) -> Dataset:
    """Load a data set of ten classes from its four files, in the order of `FILES`."""
    train_images, train_labels, test_images, test_labels = paths

    def read() -> Dataset:
        train, test = read_split(train_images, train_labels), read_split(test_images, test_labels)
        return Dataset(name, *train, *test, num_classes=10, scale=255.0)

    return cached(name, paths, read)


def read_split(images_path: Path, labels_path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images, uint8 [N, 1, H, W], and labels, int64 [N]."""
    images, labels = read_idx(images_path, num_dims=3), read_idx(labels_path, num_dims=1)
    if len(images) != len(labels):
        raise DataError(f"{labels_path}: {len(labels)} labels, but {images_path.name} has {len(images)} images")
    return images[:, None], labels.astype(np.int64)


def read_idx(path: Path, num_dims: int) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes with `num_dims` dimensions, gzipped if its name ends in .gz.

    The format: bytes 0, 0, 8 (unsigned byte) and the number of dimensions; each dimension, big-endian uint32; data.
    Raises DataError with the path and what is wrong. The array is read-only.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = zlib.decompress(content, wbits=31, bufsize=2 * len(content))  # 31: gzip, checksum verified
    except (OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); get the file again") from error
    header_size = 4 + 4 * num_dims
    if content[:4] != bytes([0, 0, 8, num_dims]) or len(content) < header_size:
        raise DataError(f"{path}: not an idx file of bytes in {num_dims} dimensions, it begins with {content[:4]!r}")
    shape = np.frombuffer(content, ">u4", num_dims, offset=4).tolist()
    if (size := len(content) - header_size) != math.prod(shape):
        raise DataError(f"{path}: {size} bytes of data where its header promises {shape}; get the file again")
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)
