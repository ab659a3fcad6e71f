"""Small data sets in the original formats, made of random numbers, so that the real reading code runs."""

import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from fedwsa.data import Dataset, idx

TRAIN, TEST = 60, 20  # samples
Split = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images [N, C, H, W] and labels


def splits(channels: int, side: int, classes: int = 10) -> tuple[Split, Split]:
    """Random images; each class is in both splits as long as there are samples for it."""
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, channels, side, side), np.uint8) for n in (TRAIN, TEST))
    return (train, np.arange(TRAIN) % classes), (test, np.arange(TEST) % classes)


def assert_is(data: Dataset, expected: tuple[Split, Split]) -> None:
    """The data set holds these two splits."""
    (train_images, train_labels), (test_images, test_labels) = expected
    np.testing.assert_array_equal(data.train_images, train_images)
    np.testing.assert_array_equal(data.train_labels, train_labels)
    np.testing.assert_array_equal(data.test_images, test_images)
    np.testing.assert_array_equal(data.test_labels, test_labels)


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    """A file of MNIST's format."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path) -> tuple[Split, Split]:
    """The four files of MNIST and Fashion-MNIST."""
    train, test = splits(1, 28)
    arrays = (train[0][:, 0], train[1].astype(np.uint8), test[0][:, 0], test[1].astype(np.uint8))
    for name, array in zip(idx.FILES, arrays, strict=True):
        (folder / name).write_bytes(idx_bytes(array))
    return train, test


def python_2_pickle(images: NDArray[np.uint8], key: str, labels: Sequence[int]) -> bytes:
    """{"data": images, key: labels} as Python 2 and the NumPy of 2009 pickled it: the published files are so."""
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"".join(b"J" + struct.pack("<i", size) for size in images.shape) + b"\x86"
    content = b"T" + struct.pack("<i", images.size) + images.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
    array += shape + dtype + b"\x89" + content + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U" + bytes([len(key)]) + key.encode() + numbers + b"u."


def write_cifar10(folder: Path) -> tuple[Split, Split]:
    """Five training batches, one for the test, as torchvision unpacks them."""
    train, test = splits(3, 32)
    (folder / "cifar-10-batches-py").mkdir()
    parts = [(train[0][i::5], train[1][i::5]) for i in range(5)]
    for i, (images, labels) in enumerate(parts, 1):
        batch = python_2_pickle(images.reshape(-1, 3072), "labels", labels.tolist())
        (folder / "cifar-10-batches-py" / f"data_batch_{i}").write_bytes(batch)
    batch = python_2_pickle(test[0].reshape(-1, 3072), "labels", test[1].tolist())
    (folder / "cifar-10-batches-py" / "test_batch").write_bytes(batch)
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return (images, labels), test


def write_cifar100(folder: Path) -> tuple[Split, Split]:
    """One file a split; pickled by today's Python, as converted copies are."""
    train, test = splits(3, 32, classes=100)
    for name, (images, labels) in (("train", train), ("test", test)):
        entry = {"data": images.reshape(-1, 3072), "fine_labels": labels.tolist(), "coarse_labels": [0] * len(labels)}
        (folder / name).write_bytes(pickle.dumps(entry))
    return train, test


def write_svhn(folder: Path) -> tuple[Split, Split]:
    """Two MATLAB files, in which the digit 0 has label 10."""
    train, test = splits(3, 32)
    for name, (images, labels) in (("train", train), ("test", test)):
        content = {"X": images.transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)}
        savemat(folder / f"{name}_32x32.mat", content, do_compression=True)
    return train, test


def write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """[3, H, W] as a file without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.transpose(1, 2, 0)).save(path)


def write_image_folder(folder: Path) -> tuple[Split, Split]:
    """A folder a class; the samples come back in the order of the classes."""
    both = []
    for name, (images, labels) in zip(("train", "test"), splits(3, 16, classes=3), strict=True):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            write_image(folder / name / f"kind {label}" / f"{i:03}.png", image)
        order = np.argsort(labels, kind="stable")
        both.append((images[order], labels[order]))
    return both[0], both[1]


def write_cub_200(folder: Path) -> tuple[Split, Split]:
    """The lists and images of CUB_200_2011; training and test images alternate, while there are both."""
    train, test = splits(3, 16, classes=5)
    root = folder / "CUB_200_2011"
    waiting = [
        [(image, label, flag) for image, label in zip(*split, strict=True)] for split, flag in ((train, 1), (test, 0))
    ]
    mixed = [sample for pair in zip(*waiting, strict=False) for sample in pair] + waiting[0][TEST:]
    names, classes, flags = [], [], []
    for i, (image, label, flag) in enumerate(mixed, 1):
        name = f"{label + 1:03}.Some_bird/Some_bird_{i:04}.png"
        write_image(root / "images" / name, image)
        names.append(f"{i} {name}\n")
        classes.append(f"{i} {label + 1}\n")
        flags.append(f"{i} {flag}\n")
    (root / "images.txt").write_text("".join(names))
    (root / "image_class_labels.txt").write_text("".join(classes))
    (root / "train_test_split.txt").write_text("".join(flags))
    return train, test


WRITERS: dict[str, Callable[[Path], Any]] = {
    "mnist": write_idx,
    "fashion-mnist": write_idx,
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "svhn": write_svhn,
    "image-folder": write_image_folder,
    "cub-200": write_cub_200,
}
