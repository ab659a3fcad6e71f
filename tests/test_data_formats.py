"""Data sets in their original formats: what is read, and what is said about files that are damaged."""

import os
import pickle
import shutil
import signal
import sys

import numpy as np
import pytest
from originals import WRITERS, assert_is, python_2_pickle, splits, write_cifar10, write_cub_200, write_image, write_svhn
from PIL import Image
from scipy.io import savemat
from torchvision.transforms import functional

from experiments import cli
from fedwsa.data import DATASETS, DataError, cifar, load
from fedwsa.data.images import fit


def complaint(name, folder, **options) -> str:
    """The one line that is said about it."""
    with pytest.raises(DataError) as error:
        load(name, folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- every registered data set


def test_every_data_set_is_here():
    assert {"digits", *WRITERS} == DATASETS.keys()


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_in_the_files_is_read_and_read_again_from_the_cache(name, tmp_path):
    expected = WRITERS[name](tmp_path)
    for _ in range(2):
        data = load(name, tmp_path)
        assert_is(data, expected)
        assert (data.name, data.scale) == (name, 255.0)
    assert data.num_classes == {"cifar100": 100, "image-folder": 3, "cub-200": 5}.get(name, 10)


def command(monkeypatch, *arguments) -> int:
    """The command in this process, without a report; its exit status."""
    monkeypatch.setattr("experiments.run.write_report", lambda folder: folder / "report.html")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
    monkeypatch.setattr(sys, "argv", ["fedwsa", *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", WRITERS)
def test_the_command_trains_on_it(name, tmp_path, monkeypatch, capfd):
    WRITERS[name](tmp_path)
    sizes = ("--num-clients=2", "--rounds=1", "--set=cohort=2", "--set=evaluation-cohort=2", "--set=server-samples=5")
    changes = ("--set=partitioner=iid", "--set=feature-shift=noise", "--set=augmentation=crop-flip")
    data, out = (f"--data={name}", f"--data-dir={tmp_path}"), tmp_path / "out"
    options = (*sizes, *changes, *data, f"--out={out}", "--engine=inprocess", "--strategies=fedavg")
    assert command(monkeypatch, "run", *options) == 0, capfd.readouterr().err
    assert (out / "fedavg" / "final.safetensors").is_file()


def test_the_command_says_in_a_line_which_file_is_damaged(tmp_path, monkeypatch, capfd):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-9])
    for verb in ("run", "partition"):
        assert command(monkeypatch, verb, "--data=cifar10", f"--data-dir={tmp_path}") == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if str(path) in line]
        assert line.startswith(f"fedwsa: {path}: cannot be read (")


@pytest.mark.parametrize("name", WRITERS)
def test_files_that_are_not_there_are_said(name, tmp_path, monkeypatch):
    monkeypatch.setattr("fedwsa.data.fashion_mnist.SYSTEM_DIR", tmp_path / "system")
    assert str(tmp_path / "none") in complaint(name, tmp_path / "none")
    assert name in complaint(name, None)


@pytest.mark.parametrize("name", WRITERS)
def test_the_test_split_shares_no_image_with_the_training_split(name, tmp_path):
    WRITERS[name](tmp_path)
    data = load(name, tmp_path)
    train, test = ({image.tobytes() for image in images} for images in (data.train_images, data.test_images))
    assert not train & test


# ---- CIFAR


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvision_reads_the_same_cifar(name, tmp_path):
    from torchvision import datasets

    WRITERS[name](tmp_path)
    published = getattr(datasets, name.upper())

    class Unchecked(published):
        """The checksums are those of the whole data set."""

        train_list = tuple((file, None) for file, _ in published.train_list)
        test_list = tuple((file, None) for file, _ in published.test_list)
        base_folder = published.base_folder if name == "cifar10" else ""

        def _load_meta(self):
            pass

    data = load(name, tmp_path)
    for train, images, labels in (
        (True, data.train_images, data.train_labels),
        (False, data.test_images, data.test_labels),
    ):
        theirs = Unchecked(tmp_path, train=train)
        np.testing.assert_array_equal(images, theirs.data.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(labels, theirs.targets)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickle_is_read(protocol, tmp_path):
    (images, labels), _ = splits(3, 32)
    entry = {"data": images.reshape(-1, 3072), "labels": labels.tolist()}
    (tmp_path / "batch").write_bytes(pickle.dumps(entry, protocol))
    read_images, read_labels = cifar.read_batch(tmp_path / "batch", "labels")
    np.testing.assert_array_equal(read_images, images)
    np.testing.assert_array_equal(read_labels, labels)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-900], r"cannot be read \(.*\); get the file again"),
        (lambda content: content[:40], r"cannot be read"),
        (lambda content: b"", r"cannot be read \(Ran out of input\)"),
        (lambda content: b"<html>404</html>", "cannot be read"),
        (lambda content: pickle.dumps([1]), "not a file of CIFAR, it must hold data and labels"),
        (lambda content: content.replace(b"labels", b"labors"), "it must hold data and labels"),
        (
            lambda content: python_2_pickle(np.zeros((3, 3072), np.uint8), "labels", [1, 2]),
            r"3 images, but its labels are int64 \(2,\)",
        ),
        (
            lambda content: python_2_pickle(np.zeros((2, 3071), np.uint8), "labels", [1, 2]),
            r"data must be uint8 \[N, 3072\], got uint8 \(2, 3071\)",
        ),
    ],
)
def test_a_damaged_batch_is_named(damage, message, tmp_path):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        load("cifar10", tmp_path)
    assert complaint("cifar10", tmp_path).startswith(f"{path}: ")


