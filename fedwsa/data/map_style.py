"""Any map-style PyTorch data sets, a user's own or torchvision's, as a `Dataset`."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedwsa.data.dataset import DataError, Dataset
from fedwsa.data.images import fit, is_deep, stack

if TYPE_CHECKING:
    from torch.utils.data import Dataset as MapStyle


def is_map_style(data: object) -> bool:
    """It has a length and can be indexed; classes don't count."""
    return not isinstance(data, type) and hasattr(data, "__len__") and hasattr(data, "__getitem__")


def from_map_style(name: str, train: MapStyle[Any], test: MapStyle[Any], image_size: int = 0) -> Dataset:
    """Read every sample (image, label) of both once, in order; what a transform draws is drawn once in each process.

    Images: PIL images; arrays [H, W] or [H, W, C]; tensors [H, W] or [C, H, W]. Their numbers are uint8, or floating in
    0 … 1, which are rounded to 1/255; normalisation is ours. All of one size, or image_size says which (`images.fit`).
    Labels: whole numbers from 0; there are as many classes as `train.classes` has, else the largest label + 1.
    `train.groups`, integers [N], if it has such, become `train_groups`.
    Raises DataError, in one line, that names the sample.
    """
    train_images, train_labels = _read(f"{name}, train split", train, image_size)
    test_images, test_labels = _read(f"{name}, test split", test, image_size)
    classes = getattr(train, "classes", None)
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1 if classes is None else len(classes)
    groups = getattr(train, "groups", None)
    if groups is not None:
        groups = np.asarray(groups)
        if groups.dtype.kind in "iu":
            groups = groups.astype(np.int64)
    return Dataset(
        name, train_images, train_labels, test_images, test_labels, num_classes, scale=255.0, train_groups=groups
    )


def _read(where: str, data: Any, image_size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    count = len(data)
    if not count:
        raise DataError(f"{where}: it has no samples; allowed is one at least")
    labels = np.empty(count, np.int64)

    def images() -> Iterator[tuple[str, NDArray[np.uint8]]]:
        for i in range(count):
            name, sample = f"{where}, sample {i}", data[i]
            if not isinstance(sample, tuple | list) or len(sample) != 2:
                raise DataError(f"{name}: must be (image, label), got {type(sample).__name__}")
            try:
                labels[i] = operator.index(sample[1])
            except TypeError:
                labels[i] = -1
            if labels[i] < 0:
                raise DataError(f"{name}: the label must be a whole number ≥ 0, got {sample[1]!r}")
            yield name, fit(_pixels(name, sample[0]), image_size)

    return stack(images(), count), labels


def _pixels(name: str, image: Any) -> NDArray[np.uint8]:
    """uint8 [H, W, C] of an image of any kind."""
    if hasattr(image, "convert"):  # PIL's
        image = image if image.mode == "L" or is_deep(image) else image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    elif pixels.ndim == 3 and hasattr(image, "numpy"):  # PyTorch's have the channels first
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise DataError(f"{name}: an image must have two dimensions and 1, 3 or 4 channels, got {np.shape(image)}")
    if pixels.dtype.kind == "f":
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            low, high = pixels.min(), pixels.max()
            raise DataError(f"{name}: floating pixels must lie in 0 … 1, got {low:g} … {high:g}; leave Normalize out")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise DataError(f"{name}: pixels must be uint8 or floating, got {pixels.dtype}")
    return pixels
