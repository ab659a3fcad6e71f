"""The cache of decoded data: the same bytes, once a machine, whatever happens to its files."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import helpers
import numpy as np
import pytest

from fedwsa.data import DataError, Dataset, cached, digits, fashion_mnist, load
from fedwsa.data.cache import ARRAYS, cache_folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDWSA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(seed=0, **changes) -> Dataset:
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (40, 3, 8, 9), np.uint8), np.arange(40) % 4
    groups = np.arange(40) % 7
    values = {"num_classes": 4, "scale": 255.0, "train_groups": groups, **changes}
    return Dataset("made", images, labels, images[:9], labels[:9], **values)


class Reader:
    """A loader that counts how often it reads."""

    def __init__(self, source, dataset=None) -> None:
        self.source, self.dataset, self.reads = source, dataset or make(), 0
        source.write_bytes(b"source")

    def read(self) -> Dataset:
        self.reads += 1
        return self.dataset

    def load(self, *settings) -> Dataset:
        return cached("made", [self.source], self.read, *settings)


@pytest.fixture
def reader(tmp_path):
    return Reader(tmp_path / "source")


def assert_equal(a: Dataset, b: Dataset) -> None:
    for field in ARRAYS:
        x, y = getattr(a, field), getattr(b, field)
        assert (x is None) == (y is None)
        assert x is None or (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
    assert (a.name, a.num_classes, a.scale) == (b.name, b.num_classes, b.scale)


def entry(folder) -> Path:
    """The one data set that is cached."""
    (only,) = folder.iterdir()
    return only


# ---- what comes out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_groups": None},
        {"mean": [0.1, 0.2, 0.3], "std": [3.0, 2.0, 1.0]},
        {"num_classes": np.int64(4), "scale": np.float32(255)},  # as NumPy's own max() gives them
    ],
)
def test_what_was_read_comes_back_from_files(tmp_path, changes):
    reader = Reader(tmp_path / "source", make(**changes))
    for _ in range(3):
        data = reader.load()
        assert_equal(data, reader.dataset)
        assert isinstance(data.train_images.base, np.memmap)
        assert not data.train_images.flags.writeable
    assert reader.reads == 1
    for ours, theirs in zip(
        data.train_tensors(np.array([3, 0])), make(**changes).train_tensors(np.array([3, 0])), strict=True
    ):
        assert ours.numpy().tobytes() == theirs.numpy().tobytes()


def test_arrays_of_any_layout_come_back(tmp_path):
    images = np.asfortranarray(make().train_images)
    labels = make().train_labels
    reader = Reader(tmp_path / "source", Dataset("made", images, labels, images[::2], labels[::2], 4, 255.0))
    reader.load()
    assert_equal(reader.load(), reader.dataset)
    assert reader.reads == 1


def test_other_sources_settings_and_names_are_other_entries(reader, tmp_path):
    reader.load()
    for number, change in enumerate(
        (
            lambda: reader.source.write_bytes(b"longer source"),
            lambda: os.utime(reader.source, ns=(0, 1)),
            lambda: os.utime(reader.source, ns=(0, 2)),
        ),
        start=2,
    ):
        change()
        reader.load()
        reader.load()
        assert reader.reads == number
    reader.load("setting")
    reader.load("another")
    cached("other", [reader.source], reader.read)
    cached("made", [reader.source, tmp_path], reader.read)
    assert reader.reads == 8
    reader.load("setting")
    assert reader.reads == 8


def test_what_a_loader_complains_about_is_not_cached(folder, tmp_path):
    (tmp_path / "source").touch()

    def complain() -> Dataset:
        raise DataError("source: damaged")

    for _ in range(2):
        with pytest.raises(DataError, match="source: damaged"):
            cached("made", [tmp_path / "source"], complain)
    assert {path.name for path in entry(folder).iterdir()} == {"lock"}


def test_a_new_scikit_learn_is_a_new_entry(monkeypatch, folder):
    first = load("digits")
    monkeypatch.setattr(digits, "version", lambda package: f"{package} of tomorrow")
    assert_equal(load("digits"), first)
    assert len(list(folder.iterdir())) == 2


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path(os.environ["FEDWSA_CACHE"])
    monkeypatch.setenv("FEDWSA_CACHE", "")
    assert cache_folder() == Path("/somewhere/fedwsa")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/someone/.cache/fedwsa")


# ---- damage


def flip_a_byte(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"\x93NUMPY garbage"),
    "a byte": flip_a_byte,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "another array": lambda path: np.save(path.open("wb"), np.zeros(3)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", [*(f"{field}.npy" for field in ARRAYS), "dataset.json"])
def test_a_damaged_file_is_made_again(reader, folder, name, damage):
    reader.load()
    time.sleep(0.02)  # times of change are as coarse as the system's tick
    damage(entry(folder) / name)
    assert_equal(reader.load(), reader.dataset)
    assert reader.reads == 2
    assert_equal(reader.load(), reader.dataset)
    assert reader.reads == 2


@pytest.mark.parametrize("manifest", ["[]", "{}", "3", '{"fields": {}, "stamps": {}}', '{"fields": 1, "stamps": 2}'])
def test_a_manifest_of_something_else_is_made_again(reader, folder, manifest):
    reader.load()
    (entry(folder) / "dataset.json").write_text(manifest)
    assert_equal(reader.load(), reader.dataset)
    assert reader.reads == 2


def test_a_process_that_mapped_it_goes_on_when_it_is_made_again(reader, folder):
    mapped = reader.load()
    (entry(folder) / "dataset.json").unlink()
    reader.load()
    for path in entry(folder).iterdir():
        path.unlink()
    assert_equal(mapped, reader.dataset)


# ---- where nothing can be written


def test_without_a_folder_the_arrays_are_in_memory(reader, folder, caplog):
    folder.write_text("a file, where a folder is needed")
    for _ in range(2):
        assert reader.load() is reader.dataset
    assert (
        "cannot be written (Not a directory): each process holds made by itself; FEDWSA_CACHE may name" in caplog.text
    )


def test_on_a_full_disk_the_arrays_are_in_memory_and_nothing_is_left(reader, folder, monkeypatch):
    def full(file, array, **options):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", full)
        assert reader.load() is reader.dataset
    assert {path.name for path in entry(folder).iterdir()} == {"lock"}
    assert_equal(reader.load(), reader.dataset)
    assert isinstance(reader.load().train_images.base, np.memmap)


# ---- several processes

CONCURRENT = """
import sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from test_data_cache import make, digest
from fedwsa.data import cached

