import gzip
import hashlib
import inspect
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from originals import idx_bytes

from fedwsa.config import Config
from fedwsa.data import DATASETS, DataError, Dataset, digits, fashion_mnist, held_out, idx, load, server_split
from fedwsa.data.dataset import channel_statistics
from fedwsa.registry import lookup

# ---- registry


def test_lookup_takes_a_registered_name_or_an_import_path():
    assert lookup({"one": 1}, "one", "number") == 1
    assert lookup({"length": len}, "inspect:signature", "function") is inspect.signature


@pytest.mark.parametrize(
    "name", ["three", "", ":", "inspect:", ":signature", "inspect:no_such", "no_such:x", ".inspect:x"]
)
def test_lookup_names_the_kind_the_name_and_what_is_registered(name):
    with pytest.raises(ValueError, match="unknown number") as error:
        lookup({"two": 2, "one": 1}, name, "number")
    assert repr(name) in str(error.value)
    assert "registered are one, two;" in str(error.value)
    assert "\n" not in str(error.value)


# ---- Dataset


def make(**changes):
    rng = np.random.default_rng(0)
    fields = {
        "name": "made",
        "train_images": rng.integers(0, 256, (12, 3, 4, 5), np.uint8),
        "train_labels": np.arange(12) % 3,
        "test_images": rng.integers(0, 256, (6, 3, 4, 5), np.uint8),
        "test_labels": np.arange(6) % 3,
        "num_classes": 3,
        "scale": 255.0,
    }
    return Dataset(**(fields | changes))


def not_a_dataset(data_dir):
    return data_dir


def only_where_told(data_dir):
    return make(name=str(data_dir))


