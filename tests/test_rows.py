"""What is compiled for dense weights on the CPU against what PyTorch does for those that it is not compiled for."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedwsa.aligned import rows
from fedwsa.granularity import GRANULARITIES
from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.scope import measure, moments

KINDS = [  # divergence, mode
    ("forward-kl", "loss"),
    ("forward-kl", "proximal"),
    ("reverse-kl", "loss"),
    ("wasserstein", "loss"),
    ("wasserstein", "proximal"),
]
STEP = 0.1


def drawn(*shape: int, mean: float = 0.3, std: float = 1.0, seed: int = 0) -> Tensor:
    return mean + std * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scattered(values: Tensor) -> nn.Parameter:
    """The same values, every other element of their memory: nothing is compiled for these."""
    place = torch.empty(*values.shape, 2, dtype=values.dtype)[..., 0]
    return nn.Parameter(place.copy_(values))


def regularizer(weights: nn.Parameter, granularity: str, kind: tuple[str, str]) -> WeightScopeRegularizer:
    target = measure({"a": 1.5 * drawn(*weights.shape, seed=1)}, granularity=granularity)
    divergence, mode = kind
    return WeightScopeRegularizer(
        [("a", weights)], target, strength=3.0, mode=mode, divergence=divergence, granularity=granularity
    )


def pulled(weights: nn.Parameter, granularity: str, kind: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Weights and gradient after a step of each sort."""
    weights.grad = drawn(*weights.shape, seed=2).to(weights)
    term = regularizer(weights, granularity, kind)
    term.add_gradient()
    term.descend(STEP)
    term.proximal_step(STEP)
    return weights.detach(), weights.grad


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("mean", [0.3, 50.0])
def test_weights_that_do_not_lie_densely_are_pulled_alike(granularity, kind, dtype, tolerance, mean):
    values = drawn(6, 5, 3, 3, mean=mean).to(dtype)
    assert rows.rows_of(scattered(values), 1) is None
    expected = pulled(scattered(values), granularity, kind)
    for layout in (torch.contiguous_format, torch.channels_last):
        weights = nn.Parameter(values.clone().contiguous(memory_format=layout))
        assert rows.rows_of(weights, 1) is not None
        for found, wanted in zip(pulled(weights, granularity, kind), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * max(1.0, mean))
        assert not torch.equal(weights, values)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40),
    st.sampled_from([0.0, 1.0, 1e4]),
    st.sampled_from([np.float32, np.float64]),
)
def test_moments_are_those_of_a_scope(numbers, shift, dtype):
    row = (np.array(numbers) + shift).astype(dtype)
    mean, variance = moments(torch.from_numpy(row))
    found = rows.moments(row)
    assert found == pytest.approx((mean, variance), rel=1e-9, abs=1e-9 * mean * mean)
    assert (found[1] == 0) == (variance == 0)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_moments_of_what_is_not_finite_are_not(odd):
    assert not all(math.isfinite(number) for number in rows.moments(np.array([1.0, odd, 2.0], dtype=np.float32)))


@pytest.mark.parametrize("kind", [("forward-kl", "loss"), ("forward-kl", "proximal")])
def test_autograd_learns_that_weights_have_changed(kind):
    weights = nn.Parameter(drawn(4, 5).float())
    kept = (weights * weights).sum()
    term = regularizer(weights, "layer", kind)
    term.descend(STEP)
    term.proximal_step(STEP)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.parametrize("kind", [("forward-kl", "loss"), ("forward-kl", "proximal")])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_parameters_may_be_given_other_memory(granularity, kind):
    """By `.data`, by `load_state_dict(assign=True)`, or by a copy of model and term together."""
    weights = nn.Parameter(drawn(4, 5))
    term = regularizer(weights, granularity, kind)
    weights.data = drawn(4, 5, seed=3)
    other = copy.deepcopy((weights, term))
    expected = regularizer(scattered(weights.detach()), granularity, kind)
    (reference,) = expected._parameters.values()
    for tensor, its_term in ((reference, expected), (weights, term), other):
        its_term.descend(STEP)
        its_term.proximal_step(STEP)
        torch.testing.assert_close(tensor.detach(), reference.detach())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_gradient_may_lie_otherwise_than_the_weights(granularity):
    weights, other = nn.Parameter(drawn(4, 5)), nn.Parameter(drawn(4, 5))
    weights.grad, other.grad = drawn(5, 4).T, drawn(5, 4).T.contiguous()
    for each in (weights, other):
        regularizer(each, granularity, ("forward-kl", "loss")).add_gradient()
    torch.testing.assert_close(weights.grad, other.grad)
    assert not torch.equal(weights.grad, drawn(5, 4).T)
