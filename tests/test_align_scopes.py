"""Layers rescaled to a target scope: their scope is the target's, their shape stays; what has none is left alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedwsa.merging import align_scopes
from fedwsa.scope import WeightScope, kl_divergence, measure

WEIGHTS = arrays(np.float64, array_shapes(min_dims=2, max_dims=4, min_side=2, max_side=5),
                 elements=st.floats(-4, 4, width=16))  # fmt: skip
MEANS, STDS = st.floats(-3, 3), st.floats(1e-3, 10)


def scope(**layers):
    """WeightScope from name=(mean, variance)."""
    means, variances = (torch.tensor([pair[i] for pair in layers.values()], dtype=torch.float64) for i in (0, 1))
    return WeightScope(tuple(layers), means, variances)


def network(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"one.weight": (6, 4), "one.bias": (6,), "two.weight": (3, 6, 2, 2), "two.bias": (3,)}
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return state | {"count": torch.tensor(7)}


@given(weights=WEIGHTS, mean=MEANS, std=STDS)
def test_the_layer_has_the_targets_moments_and_keeps_its_shape(weights, mean, std):
    assume(weights.std() > 0.01)
    found = align_scopes({"w": torch.from_numpy(weights)}, scope(w=(mean, std**2)))
    after = found.state["w"].numpy()
    assert found.left_alone == []
    assert after.mean() == pytest.approx(mean, abs=1e-9)
    assert after.std() == pytest.approx(std, rel=1e-9)
    standard = (weights - weights.mean()) / weights.std()
    np.testing.assert_allclose((after - mean) / std, standard, rtol=1e-7, atol=1e-7)


@settings(max_examples=50)
@given(weights=WEIGHTS, first=st.tuples(MEANS, STDS), second=st.tuples(MEANS, STDS))
def test_only_the_last_of_several_targets_counts(weights, first, second):
    assume(weights.std() > 0.01)
    state = {"w": torch.from_numpy(weights)}
    on_the_way = align_scopes(state, scope(w=(first[0], first[1] ** 2))).state
    target = scope(w=(second[0], second[1] ** 2))
    there, directly = align_scopes(on_the_way, target).state["w"], align_scopes(state, target).state["w"]
    torch.testing.assert_close(there, directly, rtol=1e-6, atol=1e-6 * (1 + abs(second[0]) + second[1]))


def test_by_hand():
    weights = torch.tensor([[-1.0, 3.0], [3.0, -1.0]])  # mean 1, variance 4
    found = align_scopes({"w": weights}, scope(w=(10.0, 0.25))).state["w"]
    assert found.tolist() == [[9.5, 10.5], [10.5, 9.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_its_own_scope_changes_a_network_by_no_more_than_rounding(dtype):
    state = network(dtype)
    found = align_scopes(state, measure(state))
    for name, tensor in found.state.items():
        assert tensor.dtype == state[name].dtype
        torch.testing.assert_close(tensor, state[name], rtol=2 * torch.finfo(dtype).eps, atol=1e-9)


def test_the_divergence_is_gone_and_all_else_is_copied():
    state = network()
    before = {name: tensor.clone() for name, tensor in state.items()}
    target = scope(**{"one.weight": (0.1, 0.04), "two.weight": (-0.2, 0.09)})
    found = align_scopes(state, target).state
    assert list(found) == list(state)
    assert kl_divergence(measure(state), target).min() > 0.5
    assert kl_divergence(measure(found), target).abs().max() < 1e-10
    for name in ("one.bias", "two.bias", "count"):
        assert torch.equal(found[name], state[name])
    for tensor in found.values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_a_layer_that_the_target_does_not_name_stays():
    found = align_scopes(network(), scope(**{"two.weight": (0.0, 1.0)}))
    assert torch.equal(found.state["one.weight"], network()["one.weight"])
    assert found.left_alone == []


def test_degenerate_layers_are_left_alone_and_named():
    usable = torch.tensor([[1.0, 2.0]])
    state = {
        "constant": torch.full((2, 2), 0.1),
        "single": torch.ones(1, 1),
        "broken": torch.tensor([[1.0, math.nan]]),
        "good": usable,
        "no target": usable,
        "endless target": usable,
    }
    target = scope(**{
        "constant": (0.0, 1.0), "single": (0.0, 1.0), "broken": (0.0, 1.0), "good": (0.0, 1.0),
        "no target": (0.0, 0.0), "endless target": (math.inf, 1.0),
    })  # fmt: skip
    found = align_scopes(state, target)
    assert found.left_alone == ["constant", "single", "broken", "no target", "endless target"]
    assert found.state["good"].tolist() == [[-1.0, 1.0]]
    for name in found.left_alone:
        assert torch.equal(found.state[name].nan_to_num(9), state[name].nan_to_num(9))


@pytest.mark.parametrize("name", ["three.weight", "count"])
def test_a_target_for_what_is_no_layer_of_the_model_is_refused(name):
    with pytest.raises(ValueError, match=rf"does not have as floating-point tensors: \['{name}'\]"):
        align_scopes(network(), scope(**{name: (0.0, 1.0)}))
