"""Fashion-MNIST from its four original files: 60,000 training and 10,000 test images of 28×28.

torchvision's reader of this format takes unpacked files only and checks them by `assert`; `read_idx` takes the gzipped
ones as they are, and says what is wrong with a damaged file.
"""

import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedwsa.data.dataset import DataError, Dataset

SYSTEM_DIR = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def load(data_dir: Path | None = None) -> Dataset:
    """Load Fashion-MNIST from the first folder that has all four files, plain or gzipped.

    The folders: data_dir, data_dir/FashionMNIST/raw (as torchvision lays them out), /usr/share/datasets/fashion-mnist.
    Raises DataError if none has them (nothing is downloaded), or a file is damaged.
    """
    train_images, train_labels, test_images, test_labels = find_files(data_dir)
    return Dataset(
        "fashion-mnist",
        *read_split(train_images, train_labels),
        *read_split(test_images, test_labels),
        num_classes=10,
        scale=255.0,
    )


def find_files(data_dir: Path | None) -> list[Path]:
    """Return the paths of `FILES`, all in one folder; an unpacked file comes before a gzipped one."""
    own = [] if data_dir is None else [Path(data_dir), Path(data_dir, "FashionMNIST", "raw")]
    folders = [*own, SYSTEM_DIR]
    for folder in folders:
        found = [path for name in FILES if (path := first_file(folder / name, folder / f"{name}.gz"))]
        if len(found) == len(FILES):
            return found
    raise DataError(
        f"fashion-mnist: no folder has all of {', '.join(FILES)} (or .gz); looked in {', '.join(map(str, folders))}; "
        "get them by `apt-get install dataset-fashion-mnist`, or by torchvision.datasets.FashionMNIST(DIR, "
        "download=True) and give DIR as the data dir"
    )


def first_file(*paths: Path) -> Path | None:
    """Return the first path that is a file."""
    return next((path for path in paths if path.is_file()), None)


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