def test_a_batch_runs_no_code(tmp_path):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "made")))
    assert "it asks for posix.mkdir, which no array needs" in complaint("cifar10", tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_missing_batch_is_named(tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    assert f"{tmp_path}/cifar-10-batches-py (there data_batch_4 is missing)" in complaint("cifar10", tmp_path)


# ---- SVHN


def matlab(**changes):
    (images, labels), _ = splits(3, 32)
    content = {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None].astype(np.uint8), **changes}
    return lambda path: savemat(path, {key: value for key, value in content.items() if value is not None})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"<html>404</html>" * 20), "cannot be read"),
        (matlab(X=None), r"cannot be read \('X'\)"),
        (matlab(y=np.ones((59, 1), np.uint8)), r"60 images, but labels of shape \(59,\)"),
        (matlab(X=np.zeros((32, 32, 3, 60))), r"X must be uint8 \[32, 32, 3, N\], got float64"),
        (matlab(X=np.zeros((32, 31, 3, 60), np.uint8)), r"X must be uint8 \[32, 32, 3, N\], got uint8"),
        (matlab(y=np.full((60, 1), 11, np.uint8)), r"svhn, test split: labels must lie in 0\.\.9, got 11\.\.11"),
    ],
)
def test_a_damaged_matlab_file_is_named(damage, message, tmp_path):
    write_svhn(tmp_path)
    path = tmp_path / "test_32x32.mat"
    damage(path)
    with pytest.raises(DataError, match=message):
        load("svhn", tmp_path)
    assert complaint("svhn", tmp_path).startswith((f"{path}: ", "svhn, test split: "))


# ---- folders of images


def test_torchvision_finds_the_same_images_in_folders(tmp_path):
    from torchvision.datasets import ImageFolder

    WRITERS["image-folder"](tmp_path)
    write_image(tmp_path / "train" / "kind 1" / "deeper" / "one more.PNG", np.full((3, 16, 16), 7, np.uint8))
    Image.new("L", (16, 16), 9).save(tmp_path / "train" / "kind 1" / "deeper" / "grey.png")
    (tmp_path / "train" / "kind 0" / "notes.txt").write_text("no image")
    data = load("image-folder", tmp_path)
    for name, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        theirs = ImageFolder(tmp_path / name)
        assert labels.tolist() == theirs.targets
        ours = sorted(zip(labels.tolist(), (image.transpose(1, 2, 0).tobytes() for image in images), strict=True))
        assert ours == sorted((label, np.asarray(image).tobytes()) for image, label in theirs)


@pytest.mark.parametrize(("suffix", "kind"), [("png", np.uint16), ("tif", np.int32), ("tif", np.float32)])
def test_images_of_more_than_8_bits_are_refused_and_not_clipped(suffix, kind, tmp_path):
    WRITERS["image-folder"](tmp_path)
    path = tmp_path / "train" / "kind 1" / f"deep.{suffix}"
    Image.fromarray(np.full((16, 16), 1000, kind)).save(path)
    with pytest.raises(DataError, match=rf"deep\.{suffix}: cannot be read as an image \(more than 8 bits a channel"):
        load("image-folder", tmp_path)


def test_val_stands_for_test_and_a_class_may_be_missing_there(tmp_path):
    _, (images, labels) = WRITERS["image-folder"](tmp_path)
    (tmp_path / "test").rename(tmp_path / "val")
    shutil.rmtree(tmp_path / "val" / "kind 1")
    data = load("image-folder", tmp_path)
    np.testing.assert_array_equal(data.test_labels, labels[labels != 1])
    np.testing.assert_array_equal(data.test_images, images[labels != 1])


def test_image_size_cuts_the_middle_and_scales_it():
    image = np.random.default_rng(0).integers(0, 256, (8, 14, 3), np.uint8)
    np.testing.assert_array_equal(fit(image, 8), image[:, 3:11])
    np.testing.assert_array_equal(fit(image.transpose(1, 0, 2), 8), image.transpose(1, 0, 2)[3:11])
    np.testing.assert_array_equal(fit(np.full((30, 50, 1), 7, np.uint8), 20), np.full((20, 20, 1), 7))
    assert fit(image, 0) is image


