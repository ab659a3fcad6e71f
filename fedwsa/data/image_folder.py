"""Any images in folders: DIR/train/CLASS/… and DIR/test/CLASS/… (or val/), as torchvision's ImageFolder has them."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedwsa.data.cache import cached
from fedwsa.data.dataset import DataError, Dataset
from fedwsa.data.images import SUFFIXES, read_image, stack

Samples = list[tuple[Path, int]]  # image file and label


def load(data_dir: Path | None = None, image_size: int = 0) -> Dataset:
    """Load data_dir/train and data_dir/test (without it, data_dir/val): RGB images, classes numbered by name.

    image_size: see `fedwsa.data.images.fit`; 0: all images must be of one size.
    Raises DataError, in one line, for a missing or empty folder, a class that only the test split has, an image that
    cannot be read.
    """
    if data_dir is None:
        raise DataError("image-folder: no data dir is given; give the folder that has train/ and test/ (or val/)")
    train_dir = Path(data_dir, "train")
    test_dir = next((path for path in (Path(data_dir, "test"), Path(data_dir, "val")) if path.is_dir()), None)
    if not train_dir.is_dir() or test_dir is None:
        raise DataError(f"{data_dir}: needs the folders train/ and test/ (or val/), each with a folder a class")
    classes = sorted(entry.name for entry in os.scandir(train_dir) if entry.is_dir())
    train, test = list_samples(train_dir, classes), list_samples(test_dir, classes)
    return load_samples("image-folder", train, test, len(classes), image_size)


def list_samples(folder: Path, classes: Sequence[str]) -> Samples:
    """Image files below folder/<class>, in the order of their names, with the class's number."""
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if strange := [name for name in found if name not in classes]:
        raise DataError(f"{folder / strange[0]}: the training split has no class of this name")
    samples = []
    for name in found:
        paths = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        samples += [(path, classes.index(name)) for path in paths if path.is_file()]
    if not samples:
        raise DataError(f"{folder}: no image in any folder of it; allowed are {', '.join(sorted(SUFFIXES))}")
    return samples


def load_samples(name: str, train: Samples, test: Samples, num_classes: int, image_size: int) -> Dataset:
    """Read the image files, or take them from the cache."""

    def read() -> Dataset:
        return Dataset(name, *read_samples(train, image_size), *read_samples(test, image_size), num_classes, 255.0)

    labels = [[label for _, label in samples] for samples in (train, test)]
    return cached(name, [path for path, _ in train + test], read, image_size, num_classes, labels)


def read_samples(samples: Samples, image_size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images, uint8 [N, 3, H, W], and labels, int64 [N]."""
    images = stack(((path, read_image(path, image_size)) for path, _ in samples), len(samples))
    return images, np.array([label for _, label in samples], np.int64)
