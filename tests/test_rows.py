"""What is compiled for dense weights on the CPU against what PyTorch does for those that it is not compiled for."""

import copy
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda import COMBINATIONS
from torch import Tensor, nn

from fedwsa.aligned import rows
from fedwsa.granularity import GRANULARITIES
from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.scope import measure, moments

STEP = 0.1
MODES = pytest.mark.parametrize("kind", [("forward-kl", "loss"), ("forward-kl", "proximal")])


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


def stepped(weights: nn.Parameter, term: WeightScopeRegularizer) -> Tensor:
    term.descend(STEP)
    term.proximal_step(STEP)
    return weights.detach()


def pulled(weights: nn.Parameter, granularity: str, kind: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Weights and gradient after a step of each sort."""
    weights.grad = drawn(*weights.shape, seed=2).to(weights)
    term = regularizer(weights, granularity, kind)
    term.add_gradient()
    return stepped(weights, term), weights.grad


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", COMBINATIONS)
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


@settings(max_examples=100)
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


@MODES
def test_autograd_learns_that_weights_have_changed(kind):
    weights = nn.Parameter(drawn(4, 5).float())
    kept = (weights * weights).sum()
    stepped(weights, regularizer(weights, "layer", kind))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@MODES
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_parameters_may_be_given_other_memory(granularity, kind, copied):
    """Of the parameter that was, of a copy of it, and of what was the original's."""
    weights = nn.Parameter(drawn(4, 5))
    term = regularizer(weights, granularity, kind)
    other, its_term = copied((weights, term))
    weights.data = drawn(4, 5, seed=3)
    expected = scattered(weights.detach())
    stepped(expected, regularizer(expected, granularity, kind))
    other.data = weights.data
    torch.testing.assert_close(stepped(other, its_term), expected.detach())
    weights.data = drawn(4, 5, seed=3)
    torch.testing.assert_close(stepped(weights, term), expected.detach())


@MODES
def test_weights_may_lie_otherwise_in_the_same_memory(kind):
    weights = nn.Parameter(drawn(5, 5))
    term = regularizer(weights, "channel", kind)
    stepped(weights, term)
    weights.data = weights.data.t()
    expected = scattered(weights.detach())
    stepped(expected, regularizer(expected, "channel", kind))
    torch.testing.assert_close(stepped(weights, term), expected.detach())


@MODES
def test_what_is_no_longer_the_parameters_is_not_written(kind):
    weights = nn.Parameter(drawn(6, 5))
    everything, before = weights.data, weights.detach().clone()
    term = regularizer(weights, "layer", kind)
    weights.data = everything[:3]
    stepped(weights, term)
    assert torch.equal(everything[3:], before[3:])
    assert not torch.equal(everything[:3], before[:3])


def test_the_target_is_the_one_that_was_given():
    weights, target = nn.Parameter(drawn(4, 5)), measure({"a": drawn(4, 5, seed=1)})
    term = WeightScopeRegularizer([("a", weights)], target, mode="proximal", strength=1e9)
    kept = target.means.clone()
    target.means.fill_(7.0)
    stepped(weights, term)
    torch.testing.assert_close(measure({"a": weights}).means, kept)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_autograd_learns_that_gradients_have_changed(granularity):
    weights = nn.Parameter(drawn(4, 5))
    (weights.grad,) = torch.autograd.grad((weights**3).sum(), weights, create_graph=True)
    kept = weights.grad.square().sum()
    regularizer(weights, granularity, ("forward-kl", "loss")).add_gradient()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weights_that_are_left_alone_have_not_changed_for_autograd(granularity):
    weights = nn.Parameter(torch.full((3, 4), 0.5))
    kept = (weights * weights).sum()
    stepped(weights, regularizer(weights, granularity, ("forward-kl", "proximal")))
    kept.backward()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_gradient_may_be_added_to_where_the_weights_are_near_the_end_of_their_dtype(granularity):
    """√(n σ²) is more than a float16 holds, the gradient is not."""
    weights = nn.Parameter(drawn(4, 60_000, std=200.0).half())
    regularizer(weights, granularity, ("forward-kl", "loss")).add_gradient()
    assert weights.grad.abs().max() > 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_numbers_may_be_tensors(granularity):
    weights, other = nn.Parameter(drawn(4, 5)), nn.Parameter(drawn(4, 5))
    regularizer(weights, granularity, ("forward-kl", "proximal")).proximal_step(torch.tensor(STEP))
    regularizer(other, granularity, ("forward-kl", "proximal")).proximal_step(float(torch.tensor(STEP)))
    assert torch.equal(weights, other)


def test_a_gradient_may_be_stored_negated():
    weights = nn.Parameter(drawn(4, 5))
    weights.grad = torch._neg_view(drawn(4, 5, seed=2))
    other = nn.Parameter(drawn(4, 5))
    term = regularizer(other, "layer", ("forward-kl", "loss"))
    term.add_gradient()
    expected = other.grad - drawn(4, 5, seed=2)
    regularizer(weights, "layer", ("forward-kl", "loss")).add_gradient()
    torch.testing.assert_close(weights.grad.resolve_neg(), expected)


COMPILED = """
import sys
import torch
from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.scope import WeightScope

def trained(mode, compile):
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 6)
    target = WeightScope(("weight",), torch.zeros(1).double(), torch.ones(1).double())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    WeightScopeRegularizer(layer.named_parameters(), target, mode=mode, strength=3.0).attach(optimizer)
    def step():
        optimizer.zero_grad()
        layer(torch.ones(3, 5)).square().mean().backward()
        optimizer.step()
    step = torch.compile(step, backend="eager") if compile else step
    step(), step()
    return layer.weight

assert torch.equal(trained(sys.argv[1], True), trained(sys.argv[1], False))
"""


@pytest.mark.process
@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_a_step_under_torch_compile_is_the_same_step(mode):
    """In a new process: there PyTorch's compiler would meet Numba's at work."""
    run = subprocess.run([sys.executable, "-c", COMPILED, mode], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_gradient_may_lie_otherwise_than_the_weights(granularity):
    weights, other = nn.Parameter(drawn(4, 5)), nn.Parameter(drawn(4, 5))
    weights.grad, other.grad = drawn(5, 4).T, drawn(5, 4).T.contiguous()
    for each in (weights, other):
        regularizer(each, granularity, ("forward-kl", "loss")).add_gradient()
    torch.testing.assert_close(weights.grad, other.grad)
    assert not torch.equal(weights.grad, drawn(5, 4).T)
