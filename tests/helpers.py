"""What several test files need."""

import functools
import os

import pytest

from fedwsa.data import DataError, Dataset, fashion_mnist


def require_fashion_mnist() -> Dataset:
    """The installed Fashion-MNIST; without it the test is skipped, or fails where CI=true."""
    try:
        fashion_mnist.find_files(None)
    except DataError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))
    return _load()


@functools.cache
def _load() -> Dataset:
    return fashion_mnist.load()
