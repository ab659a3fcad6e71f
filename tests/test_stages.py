"""Merging in stages: with plain averages it is the average of all, whatever the tree; the tree is as documented."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, lists

from fedwsa.merging import average, merge_in_stages


def model(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(4, 3, generator=generator, dtype=torch.float64), "n": torch.tensor(seed)}


def plain(a, b, share):
    return average([a, b], [share, 1 - share])


@settings(max_examples=50)
@given(weights=lists(floats(0.01, 100), min_size=1, max_size=9), seed=integers(0, 1000))
def test_averages_of_averages_are_the_average(weights, seed):
    states = [model(seed + i) for i in range(len(weights))]
    found = merge_in_stages(states, plain, weights)
    torch.testing.assert_close(found["w"], average(states, weights)["w"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("count", "tree"),
    [(1, "0"), (2, "(0 1)"), (3, "((0 1) 2)"), (4, "((0 1) (2 3))"), (5, "(((0 1) (2 3)) 4)"),
     (6, "(((0 1) (2 3)) (4 5))")],
)  # fmt: skip
def test_neighbours_are_merged_and_an_odd_one_waits(count, tree):
    names = {}

    def note(a, b, share):
        merged = plain(a, b, share)
        names[id(merged["w"])] = f"({name(a)} {name(b)})"
        kept.append(merged)
        return merged

    def name(state):
        return names.get(id(state["w"]), str(state["n"].item()))

    kept = []
    assert name(merge_in_stages([model(seed) for seed in range(count)], note)) == tree


def test_the_share_is_that_of_the_weight_so_far():
    shares = []

    def note(a, b, share):
        shares.append(share)
        return plain(a, b, share)

    merge_in_stages([model(seed) for seed in range(3)], note, [1, 3, 12])
    assert shares == pytest.approx([0.25, 0.25])


def test_the_models_stay_as_they_are():
    states = [model(seed) for seed in range(3)]

    def spoil(a, b, share):
        a["w"].zero_()
        return a

    merge_in_stages(states, spoil)
    merge_in_stages(states[:1], spoil)["w"].zero_()
    assert all(torch.equal(state["w"], model(seed)["w"]) for seed, state in enumerate(states))


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0], [1.0, -1.0], [1.0, float("nan")]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="weights must be"):
        merge_in_stages([model(0), model(1)], plain, weights)


def test_no_models_and_unlike_models_are_refused():
    with pytest.raises(ValueError, match="at least one model"):
        merge_in_stages([], plain)
    with pytest.raises(ValueError, match=r"n .* instead of"):
        merge_in_stages([model(0), {**model(1), "n": torch.ones(2)}], plain)
