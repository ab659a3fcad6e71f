"""MNIST from its four original files: 60,000 training and 10,000 test images of 28×28."""

from pathlib import Path

from fedwsa.data import idx
from fedwsa.data.dataset import Dataset


def load(data_dir: Path | None = None) -> Dataset:
    """Load MNIST from the first folder that has all four files, plain or gzipped.

    The folders: data_dir, data_dir/MNIST/raw (as torchvision lays them out).
    Raises DataError if none has them (nothing is downloaded), or a file is damaged.
    """
    folders = [] if data_dir is None else [Path(data_dir), Path(data_dir, "MNIST", "raw")]
    remedy = "get them by torchvision.datasets.MNIST(DIR, download=True) and give DIR as the data dir"
    return idx.load_four("mnist", idx.find_four("mnist", folders, remedy))
