"""CUB-200-2011 in its original layout: 11,788 images of 200 kinds of birds (Wah et al., 2011)."""

from pathlib import Path

from fedwsa.data.dataset import DataError, Dataset
from fedwsa.data.image_folder import Samples, load_samples
from fedwsa.data.sources import find_files

LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt")


def load(data_dir: Path | None = None, image_size: int = 0) -> Dataset:
    """Load CUB-200-2011 from data_dir or data_dir/CUB_200_2011, with the split of its own train_test_split.txt.

    Class k of the files is label k − 1. image_size: see `fedwsa.data.images.fit`; the original images have many sizes,
    so that it is needed.
    Raises DataError, in one line, for files that are missing, damaged or contradict each other.
    """
    folders = [] if data_dir is None else [Path(data_dir), Path(data_dir, "CUB_200_2011")]
    names, classes, split = find_files("cub-200", LISTS, folders, "unpack CUB_200_2011.tgz and give its folder")
    paths, labels, in_train = read_list(names), read_numbers(classes, 1), read_numbers(split, 0, 1)
    for path, numbers in ((classes, labels), (split, in_train)):
        if odd := paths.keys() ^ numbers.keys():
            raise DataError(f"{path}: its images are not those of {names.name}; image {min(odd)} is in one of the two")
    train: Samples = []
    test: Samples = []
    for image, name in paths.items():
        path = names.parent / "images" / name
        if not path.is_file():
            raise DataError(f"{path}: no such file, but {names.name} has it")
        (train if in_train[image] else test).append((path, labels[image] - 1))
    if not train or not test:
        raise DataError(f"{split}: no image in the {'test' if train else 'training'} split")
    return load_samples("cub-200", train, test, max(labels.values()), image_size)


def read_list(path: Path) -> dict[str, str]:
    """The lines "image value" of a file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    entries = {}
    for number, line in enumerate(lines, 1):
        image, space, value = line.strip().partition(" ")
        if not space or image in entries:
            raise DataError(f'{path}: line {number} must be "image value" with an image of its own, got {line!r}')
        entries[image] = value
    return entries


def read_numbers(path: Path, least: int, most: int | None = None) -> dict[str, int]:
    """`read_list` of a file whose values are whole numbers in least … most."""
    numbers = {}
    for image, value in read_list(path).items():
        if not value.isdecimal() or not least <= int(value) <= (int(value) if most is None else most):
            allowed = f"a whole number ≥ {least}" if most is None else f"{least} to {most}"
            raise DataError(f"{path}: image {image} has {value!r}; allowed is {allowed}")
        numbers[image] = int(value)
    return numbers
