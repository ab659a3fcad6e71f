"""Partitions as files: what is written is read back, and what does not fit is refused in a line."""

import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from federations import run, tiny
from hypothesis import given
from hypothesis import strategies as st
from test_np_merge_strategy import GIVEN

from clients.federation import federation
from experiments.partition_view import describe, partition_json
from fedwsa.data import digits
from partitions import stored

LABELS = np.array([0, 1, 2, 1, 0, 2, 1, 0])
MADE_BY = {"partitioner": "iid", "seed": 3}


def content(**changes):
    parts = [np.array([4, 1]), np.array([], np.int64), np.array([7, 0, 3])]
    return stored.to_json("made", LABELS, parts, np.array([2]), MADE_BY) | changes


def written(folder, found):
    path = folder / "mine.json"
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    return path


def read(path, num_clients=3, server_samples=1, labels=LABELS):
    return stored.read(path, labels, num_clients=num_clients, server_samples=server_samples)


@given(owners=st.lists(st.integers(-1, 4), min_size=1, max_size=50), data=st.data())
def test_what_is_written_is_read_back_in_its_order(tmp_path_factory, owners, data):
    owner, labels = np.array(owners), np.arange(len(owners)) % 3
    parts = [np.array(data.draw(st.permutations(list(np.flatnonzero(owner == k)))), np.int64) for k in range(5)]
    server = np.flatnonzero(owner == -1)
    path = written(tmp_path_factory.mktemp("stored"), stored.to_json("made", labels, parts, server, MADE_BY))
    found = read(path, 5, len(server), labels)
    assert found.made_by == MADE_BY
    assert len(found.clients) == 5
    for one, other in zip([server, *parts], [found.server, *found.clients], strict=True):
        assert other.dtype == np.int64
        np.testing.assert_array_equal(one, other)