source, go, log = map(Path, sys.argv[1:])
def read():
    with log.open("a") as file:
        file.write("read\\n")
    time.sleep(0.3)
    return make()
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
print(digest(cached("made", [source], read)))
"""


def digest(data: Dataset) -> str:
    return hashlib.sha256(b"".join(getattr(data, field).tobytes() for field in ARRAYS)).hexdigest()


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.process
def test_of_processes_that_load_at_once_one_reads(tmp_path):
    source, go, log = tmp_path / "source", tmp_path / "go", tmp_path / "log"
    source.write_text("source")
    processes = [start(CONCURRENT, source, go, log) for _ in range(3)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
    go.touch()
    assert {process.communicate()[0].strip() for process in processes} == {digest(make())}
    assert log.read_text() == "read\n"


@pytest.mark.process
def test_a_process_that_is_killed_while_it_reads_leaves_the_way_free(tmp_path, folder):
    source, go, log = tmp_path / "source", tmp_path / "go", tmp_path / "log"
    source.write_text("source")
    go.touch()
    process = start(CONCURRENT.replace("time.sleep(0.3)", "time.sleep(300)"), source, go, log)
    while not log.exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert_equal(cached("made", [source], make), make())
    assert isinstance(cached("made", [source], make).train_images.base, np.memmap)


PROBE = """
import json, time
import numpy as np
from fedwsa.data import load

def kilobytes():
    lines = [line.split() for line in open("/proc/self/status")]
    return {line[0]: int(line[1]) for line in lines if line[0] in ("VmRSS:", "RssAnon:")}

load("digits").train_tensors(np.arange(600))  # what is imported does not count
before, start = kilobytes(), time.perf_counter()
data = load("fashion-mnist")
seconds = time.perf_counter() - start
for first in range(0, len(data.train_labels), 600):
    data.train_tensors(np.arange(first, first + 600))
for first in range(0, len(data.test_labels), 1000):
    data.test_tensors(slice(first, first + 1000))
after = kilobytes()
print(json.dumps({"seconds": seconds, **{name: after[name] - before[name] for name in after}}), flush=True)
input()
"""


@pytest.mark.process
def test_fashion_mnist_is_in_memory_once_for_all_processes(tmp_path, monkeypatch):
    helpers.require_fashion_mnist()
    monkeypatch.setenv("FEDWSA_CACHE", str(tmp_path / "empty cache"))
    load("digits")
    start_time = time.perf_counter()
    first = load("fashion-mnist")
    seconds_of_the_first = time.perf_counter() - start_time
    processes = [start(PROBE) for _ in range(2)]
    try:
        grown = [json.loads(process.stdout.readline()) for process in processes]
    finally:
        for process in processes:
            process.communicate("\n")
    for each in grown:
        assert each["VmRSS:"] * 1024 < 60e6  # pages of the one mapped file, which each process counts, included
        assert each["RssAnon:"] * 1024 < 10e6  # what is its own
        assert each["seconds"] < seconds_of_the_first / 2
    monkeypatch.setenv("FEDWSA_CACHE", os.devnull)
    assert_equal(fashion_mnist.load(), first)


def test_clients_get_their_tensors_as_fast_as_from_memory():
    data = helpers.require_fashion_mnist()
    indices = np.sort(np.random.default_rng(0).permutation(60000)[:600])
    copied = Dataset("copy", *(np.array(getattr(data, field)) for field in ARRAYS[:4]), 10, 255.0)

    def seconds(dataset):
        times = []
        for _ in range(30):
            start_time = time.perf_counter()
            dataset.train_tensors(indices)
            times.append(time.perf_counter() - start_time)
        return min(times)

    seconds(data)
    assert seconds(data) < 1.5 * seconds(copied) + 5e-5