@pytest.mark.parametrize("size", [3, 8, 13])
@pytest.mark.parametrize("shape", [(8, 14, 3), (20, 12, 3), (9, 9, 3)])
def test_torchvision_cuts_and_scales_alike(shape, size):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    square = functional.center_crop(Image.fromarray(image), [min(shape[:2])] * 2)
    np.testing.assert_array_equal(fit(image, size), np.asarray(functional.resize(square, [size, size])))


def test_images_of_many_sizes_need_an_image_size(tmp_path):
    (train_images, _), _ = WRITERS["image-folder"](tmp_path)
    write_image(tmp_path / "train" / "kind 2" / "z.png", np.full((3, 16, 24), 7, np.uint8))
    said = complaint("image-folder", tmp_path)
    assert said.startswith(
        f"{tmp_path}/train/kind 2/z.png: 16×24 pixels in 3 channels, but the images before it have 16×16"
    )
    assert "image-size = N" in said
    data = load("image-folder", tmp_path, image_size=16)
    np.testing.assert_array_equal(data.train_images[:-1], train_images)
    np.testing.assert_array_equal(data.train_images[-1], np.full((3, 16, 16), 7))
    assert load("image-folder", tmp_path, image_size=8).input_shape == (3, 8, 8)


def test_data_sets_of_one_size_refuse_an_image_size(tmp_path):
    assert complaint("digits", None, image_size=8) == "image-size = 8: the images of digits have one size; allowed is 0"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "cannot be read as an image"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "cannot be read as an image"),
        (lambda path: path.write_bytes(b"no image"), "cannot be read as an image"),
        (lambda path: path.write_bytes(b""), "cannot be read as an image"),
    ],
)
def test_an_unreadable_image_is_named(damage, message, tmp_path):
    WRITERS["image-folder"](tmp_path)
    path = tmp_path / "test" / "kind 1" / "004.png"
    damage(path)
    assert complaint("image-folder", tmp_path).startswith(f"{path}: {message}")


def test_folders_that_make_no_data_set_are_said(tmp_path):
    WRITERS["image-folder"](tmp_path)
    (tmp_path / "test" / "new kind").mkdir()
    assert (
        complaint("image-folder", tmp_path) == f"{tmp_path}/test/new kind: the training split has no class of this name"
    )
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "test").mkdir()
    assert complaint("image-folder", tmp_path).startswith(f"{tmp_path}/test: no image in any folder of it")
    (tmp_path / "test").rmdir()
    assert complaint("image-folder", tmp_path).startswith(f"{tmp_path}: needs the folders train/ and test/ (or val/)")


# ---- CUB-200


def replace_text(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


BIRD = "images/002.Some_bird/Some_bird_0003.png"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "image_class_labels.txt",
            ("3 2\n", ""),
            "its images are not those of images.txt; image 3 is",
        ),
        ("image_class_labels.txt", ("3 2\n", "3 two\n"), "image 3 has 'two'; allowed is a whole number ≥ 1"),
        ("image_class_labels.txt", ("3 2\n", "3 0\n"), "image 3 has '0'; allowed is a whole number ≥ 1"),
        ("train_test_split.txt", ("3 1\n", "3 2\n"), "image 3 has '2'; allowed is 0 to 1"),
        ("images.txt", ("4 ", "3 "), 'line 4 must be "image value" with an image of its own'),
        ("images.txt", b"\xff\xfe", "cannot be read"),
        (BIRD, None, "no such file, but images.txt has it"),
        (BIRD, b"?", "cannot be read"),
    ],
)
def test_damaged_lists_and_images_of_cub_are_named(name, damage, message, tmp_path):
    write_cub_200(tmp_path)
    path = tmp_path / "CUB_200_2011" / name
    if damage is None:
        path.unlink()
    elif isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        replace_text(path, *damage)
    assert complaint("cub-200", tmp_path).startswith(f"{path}: {message}")


def test_a_missing_list_of_cub_is_named(tmp_path):
    write_cub_200(tmp_path)
    (tmp_path / "CUB_200_2011" / "train_test_split.txt").unlink()
    assert "CUB_200_2011 (there train_test_split.txt is missing)" in complaint("cub-200", tmp_path)


def test_the_split_of_cub_is_its_own(tmp_path):
    (images, labels), _ = write_cub_200(tmp_path)
    replace_text(tmp_path / "CUB_200_2011" / "train_test_split.txt", "3 1\n", "3 0\n")
    data = load("cub-200", tmp_path)
    np.testing.assert_array_equal(data.train_images, np.delete(images, 1, 0))  # the third in the files
    np.testing.assert_array_equal(data.test_images[1], images[1])
    np.testing.assert_array_equal(data.train_labels, np.delete(labels, 1))