def test_the_hash_is_of_little_endian_int64():
    assert stored.labels_sha256([0, 256]) == hashlib.sha256(bytes([*[0] * 8, 0, 1, *[0] * 6])).hexdigest()
    assert stored.labels_sha256(np.array([1, 2], np.int32)) == stored.labels_sha256(np.array([1, 2], ">i8"))
    assert stored.labels_sha256([1, 2]) != stored.labels_sha256([2, 1])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("{", "not a partition: not valid JSON: "),
        ("[1]", "not a partition: not an object; `fedwsa partition` writes one"),
        ({"version": 1}, "not a partition: data, train_samples, labels_sha256, made_by, server, clients missing; "),
        (content(version=2), "version is 2; allowed is 1"),
        (content(train_samples=9), "made for 'made' with 9 training samples, not for this data"),
        (content(labels_sha256="0"), "made for 'made' with other training labels than here"),
        (content(clients=[[4, 1]]), "has 1 clients; allowed with it is num-clients = 1"),
        (content(server=[]), "the server holds 0; allowed with it is server-samples = 0"),
        (content(clients=[1, 2, 3]), "server must be a list of indices, clients a list of such, made_by an object"),
        (content(clients=3), "server must be a list of indices, clients a list of such"),
        (content(server=3), "server must be a list of indices"),
        (content(made_by="x"), "made_by an object"),
        (content(clients=[[8], [], []]), "8 is no training sample; allowed are integers, 0 to 7"),
        (content(clients=[[-1], [], []]), "-1 is no training sample"),
        (content(clients=[[1.0], [], []]), "1.0 is no training sample"),
        (content(clients=[[False], [], []]), "False is no training sample"),
        (content(clients=[[None], [], []]), "None is no training sample"),
        (content(clients=[[10**30], [], []]), f"{10**30} is no training sample"),
        (content(clients=[[1], [1], []]), "sample 1 is held 2 times; allowed is once"),
        (content(clients=[[1, 1], [], []]), "sample 1 is held 2 times"),
        (content(clients=[[1], [2], []]), "sample 2 is held 2 times"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_a_line(tmp_path, found, message):
    path = written(tmp_path, found)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_the_digest_is_of_who_holds_what(tmp_path):
    """By hand: compact JSON of the server's indices and each client's."""
    digest = stored.sha256(written(tmp_path, content()))
    assert digest == hashlib.sha256(b"[[2],[[4,1],[],[7,0,3]]]").hexdigest()
    other_words = content(data="renamed", made_by={})
    path = written(tmp_path, json.dumps(other_words, indent=4, sort_keys=True))
    assert stored.sha256(path) == digest
    found = stored.read(path, LABELS, num_clients=3, server_samples=1, sha256=digest)
    assert [part.tolist() for part in found.clients] == [[4, 1], [], [7, 0, 3]]
    for clients in ([[1, 4], [], [7, 0, 3]], [[4, 1], [7], [0, 3]]):
        path = written(tmp_path, content(clients=clients))
        with pytest.raises(ValueError, match=r"mine\.json: not the partition that the config means, by its partition-"):
            stored.read(path, LABELS, num_clients=3, server_samples=1, sha256=digest)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none.json: cannot be read: No such file or directory"):
        read(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="binary: not a partition: not valid JSON"):
        read(tmp_path / "binary")


# ---- a federation from a file


def backwards(labels, num_clients, *, rng):
    """A partitioner of the user's own, whose indices are not sorted."""
    return list(np.arange(len(labels))[::-1].reshape(num_clients, -1))


def test_a_federation_is_read_back_as_it_was_even_where_it_is_not_sorted(tmp_path):
    size = len(digits.load().train_labels)
    config = tiny(partitioner="test_stored_partitions:backwards", server_samples=size - 1200)
    made = federation(config)
    path = tmp_path / "partition.json"
    path.write_bytes(partition_json(made))
    again = federation(config.model_copy(update={"partition_file": str(path), "partitioner": "iid"}))
    assert again.made_by == made.made_by == {"partitioner": "test_stored_partitions:backwards", "seed": 0}
    assert made.parts[0][0] > made.parts[0][1]
    for field in ("server", "parts", "training", "validation"):
        for one, other in zip(getattr(made, field), getattr(again, field), strict=True):
            np.testing.assert_array_equal(one, other)


def in_three(labels, num_clients, *, rng):
    return np.array_split(np.arange(len(labels)), 3)


def test_parts_for_another_number_of_clients_are_refused():
    config = tiny(partitioner="test_stored_partitions:in_three", num_clients=4, cohort=2)
    with pytest.raises(ValueError, match="partitioner 'test_stored_partitions:in_three' made 3 parts; allowed is num-"):
        federation(config)
    assert len(federation(config.model_copy(update={"num_clients": 3})).parts) == 3


def by_twelve_writers(data_dir):
    data = digits.load()
    return replace(data, train_groups=np.arange(len(data.train_labels)) % 12 + 100)


def test_a_natural_partition_is_by_the_data_sets_groups():
    config = tiny(data="test_stored_partitions:by_twelve_writers", partitioner="natural", num_clients=12)
    made = federation(config)
    groups = [set(made.dataset.train_groups[part]) for part in made.parts]
    assert groups == [{group} for group in range(100, 112)]
    assert made.made_by == {"partitioner": "natural", "seed": 0}
    with pytest.raises(
        ValueError, match="partitioner 'natural': num-clients must be <= the number of groups, 12, got 13"
    ):
        federation(config.model_copy(update={"num_clients": 13}))


def test_the_server_holds_what_the_file_says_whatever_the_seed(tmp_path):
    made = federation(tiny(seed=1))
    path = tmp_path / "partition.json"
    path.write_bytes(partition_json(made))
    GIVEN.clear()
    config = tiny(strategies=("test_np_merge_strategy:keep_holdout",), rounds=1, seed=2, partition_file=str(path))
    run(config, tmp_path / "run")
    images, labels = made.dataset.train_tensors(made.server)
    assert torch.equal(GIVEN[0].images, images)
    assert torch.equal(GIVEN[0].labels, labels)
    assert not np.array_equal(made.server, federation(tiny(seed=2)).server)


def test_a_partition_may_leave_samples_out_but_no_client_too_small(tmp_path):
    labels = digits.load().train_labels
    parts = [np.array([0, 1]), np.array([5])]
    path = written(tmp_path, stored.to_json("digits", labels, parts, np.array([2]), MADE_BY))
    small = {"num_clients": 2, "cohort": 1, "evaluation_cohort": 0, "server_samples": 1, "partition_file": str(path)}
    assert [part.tolist() for part in federation(tiny(**small, min_size=1)).parts] == [[0, 1], [5]]
    too_small = (
        f"^{re.escape(str(path))}: client 1 would hold {{}} of .* samples, min-size = 2; allowed is another file{{}}$"
    )
    with pytest.raises(ValueError, match=too_small.format(1, ", or a smaller min-size")):
        federation(tiny(**small))
    federation.cache_clear()
    written(tmp_path, stored.to_json("digits", labels, [parts[0], np.array([], int)], np.array([2]), MADE_BY))
    with pytest.raises(ValueError, match=too_small.format(0, "")):
        federation(tiny(**small))


@pytest.mark.parametrize(
    ("made_by", "line"),
    [
        ({"partitioner": "dirichlet", "alpha": 10.0, "min_size": 2, "balanced": False, "seed": 0},
         "dirichlet, α = 10, min-size = 2, seed = 0"),
        ({"partitioner": "quantity_skew", "beta": 0.5, "size_sigma": 0.0}, "quantity_skew, β = 0.5"),
        ({}, "partition of unknown origin"),
    ],
)  # fmt: skip
def test_how_a_partition_was_made_in_a_line(made_by, line):
    assert describe(made_by) == line
