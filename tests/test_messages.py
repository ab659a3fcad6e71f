"""What stands in a message: round trips, versions and sizes."""

import re

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedwsa import messages
from fedwsa.arrays import pack
from fedwsa.messages import Alignment
from fedwsa.scope import WeightScope, measure

numbers = st.floats(allow_nan=False, allow_infinity=False)
names = st.lists(st.text(min_size=1), max_size=5, unique=True)


@st.composite
def scopes(draw) -> WeightScope:
    layers = draw(names)
    means = draw(st.lists(numbers, min_size=len(layers), max_size=len(layers)))
    variances = draw(st.lists(st.floats(0, 1e300), min_size=len(layers), max_size=len(layers)))
    vectors = (torch.tensor(values, dtype=torch.float64) for values in (means, variances))
    return WeightScope(tuple(layers), *vectors)


def over_the_wire(record):
    """A record as it is after Flower's own bytes."""
    return type(record).inflate(record.deflate())


# ---- scopes


@given(
    scope=scopes(),
    strength=st.floats(0, 1e6),
    mode=st.sampled_from(["loss", "proximal"]),
    reduction=st.sampled_from(["sum", "mean"]),
    divergence=st.sampled_from(["forward-kl", "wasserstein"]),
    granularity=st.sampled_from(["layer", "channel"]),
    share=st.sampled_from([0.0, 0.1]),
)
def test_alignment_comes_back_bit_for_bit(scope, strength, mode, reduction, divergence, granularity, share):
    sent = Alignment(scope, strength, mode, reduction, divergence, granularity, share)
    config = over_the_wire(ConfigRecord({"server-round": 1, **messages.pack_alignment(sent)}))
    assert messages.unpack_alignment(config) == sent


def test_no_alignment_where_none_is_asked_for():
    assert messages.unpack_alignment(ConfigRecord({"server-round": 1, "lr": 0.1})) is None


@given(scope=scopes())
def test_scope_comes_back_bit_for_bit_and_is_taken_out(scope):
    metrics = over_the_wire(MetricRecord({"num-examples": 3, **messages.pack_scope(scope)}))
    layers = len(scope.names)
    assert messages.take_scope(metrics, layers) == (scope.means.tolist(), scope.variances.tolist())
    assert dict(metrics) == {"num-examples": 3}
    assert messages.take_scope(metrics, layers) is None


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"scope-means": [1.0, 2.0]},
        {"scope-variances": [1.0, 2.0]},
        {"scope-means": [1.0, 2.0], "scope-variances": [1.0]},
        {"scope-means": [1.0], "scope-variances": [1.0]},
        {"scope-means": [1.0, 2.0, 3.0], "scope-variances": [1.0, 2.0, 3.0]},
        {"scope-means": 1.0, "scope-variances": 1.0},
        {"scope-means": [1.0, 2.0], "scope-variances": [1.0, -1e-9]},
        {"scope-means": [], "scope-variances": []},
    ],
)
def test_what_is_no_scope_of_these_layers_is_taken_out_all_the_same(entries):
    metrics = MetricRecord({"num-examples": 1, **entries})
    assert messages.take_scope(metrics, 2) is None
    assert dict(metrics) == {"num-examples": 1}


@given(scope=scopes())
def test_scope_of_units_stands_beside_that_of_layers(scope):
    layers = WeightScope(("a",), torch.ones(1).double(), torch.ones(1).double())
    packed = {**messages.pack_scope(layers), **messages.pack_scope(scope, "channel")}
    metrics = over_the_wire(MetricRecord(packed))
    assert messages.take_scope(metrics, len(scope.names), "channel") == (scope.means.tolist(), scope.variances.tolist())
    assert messages.take_scope(metrics, 1) == ([1.0], [1.0])
    assert not metrics


def test_units_on_the_wire_are_the_units_that_are_measured():
    state = {"z.weight": torch.ones(2, 3), "bias": torch.ones(3), "conv": torch.ones(2, 1, 3, 3)}
    for granularity in ("layer", "channel", "model"):
        found = messages.unit_sizes(pack(state), granularity)
        assert tuple(found) == measure(state, granularity=granularity).names
        assert sum(found.values()) == 6 + 18


def test_scope_of_whole_numbers_is_a_scope():
    metrics = MetricRecord({"scope-means": [1, -2], "scope-variances": [0, 4]})
    assert messages.take_scope(metrics, 2) == ([1.0, -2.0], [0.0, 4.0])


def test_layers_on_the_wire_are_the_layers_that_are_measured():
    state = {
        "z.weight": torch.ones(2, 3),
        "bias": torch.ones(3),
        "half": torch.ones(2, 2, dtype=torch.float16),
        "steps": torch.tensor(3),
        "table": torch.ones(2, 2, dtype=torch.int64),
        "conv": torch.ones(2, 1, 3, 3, dtype=torch.float64),
        "mask": torch.ones(2, 2, dtype=torch.bool),
    }
    assert messages.layer_names(pack(state)) == measure(state).names == ("z.weight", "half", "conv")


# ---- the version


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_another_version_is_refused(version):
    with pytest.raises(
        ValueError, match=rf"schema-version = {version!r}: this client speaks 1; install the same fedwsa"
    ):
        messages.check_version(ConfigRecord({"schema-version": version}))


@pytest.mark.parametrize("entries", [{}, {"schema-version": 1}])
def test_own_version_and_stock_flower_are_taken(entries):
    messages.check_version(ConfigRecord(entries))


# ---- sizes


def test_payload_by_hand():
    content = RecordDict(
        {
            "arrays": pack(
                {"w": torch.zeros(3, 5), "steps": torch.tensor(1), "half": torch.zeros(3, dtype=torch.half)}
            ),
            "config": ConfigRecord(
                {"server-round": 3, "lr": 0.5, "flag": True, "mode": "proximal", "σ": "σ", "raw": b"123"}
            ),
            "metrics": MetricRecord({"num-examples": 7, "scope-means": [1.0, 2.0, 3.0], "none": []}),
            "names": ConfigRecord({"scope-names": ["layers.0", "b"]}),
        }
    )
    arrays = 15 * 4 + 8 + 3 * 2
    config = 8 + 8 + 8 + len("proximal") + 2 + 3  # σ is two bytes
    assert messages.payload_bytes(content) == arrays + config + (8 + 3 * 8) + (8 + 1)


def test_payload_does_not_depend_on_who_made_the_arrays():
    arrays = {"w": np.zeros((4, 3), np.float32), "n": np.arange(5)}
    stock = RecordDict({"arrays": ArrayRecord(list(arrays.values()))})
    own = RecordDict({"arrays": pack({name: torch.from_numpy(values) for name, values in arrays.items()})})
    assert messages.payload_bytes(stock) == messages.payload_bytes(own) == 12 * 4 + 5 * 8


# ---- the documentation


def test_documented_keys_are_the_keys_that_exist():
    documented = set(re.findall(r"``(.+?)``", messages.__doc__))
    constants = {value for name, value in vars(messages).items() if name.isupper() and isinstance(value, str)}
    assert documented == constants
