"""Partitioners of flwr-datasets by the adapter: the real ones, and a stand-in whose draws are known."""

import sys
from types import SimpleNamespace

import flwr_datasets.partitioner as theirs
import numpy as np
import pytest
from scipy import stats

from clients.flower_partitions import indices_of
from partitions import dirichlet

LABELS = np.tile(np.arange(400), 200)
ALPHA, CLIENTS = 0.5, 5


class Columns(dict):
    """As much of Hugging Face's data set as a partitioner needs."""

    from_dict = classmethod(lambda cls, columns: cls(columns))

    def select(self, indices):
        return Columns({name: np.asarray(column)[indices] for name, column in self.items()})


class StandIn:
    """The protocol of flwr-datasets' partitioners, over NumPy's own Dirichlet draws, class by class."""

    dataset = None

    def __init__(self, num_partitions, partition_by, alpha, seed):
        self.num_partitions, self.partition_by, self.alpha, self.seed = num_partitions, partition_by, alpha, seed

    def load_partition(self, partition_id):
        rng, mine = np.random.default_rng(self.seed), []
        for value in np.unique(self.dataset[self.partition_by]):
            members = np.flatnonzero(self.dataset[self.partition_by] == value)
            ends = np.cumsum(rng.dirichlet([self.alpha] * self.num_partitions)[:-1]) * len(members)
            mine.append(np.split(members, ends.astype(int))[partition_id])
        return self.dataset.select(np.concatenate(mine)[::-1])


class ByWriter:
    """Of two writers, whose samples are given backwards."""

    dataset, num_partitions = None, 2

    def load_partition(self, partition_id):
        return self.dataset.select(np.flatnonzero(self.dataset["writer"] == [7, 9][partition_id])[::-1])


@pytest.fixture(params=["stand-in", "flwr-datasets"])
def make_dirichlet(request, monkeypatch):
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=Columns))
        return StandIn
    return lambda *arguments, **options: theirs.DirichletPartitioner(
        *arguments, **options, min_partition_size=0, self_balancing=False
    )


def shares(parts):
    """The first client's share of each class."""
    return np.bincount(LABELS[parts[0]], minlength=400) / 200


def test_the_dirichlet_of_flower_and_ours_agree_in_distribution(make_dirichlet):
    theirs = indices_of(make_dirichlet(CLIENTS, partition_by="label", alpha=ALPHA, seed=1), label=LABELS)
    np.testing.assert_array_equal(np.sort(np.concatenate(theirs)), np.arange(len(LABELS)))
    ours = dirichlet(LABELS, CLIENTS, ALPHA, rng=np.random.default_rng(2))
    assert stats.ks_2samp(shares(ours), shares(theirs)).pvalue > 1e-3
    other = dirichlet(LABELS, CLIENTS, 2 * ALPHA, rng=np.random.default_rng(2))
    assert stats.ks_2samp(shares(other), shares(theirs)).pvalue < 1e-3  # it would notice


def test_indices_are_those_of_the_partition_in_its_order(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=Columns))
    parts = indices_of(ByWriter(), label=np.zeros(5, int), writer=np.array([9, 7, 9, 7, 9]))
    assert [part.tolist() for part in parts] == [[3, 1], [4, 2, 0]]
    assert all(part.dtype == np.int64 for part in parts)


def of_flower(labels, num_clients, alpha, *, rng):
    """What a user writes; `--partitioner test_flower_partitions:of_flower`."""
    return indices_of(StandIn(num_clients, partition_by="label", alpha=alpha, seed=rng.integers(2**31)), label=labels)


def test_a_partitioner_of_flower_by_an_import_path(monkeypatch):
    pytest.importorskip("pydantic")
    from clients.federation import federation
    from fedwsa.config import Config

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=Columns))
    config = Config(partitioner="test_flower_partitions:of_flower", alpha=(1.0,), num_clients=10)
    one = federation(config)
    assert len(one.parts) == 10
    assert one.made_by == {"partitioner": "test_flower_partitions:of_flower", "alpha": 1.0, "seed": 0}
    held = np.sort(np.concatenate([one.server, *one.parts]))
    np.testing.assert_array_equal(held, np.arange(len(one.dataset.train_labels)))
    other = federation(config.model_copy(update={"seed": (1,)}))
    assert one.label_counts().tolist() != other.label_counts().tolist()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("IidPartitioner", {"num_partitions": 7}),
        ("LinearPartitioner", {"num_partitions": 7}),
        ("ShardPartitioner", {"num_partitions": 7, "partition_by": "label", "num_shards_per_partition": 2}),
        ("PathologicalPartitioner", {"num_partitions": 7, "partition_by": "label", "num_classes_per_partition": 2}),
        ("NaturalIdPartitioner", {"partition_by": "writer"}),
    ],
)
def test_partitioners_of_flower(name, options):
    labels, writers = np.arange(210) % 5, np.arange(210) // 30
    parts = indices_of(getattr(theirs, name)(**options), label=labels, writer=writers)
    held = np.concatenate(parts)
    assert len(parts) == 7
    assert len(held) == len(set(held))
    assert set(held) <= set(range(210))
    if name == "NaturalIdPartitioner":
        assert [set(writers[part]) for part in parts] == [{writer} for writer in range(7)]
