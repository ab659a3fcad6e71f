"""Images of all kinds as one uint8 array of one size. Pillow is imported where an image is read or scaled."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedwsa.data.dataset import DataError

SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))


def is_deep(image: Any) -> bool:
    """Whether a PIL image has more than 8 bits a channel, which `convert` would clip."""
    return bool(image.mode.startswith(("I", "F")))


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """Read an image file as RGB: uint8 [H, W, 3], see `fit` for size.

    Raises DataError with the path, also for more than 8 bits a channel.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if is_deep(image):
                raise ValueError(f"more than 8 bits a channel, Pillow's mode {image.mode}")
            return fit(np.asarray(image.convert("RGB")), size)
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        raise DataError(f"{path}: cannot be read as an image ({' '.join(str(error).split())})") from error


def fit(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The largest square in the middle of the image, scaled to size × size: uint8 [H, W, C] → [size, size, C].

    size 0, or that of the image: as it is. C is 1, 3 or 4. Bilinear; the cut is the one in general use for evaluation
    on natural images, without its margin.
    """
    if size == 0 or image.shape[:2] == (size, size):
        return image
    from PIL import Image

    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    picture = Image.fromarray(square[:, :, 0] if square.shape[2] == 1 else square)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)).reshape(size, size, -1)


def stack(images: Iterable[tuple[object, NDArray[Any]]], count: int) -> NDArray[np.uint8]:
    """`count` ≥ 1 pairs of a name and an image, uint8 [H, W, C], as one array, uint8 [count, C, H, W].

    Raises DataError that names the first image of another size than those before it.
    """
    stacked: NDArray[np.uint8] | None = None
    for i, (name, image) in enumerate(images):
        channels_first = np.moveaxis(image, -1, 0)
        if stacked is None:
            stacked = np.empty((count, *channels_first.shape), np.uint8)
        if channels_first.shape != stacked.shape[1:]:
            (c, h, w), (channels, height, width) = channels_first.shape, stacked.shape[1:]
            raise DataError(
                f"{name}: {h}×{w} pixels in {c} channels, but the images before it have {height}×{width} in "
                f"{channels}; image-size = N makes them all N×N"
            )
        stacked[i] = channels_first
    if stacked is None:
        raise ValueError("stack needs an image at least")
    return stacked
