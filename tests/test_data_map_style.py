"""Data sets by import path: a user's own, torchvision's, anything map-style."""

import numpy as np
import pytest
import torch
from originals import assert_is, write_idx
from PIL import Image
from torch.utils.data import TensorDataset

from fedwsa.data import DataError, Dataset, load


def torchvisions(data_dir):
    """One line of config for a user who has torchvision's."""
    from torchvision.datasets import MNIST

    return MNIST(data_dir, train=True), MNIST(data_dir, train=False)


def pair_of(train, test=None):
    return lambda data_dir: (train, train if test is None else test)


class Samples(list):
    """A list is a map-style data set."""


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3, 5, 4), np.uint8)
LABELS = torch.arange(6) % 3
pair = TensorDataset(torch.from_numpy(PIXELS), LABELS), TensorDataset(torch.from_numpy(PIXELS[:2]), LABELS[:2])
ready = Dataset("ready", PIXELS, LABELS.numpy(), PIXELS, LABELS.numpy(), 3, 255.0)
made: object = None


def given(value) -> str:
    """The import path of a value."""
    global made
    made = value
    return f"{__name__}:made"


def test_torchvision_s_own_data_sets_take_one_function(tmp_path):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    expected = write_idx(tmp_path / "MNIST" / "raw")
    data = load(f"{__name__}:torchvisions", tmp_path)
    assert_is(data, expected)
    assert (data.num_classes, data.scale) == (10, 255.0)


def test_a_pair_and_a_dataset_may_be_named_without_a_function():
    assert_is(load(f"{__name__}:pair"), ((PIXELS, LABELS), (PIXELS[:2], LABELS[:2])))
    assert load(f"{__name__}:ready") is ready


@pytest.mark.parametrize(
    "image",
    [
        torch.from_numpy,
        lambda image: torch.from_numpy(image) / 255,
        lambda image: torch.from_numpy(image).double() / 255,
        lambda image: image.transpose(1, 2, 0),
        lambda image: image.transpose(1, 2, 0) / 255.0,
        lambda image: Image.fromarray(image.transpose(1, 2, 0)),
        lambda image: Image.fromarray(image.transpose(1, 2, 0)).convert("RGBA"),
    ],
)
@pytest.mark.parametrize("label", [int, np.int32, lambda label: torch.tensor(label)])
def test_images_and_labels_of_every_kind(image, label):
    samples = [(image(pixels), label(i % 3)) for i, pixels in enumerate(PIXELS)]
    assert_is(load(given(pair_of(samples))), ((PIXELS, LABELS), (PIXELS, LABELS)))


@pytest.mark.parametrize(
    "image",
    [
        torch.from_numpy,
        lambda image: torch.from_numpy(image)[None],
        np.array,
        Image.fromarray,
        lambda image: Image.fromarray((image / 255).astype(np.float32)),  # Pillow's mode F
    ],
)
def test_images_of_one_channel(image):
    samples = [(image(pixels[0]), i % 3) for i, pixels in enumerate(PIXELS)]
    assert_is(load(given(pair_of(samples))), ((PIXELS[:, :1], LABELS), (PIXELS[:, :1], LABELS)))


def test_classes_groups_and_image_size_of_map_style_data_sets():
    train = Samples((pixels.transpose(1, 2, 0), i % 3) for i, pixels in enumerate(PIXELS))
    train.classes, train.groups = list("abcde"), [0, 0, 1, 1, 2, 2]
    data = load(given(pair_of(train)), image_size=4)
    assert (data.num_classes, data.input_shape) == (5, (3, 4, 4))
    assert (data.train_groups.dtype, data.train_groups.tolist()) == (np.int64, train.groups)
    train.groups = train.groups[:-1]
    with pytest.raises(DataError, match=r"train_groups must be int64 \[6\], got int64 \(5,\)"):
        load(given(pair_of(train)), image_size=4)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (PIXELS[0], r"must be \(image, label\), got ndarray"),
        ((PIXELS[0].transpose(1, 2, 0), 1.0), "the label must be a whole number ≥ 0, got 1.0"),
        ((PIXELS[0].transpose(1, 2, 0), None), "the label must be a whole number ≥ 0, got None"),
        ((torch.randn(3, 5, 4), 1), "floating pixels must lie in 0 … 1, got .*; leave Normalize out"),
        ((torch.full((3, 5, 4), torch.nan), 1), "floating pixels must lie in 0 … 1, got nan"),
        ((torch.zeros(3, 5, 4, dtype=torch.int64), 1), "pixels must be uint8 or floating, got int64"),
        ((torch.zeros(2, 5, 4), 1), r"1, 3 or 4 channels, got .*2, 5, 4"),
        ((np.zeros(4, np.uint8), 1), r"1, 3 or 4 channels, got \(4,\)"),
        ((torch.zeros(3, 5, 5), 1), "5×5 pixels in 3 channels, but the images before it have 5×4 in 3"),
        ((Image.fromarray(np.full((5, 4), 1000, np.uint16)), 1), "pixels must be uint8 or floating, got uint16"),
        ((Image.fromarray(np.full((5, 4), 1000, np.int32)), 1), "pixels must be uint8 or floating, got int32"),
        ((PIXELS[0].transpose(1, 2, 0), -1), "the label must be a whole number ≥ 0, got -1"),
    ],
)
def test_a_sample_that_will_not_do_is_named(sample, message):
    samples = [(pixels.transpose(1, 2, 0), i % 3) for i, pixels in enumerate(PIXELS)]
    samples[4] = sample
    with pytest.raises(DataError, match=message) as error:
        load(given(pair_of(samples)))
    assert "\n" not in str(error.value)
    assert "made, train split, sample 4: " in str(error.value)


@pytest.mark.parametrize("value", [None, lambda data_dir: pair[0], lambda data_dir: (pair[0], 3), (1, 2), pair[:1]])
def test_what_is_no_data_set_is_refused(value):
    with pytest.raises(DataError, match=r"the loader must return a fedwsa\.data\.Dataset, or \(train, test\)"):
        load(given(value))


def test_a_loader_must_make_the_images_of_the_size_that_it_was_given():
    """One that keeps what it read before in a cache, for example, whatever size that was for."""
    made = load(given(pair))
    where = given(lambda data_dir, image_size=0: made)
    assert load(where).input_shape == (3, 5, 4)
    with pytest.raises(DataError, match=r"image-size = 7: the loader of .* made images of 5×4"):
        load(where, image_size=7)


def test_an_empty_split_is_refused():
    with pytest.raises(DataError, match="made, test split: it has no samples"):
        load(given(pair_of(pair[0], [])))
