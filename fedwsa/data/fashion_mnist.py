"""Fashion-MNIST from its four original files: 60,000 training and 10,000 test images of 28×28."""

from pathlib import Path

from fedwsa.data import idx
from fedwsa.data.dataset import Dataset

SYSTEM_DIR = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


def load(data_dir: Path | None = None) -> Dataset:
    """Load Fashion-MNIST from the first folder that has all four files, plain or gzipped.

    The folders: data_dir, data_dir/FashionMNIST/raw (as torchvision lays them out), /usr/share/datasets/fashion-mnist.
    Raises DataError if none has them (nothing is downloaded), or a file is damaged.
    """
    return idx.load_four("fashion-mnist", find_files(data_dir))


def find_files(data_dir: Path | None) -> list[Path]:
    """Return the paths of the four files, all in one folder."""
    own = [] if data_dir is None else [Path(data_dir), Path(data_dir, "FashionMNIST", "raw")]
    remedy = (
        "get them by `apt-get install dataset-fashion-mnist`, or by torchvision.datasets.FashionMNIST(DIR, "
        "download=True) and give DIR as the data dir"
    )
    return idx.find_four("fashion-mnist", [*own, SYSTEM_DIR], remedy)
