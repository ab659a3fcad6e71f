"""The 1,797 handwritten digits inside scikit-learn: real 8×8 images, no download."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedwsa.data.dataset import Dataset
from fedwsa.data.split import server_split

TEST_SAMPLES = 359  # 20 % of 1,797
SPLIT_SEED = 20240822  # any constant would do; it is no run's seed, so that all runs share one test split


def load(data_dir: Path | None = None) -> Dataset:
    """Load the digits: 1,438 training and 359 test images, [1, 8, 8], pixels 0 … 16.

    data_dir is ignored: the images come with scikit-learn. The set has no split of its own; this one is ours,
    stratified by class and always the same.
    """
    table = read_table()
    images = table[:, :64].reshape(-1, 1, 8, 8)
    labels = table[:, 64].astype(np.int64)
    test, train = server_split(labels, TEST_SAMPLES, np.random.default_rng(SPLIT_SEED))
    return Dataset("digits", images[train], labels[train], images[test], labels[test], num_classes=10, scale=16.0)


def read_table() -> NDArray[np.uint8]:
    """64 pixels and the label of every image: uint8 [1797, 65].

    The file is read without importing scikit-learn, which takes a second.
    """
    spec = find_spec("sklearn")
    for package in (spec and spec.submodule_search_locations) or ():
        path = Path(package, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return np.loadtxt(path, np.uint8, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.uint8)