@given(
    arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))),
    st.sampled_from([1.0, 16.0, 255.0]),
)
def test_channel_statistics_are_mean_and_population_std(images, scale):
    mean, std = channel_statistics(images, scale)
    np.testing.assert_allclose(mean, (images / scale).mean((0, 2, 3)), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(std, (images / scale).std((0, 2, 3)), rtol=1e-9, atol=1e-9)


def test_channel_statistics_of_more_images_than_a_block():
    images = np.random.default_rng(0).integers(0, 256, (2500, 2, 3, 3), np.uint8)
    mean, std = channel_statistics(images, 255.0)
    np.testing.assert_allclose(mean, (images / 255.0).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255.0).std((0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("given_statistics", [{}, {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 2.0]}])
def test_tensors_are_the_samples_asked_for_scaled_and_normalised(given_statistics):
    data, indices = make(**given_statistics), np.array([7, 0, 7, 3])
    images, labels = data.train_tensors(indices)
    scaled = data.train_images[indices] / 255.0
    expected = (scaled - data.mean[:, None, None]) / data.std[:, None, None]
    assert (images.dtype, labels.dtype, images.shape) == (torch.float32, torch.int64, (4, 3, 4, 5))
    np.testing.assert_allclose(images.numpy(), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(labels, [1, 0, 1, 0])

    images, labels = data.test_tensors()
    expected = (data.test_images / 255.0 - data.mean[:, None, None]) / data.std[:, None, None]
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    np.testing.assert_allclose(images.numpy(), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(labels, data.test_labels)


def test_the_training_split_has_mean_zero_and_std_one_and_the_test_split_does_not_count():
    data = make()
    images, _ = data.train_tensors(np.arange(12))
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-6)
    dark = make(test_images=np.zeros((6, 3, 4, 5), np.uint8))
    np.testing.assert_array_equal(dark.mean, data.mean)


def test_tensors_are_copies():
    data = make()
    for images, labels in (data.train_tensors(np.arange(12)), data.test_tensors()):
        images.zero_()
        labels.fill_(2)
    fresh = make()
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(data, field), getattr(fresh, field))


@pytest.mark.filterwarnings("error")
def test_read_only_arrays_will_do():
    data = make()
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        getattr(data, field).flags.writeable = False
    data.train_tensors(np.arange(2))[0].zero_()
    data.test_tensors()[1].zero_()


def test_pixels_are_changed_before_they_are_normalised():
    data, indices = make(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 2.0]), np.array([3, 3, 8])
    images, labels = data.train_tensors(indices, change=lambda pixels: 1 - pixels)
    expected = (1 - data.train_images[indices] / 255.0 - data.mean[:, None, None]) / data.std[:, None, None]
    np.testing.assert_allclose(images.numpy(), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(labels, [0, 0, 2])


def test_groups_are_kept_and_needed_by_nothing():
    groups = np.arange(12) // 5
    np.testing.assert_array_equal(make(train_groups=groups).train_groups, groups)
    assert make().train_groups is None


@pytest.mark.parametrize("statistic", ["mean", "std"])
def test_one_statistic_that_is_given_does_not_change_the_other(statistic):
    expected, data = make(), make(**{statistic: [0.7, 0.7, 0.7]})
    other = {"mean": "std", "std": "mean"}[statistic]
    np.testing.assert_array_equal(getattr(data, statistic), [0.7] * 3)
    np.testing.assert_array_equal(getattr(data, other), getattr(expected, other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_groups": np.arange(11)}, r"made: train_groups must be int64 \[12\], got int64 \(11,\)"),
        ({"train_groups": np.zeros(12)}, r"made: train_groups must be int64 \[12\], got float64 \(12,\)"),
        ({"train_labels": np.arange(11) % 3}, r"made, train split: labels must be int64 \[12\], got int64 \(11,\)"),
        ({"test_labels": np.zeros(6)}, r"made, test split: labels must be int64 \[6\], got float64"),
        ({"train_labels": np.arange(12) % 4}, r"made, train split: labels must lie in 0\.\.2, got 0\.\.3"),
        ({"test_labels": np.full(6, -1)}, r"made, test split: labels must lie in 0\.\.2, got -1\.\.-1"),
        ({"train_images": np.zeros((12, 3, 4, 5))}, "train split: images must be uint8"),
        ({"train_images": np.zeros((12, 4, 5), np.uint8)}, "train split: images must be uint8"),
        ({"test_images": np.zeros((0, 3, 4, 5), np.uint8)}, "test split: images must be uint8 .* N > 0"),
        ({"test_images": np.zeros((6, 3, 5, 4), np.uint8)}, "test images are .3, 5, 4., train are .3, 4, 5."),
        ({"num_classes": 0}, "made: num_classes must be ≥ 1, got 0"),
        ({"scale": 0.0}, "scale must be finite and > 0, got 0.0"),
        ({"scale": float("nan")}, "scale must be finite and > 0, got nan"),
        ({"mean": [0.0]}, "mean must be finite, one number a channel"),
        ({"mean": [0.0, float("nan"), 0.0]}, "mean must be finite, one number a channel"),
        ({"std": [1.0, 0.0, 1.0]}, "std must be finite and > 0, one number a channel"),
        ({"train_images": np.zeros((12, 3, 4, 5), np.uint8)}, "std must be finite and > 0"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        make(**changes)


# ---- load


def test_load_takes_an_import_path_to_a_loader_and_passes_the_folder_on():
    assert load(f"{__name__}:only_where_told", Path("there")).name == "there"


@pytest.mark.parametrize("name", sorted(DATASETS.keys() - {"digits"}))
def test_a_folder_that_is_none_is_said_and_not_passed_over(tmp_path, name):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(DataError) as error:
            load(name, folder)
        assert str(error.value) == f"data-dir = {folder}: there is no such folder"


def test_digits_have_no_folder(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            DataError, match=r"^data-dir = .*: digits has no files of its own; allowed with it is none$"
        ):
            load("digits", folder)


def test_load_refuses_what_is_no_dataset():
    with pytest.raises(
        DataError, match=r"not_a_dataset: the loader must return a fedwsa\.data\.Dataset, .* got NoneType"
    ):
        load(f"{__name__}:not_a_dataset")


def without_arguments():
    raise AssertionError("called")


def test_load_refuses_a_function_that_does_not_take_the_folder():
    with pytest.raises(ValueError, match=r"data set 'test_data:without_arguments' does not take \(data_dir\), and"):
        load("test_data:without_arguments")


def test_load_of_an_unknown_name_lists_the_registered():
    with pytest.raises(ValueError, match=r"unknown data set 'mnits'.*digits, fashion-mnist, image-folder, mnist"):
        load("mnits")
    assert list(DATASETS) == [
        "digits",
        "mnist",
        "fashion-mnist",
        "cifar10",
        "cifar100",
        "svhn",
        "image-folder",
        "cub-200",
    ]


# ---- server_split

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=200)


@given(LABELS, st.data(), st.integers(0, 2**32 - 1))
def test_server_split_is_exact_disjoint_and_stratified(labels, data, seed):
    labels = np.array(labels)
    size = data.draw(st.integers(0, len(labels) - 1))
    server, clients = server_split(labels, size, np.random.default_rng(seed))
    assert len(server) == size
    assert (np.diff(server) > 0).all()
    assert (np.diff(clients) > 0).all()
    np.testing.assert_array_equal(np.sort(np.concatenate([server, clients])), np.arange(len(labels)))
    share = np.bincount(labels, minlength=7) * size / len(labels)
    assert (np.abs(np.bincount(labels[server], minlength=7) - share) < 1).all()
    again, _ = server_split(labels, size, np.random.default_rng(seed))
    np.testing.assert_array_equal(again, server)


def test_server_split_gives_the_largest_remainders_the_odd_samples():
    labels = np.repeat([0, 1, 2], [5, 3, 2])  # 4 of 10: shares 2.0, 1.2, 0.8
    server, _ = server_split(labels, 4, np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(labels[server]), [2, 1, 1])


def test_server_split_is_a_random_draw_inside_a_class():
    draws = [server_split(np.array([0, 1, 0, 1]), 2, np.random.default_rng(seed))[0] for seed in range(60)]
    assert {tuple(draw) for draw in draws} == {(0, 1), (0, 3), (1, 2), (2, 3)}


@pytest.mark.parametrize("size", [-1, 4, 5])
def test_server_split_leaves_the_clients_a_sample(size):
    with pytest.raises(ValueError, match=f"0 <= size < 4 samples .all there are., got {size}"):
        server_split([0, 1, 0, 1], size, np.random.default_rng(0))


@pytest.mark.parametrize("size", [1438, 5000])
def test_a_config_whose_server_takes_every_sample_names_the_key(size):
    config = Config.model_validate({"server_samples": size})
    labels = load("digits").train_labels
    with pytest.raises(DataError, match=f"^server-samples = {size}: allowed is less than the 1438 training samples"):
        held_out(config, labels)


# ---- digits


@pytest.fixture(scope="module")
def sklearn_digits():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


def test_digits_are_those_of_scikit_learn(sklearn_digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # an import would fail
    np.testing.assert_array_equal(digits.read_table(), sklearn_digits)


def test_digits_fall_back_to_scikit_learns_own_loader(sklearn_digits, monkeypatch):
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    table = digits.read_table()
    assert table.dtype == np.uint8
    np.testing.assert_array_equal(table, sklearn_digits)


def test_digits_are_split_four_to_one_within_each_class(sklearn_digits):
    data = load("digits")
    assert (data.input_shape, data.num_classes, data.scale) == ((1, 8, 8), 10, 16.0)
    assert (len(data.train_labels), len(data.test_labels)) == (1438, 359)
    share = np.bincount(sklearn_digits[:, 64].astype(int)) * 359 / 1797
    assert (np.abs(np.bincount(data.test_labels) - share) < 1).all()
    images = np.concatenate([data.train_images, data.test_images]).reshape(-1, 64)
    labels = np.concatenate([data.train_labels, data.test_labels])
    ours, theirs = np.column_stack([images, labels]), sklearn_digits
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


def test_the_split_of_digits_never_changes():
    """Results on another test split can't be compared with the published ones: a new NumPy must not move it."""
    data = load("digits")
    test_split = data.test_images.tobytes() + data.test_labels.tobytes()
    assert hashlib.sha256(test_split).hexdigest()[:16] == "68e03d7f6c850b85"


# ---- fashion-mnist


def contents():
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (30, 6, 5), np.uint8), rng.integers(0, 256, (20, 6, 5), np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 10
    return dict(zip(idx.FILES, (train, labels, test, labels[:20]), strict=True))


def write(folder, files, suffix):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in files.items():
        content = idx_bytes(array)
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix else content)


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIR", tmp_path / "system")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("fashion-mnist", "."), ("fashion-mnist", "FashionMNIST/raw"), ("mnist", "."), ("mnist", "MNIST/raw")],
)
@pytest.mark.usefixtures("nothing_installed")
def test_the_four_files_are_read_plain_or_gzipped_from_either_layout(tmp_path, name, folder, suffix):
    files = contents()
    write(tmp_path / folder, files, suffix)
    data = load(name, tmp_path)
    splits = (data.train_images[:, 0], data.train_labels, data.test_images[:, 0], data.test_labels)
    for read, file in zip(splits, idx.FILES, strict=True):
        np.testing.assert_array_equal(read, files[file])
    assert (data.name, data.input_shape, data.num_classes, data.scale) == (name, (1, 6, 5), 10, 255.0)


def test_missing_mnist_says_what_is_missing_where(tmp_path):
    with pytest.raises(DataError, match=r"mnist: no folder has all of .*; no data dir is given; get them by"):
        load("mnist")
    write(tmp_path, contents(), ".gz")
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError) as error:
        load("mnist", tmp_path)
    assert f"looked in {tmp_path} (there t10k-labels-idx1-ubyte is missing), {tmp_path}/MNIST/raw;" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
@pytest.mark.usefixtures("nothing_installed")
def test_torchvision_reads_the_same_from_the_same_files(tmp_path, name):
    from torchvision import datasets

    write(tmp_path / name / "raw", contents(), "")
    data = load({"MNIST": "mnist", "FashionMNIST": "fashion-mnist"}[name], tmp_path)
    for train, images, labels in (
        (True, data.train_images, data.train_labels),
        (False, data.test_images, data.test_labels),
    ):
        theirs = getattr(datasets, name)(tmp_path, train=train)
        np.testing.assert_array_equal(images[:, 0], theirs.data)
        np.testing.assert_array_equal(labels, theirs.targets)


def test_fashion_mnist_is_looked_for_in_order_and_all_four_files_in_one_folder(monkeypatch, tmp_path):
    own, raw, system = tmp_path / "own", tmp_path / "own" / "FashionMNIST" / "raw", tmp_path / "system"
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIR", system)
    write(system, contents(), ".gz")
    assert {path.parent for path in fashion_mnist.find_files(None)} == {system}
    assert {path.parent for path in fashion_mnist.find_files(own)} == {system}
    write(raw, contents(), ".gz")
    assert {path.parent for path in fashion_mnist.find_files(own)} == {raw}
    write(own, contents(), "")
    assert {path.parent for path in fashion_mnist.find_files(own)} == {own}
    (own / idx.FILES[3]).unlink()
    assert {path.parent for path in fashion_mnist.find_files(own)} == {raw}


@pytest.mark.usefixtures("nothing_installed")
def test_missing_fashion_mnist_says_where_it_looked_and_how_to_get_it(tmp_path):
    (tmp_path / "own").mkdir()
    with pytest.raises(DataError) as error:
        load("fashion-mnist", tmp_path / "own")
    message = str(error.value)
    assert "\n" not in message
    for part in (
        tmp_path / "own",
        tmp_path / "own/FashionMNIST/raw",
        tmp_path / "system",
        "apt-get install",
        "download",
    ):
        assert str(part) in message


@pytest.mark.parametrize("name", idx.FILES)
@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".gz", lambda content: gzip.compress(content)[:-9], "cannot be read .*truncated"),
        (".gz", lambda content: b"<html>404</html>", "cannot be read .*incorrect header"),
        (".gz", lambda content: b"", "cannot be read"),
        (".gz", lambda content: gzip.compress(content)[:-8] + bytes(8), "cannot be read .*incorrect data check"),
        (".gz", lambda content: gzip.compress(content[:-1]), "bytes of data where its header promises"),
        ("", lambda content: content[:-1], "bytes of data where its header promises"),
        ("", lambda content: content + b"\0", "bytes of data where its header promises"),
        ("", lambda content: bytes([0, 0, 9]) + content[3:], "not an idx file of bytes in . dimensions"),
        ("", lambda content: content[:3] + bytes([2]) + content[4:], "not an idx file of bytes"),
        ("", lambda content: content[:7], "not an idx file of bytes"),
        ("", lambda content: b"", "not an idx file of bytes"),
    ],
)
@pytest.mark.usefixtures("nothing_installed")
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, name, suffix, damage, message):
    files = contents()
    write(tmp_path, files, suffix)
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(damage(idx_bytes(files[name])))
    with pytest.raises(DataError, match=message) as error:
        load("fashion-mnist", tmp_path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("nothing_installed")
def test_fewer_labels_than_images_names_both_files(tmp_path):
    files = contents()
    files["t10k-labels-idx1-ubyte"] = files["t10k-labels-idx1-ubyte"][:-1]
    write(tmp_path, files, "")
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: 19 labels, but t10k-images-idx3-ubyte has 20 images"):
        load("fashion-mnist", tmp_path)


@pytest.mark.usefixtures("nothing_installed")
def test_a_label_that_is_no_class_is_refused(tmp_path):
    files = contents()
    files["train-labels-idx1-ubyte"] = files["train-labels-idx1-ubyte"] + np.uint8(1)
    write(tmp_path, files, "")
    with pytest.raises(DataError, match=r"fashion-mnist, train split: labels must lie in 0\.\.9, got 1\.\.10"):
        load("fashion-mnist", tmp_path)


def test_the_installed_fashion_mnist_is_the_published_one():
    data = helpers.require_fashion_mnist()
    assert data.input_shape == (1, 28, 28)
    np.testing.assert_array_equal(np.bincount(data.train_labels), [6000] * 10)
    np.testing.assert_array_equal(np.bincount(data.test_labels), [1000] * 10)
    # The statistics that are in general use for this data set.
    assert (round(data.mean.item(), 4), round(data.std.item(), 4)) == (0.2860, 0.3530)


@pytest.mark.usefixtures("nothing_installed")
def test_a_test_without_fashion_mnist_is_skipped_but_fails_in_ci(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install"):
        helpers.require_fashion_mnist()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="apt-get install"):
        helpers.require_fashion_mnist()
