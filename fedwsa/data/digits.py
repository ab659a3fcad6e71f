"""The 1,797 handwritten digits inside scikit-learn: real 8×8 images, no download."""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedwsa.data.cache import cached
from fedwsa.data.dataset import Dataset
from fedwsa.data.split import server_split

TEST_SAMPLES = 359  # 20 % of 1,797
SPLIT_SEED = 20240822  # any constant would do; it is no run's seed, so that all runs share one test split


def load(data_dir: Path | None = None) -> Dataset:
    """Load the digits: 1,438 training and 359 test images, [1, 8, 8], pixels 0 … 16.

    data_dir means nothing: the images come with scikit-learn. The set has no split of its own; this one is ours,
    stratified by class and always the same.
    """
    return cached("digits", table_files(), split_table, version("scikit-learn"))


def split_table() -> Dataset:
    """Read the table and split it."""
    table = read_table()
    images = table[:, :64].reshape(-1, 1, 8, 8)
    labels = table[:, 64].astype(np.int64)
    test, train = server_split(labels, TEST_SAMPLES, np.random.default_rng(SPLIT_SEED))
    return Dataset("digits", images[train], labels[train], images[test], labels[test], num_classes=10, scale=16.0)


def table_files() -> list[Path]:
    """The one file with the digits, without importing scikit-learn, which takes a second; or none where it is not."""
    spec = find_spec("sklearn")
    folders = (spec and spec.submodule_search_locations) or ()
    paths = [Path(folder, "datasets", "data", "digits.csv.gz") for folder in folders]
    return [path for path in paths if path.is_file()][:1]


def read_table() -> NDArray[np.uint8]:
    """64 pixels and the label of every image: uint8 [1797, 65]."""
    for path in table_files():
        return np.loadtxt(path, np.uint8, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.uint8)
