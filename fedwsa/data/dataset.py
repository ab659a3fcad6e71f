"""What every data set is in memory. PyTorch is imported where tensors are asked for: a partition needs none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Pixels = NDArray[np.float32]  # [n, C, H, W], pixel / scale: 0 is black, 1 is white


class DataError(ValueError):
    """Data that are missing, damaged or contradict themselves; the message is one line: where, what, remedy."""


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Labelled images as they are stored, with what it takes to normalise them.

    train_images, test_images: uint8 [N, C, H, W]. train_labels, test_labels: int64 [N] in 0 … num_classes − 1,
    num_classes ≥ 1.
    scale: the pixel value that counts as 1 (255, or 16 for `digits`).
    mean, std: float64 [C], of pixel / scale per channel; unless given, those of the training split (population std).
    train_groups: int64 [N], by whom or where a training image was made (writer, user, site), or None: not known.
    Raises DataError if any of this does not hold. The arrays may be read-only and mapped from files.
    """

    name: str
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    num_classes: int
    scale: float
    mean: NDArray[np.float64] = None  # type: ignore[assignment]  # set below
    std: NDArray[np.float64] = None  # type: ignore[assignment]
    train_groups: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise DataError(f"{self.name}: num_classes must be ≥ 1, got {self.num_classes!r}")
        self._check_split("train", self.train_images, self.train_labels)
        self._check_split("test", self.test_images, self.test_labels)
        if self.test_images.shape[1:] != self.input_shape:
            raise DataError(f"{self.name}: test images are {self.test_images.shape[1:]}, train are {self.input_shape}")
        if not 0 < self.scale < np.inf:
            raise DataError(f"{self.name}: scale must be finite and > 0, got {self.scale!r}")
        groups, size = self.train_groups, len(self.train_labels)
        if groups is not None and (groups.dtype != np.int64 or groups.shape != (size,)):
            raise DataError(f"{self.name}: train_groups must be int64 [{size}], got {groups.dtype} {groups.shape}")
        given = (self.mean, self.std)
        if self.mean is None or self.std is None:  # they cost a pass over all images
            computed = channel_statistics(self.train_images, self.scale)
            given = tuple(c if g is None else g for g, c in zip(given, computed, strict=True))
        for field, numbers, least in zip(("mean", "std"), given, (-np.inf, 0.0), strict=True):
            value = np.asarray(numbers, np.float64)
            if value.shape != (self.input_shape[0],) or not (np.isfinite(value) & (value > least)).all():
                need = "finite" if least < 0 else "finite and > 0"
                raise DataError(f"{self.name}: {field} must be {need}, one number a channel, got {value.tolist()}")
            object.__setattr__(self, field, value)

    def _check_split(self, split: str, images: NDArray[Any], labels: NDArray[Any]) -> None:
        where = f"{self.name}, {split} split"
        if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
            raise DataError(f"{where}: images must be uint8 [N, C, H, W], N > 0, got {images.dtype} {images.shape}")
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise DataError(f"{where}: labels must be int64 [{len(images)}], got {labels.dtype} {labels.shape}")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            low, high = labels.min(), labels.max()
            raise DataError(f"{where}: labels must lie in 0..{self.num_classes - 1}, got {low}..{high}")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width

    def train_tensors(
        self, indices: NDArray[np.int64], change: Callable[[Pixels], Pixels] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Copy the training samples `indices`: (float32 [n, C, H, W] normalised, int64 [n]).

        change: what is done to the pixels before they are normalised (`fedwsa.data.shift`).
        """
        import torch

        images = self._normalised(self.train_images[indices], change)
        return images, torch.from_numpy(self.train_labels[indices])

    def test_tensors(self, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Copy the test split or a part of it: (float32 [n, C, H, W] normalised, int64 [n])."""
        import torch

        return self._normalised(self.test_images[part]), torch.from_numpy(self.test_labels[part].copy())

    def _normalised(self, images: NDArray[np.uint8], change: Callable[[Pixels], Pixels] | None = None) -> Tensor:
        """(pixel / scale − mean) / std, with both sides multiplied by scale: float32, a copy."""
        pixels = images.astype(np.float32)
        if change is not None:
            changed = np.asarray(change(pixels / np.float32(self.scale)), np.float32)
            if changed.shape != pixels.shape:
                raise ValueError(f"the feature shift made {changed.shape} of {pixels.shape}; allowed is the same")
            pixels = changed * np.float32(self.scale)
        pixels -= (self.scale * self.mean).astype(np.float32)[:, None, None]
        pixels /= (self.scale * self.std).astype(np.float32)[:, None, None]
        import torch

        return torch.from_numpy(pixels)


def channel_statistics(images: NDArray[np.uint8], scale: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and population standard deviation of pixel / scale per channel: two float64 [C], from uint8 [N, C, H, W].

    The sums are exact integers, so that every machine gets the same floats.
    """
    axes = (0, 2, 3)
    pixels = images[:, 0].size
    sums = images.sum(axes, dtype=np.uint64).tolist()
    squares = np.zeros(images.shape[1], np.uint64)
    for start in range(0, len(images), 1000):  # a square fits uint16; blocks keep the copy small
        squares += np.square(images[start : start + 1000], dtype=np.uint16).sum(axes, dtype=np.uint64)
    mean = np.array([total / pixels for total in sums]) / scale
    numerators = [pixels * square - total**2 for square, total in zip(squares.tolist(), sums, strict=True)]
    std = np.sqrt([numerator / pixels**2 for numerator in numerators]) / scale
    return mean, std
