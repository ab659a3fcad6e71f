"""Units whose numbers are hard on their dtype: far from 0, tiny, of half precision, long, or beside degenerate ones."""

import logging
import math

import pytest
import torch
from torch import Tensor, nn

from fedwsa.granularity import GRANULARITIES
from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.scope import WeightScope, measure

MODES = ["loss", "proximal"]
STEP = 0.1


def drawn(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return mean + std * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def target_of(weights: Tensor, granularity: str, mean: float, std: float) -> WeightScope:
    names = measure({"a": weights.detach()}, granularity=granularity).names
    ones = torch.ones(len(names), dtype=torch.float64)
    return WeightScope(names, mean * ones, std**2 * ones)


def pulled(weights: nn.Parameter, target: WeightScope, granularity: str, mode: str, **options: object) -> Tensor:
    """What one step of the term adds to the weights, or to their gradient."""
    before = weights.detach().clone()
    term = WeightScopeRegularizer([("a", weights)], target, mode=mode, granularity=granularity, **options)
    term.add_gradient()
    term.proximal_step(STEP)
    return weights.grad if mode == "loss" else weights.detach() - before


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.05), (0.04, 0.05), (0.2, 0.05), (5.0, 0.05)])
@pytest.mark.parametrize("layout", ["as made", "transposed"])
def test_single_precision_pulls_as_double_does(granularity, mode, mean, std, layout):
    """Rows of 5,000; a target that is near, so that errors of the variance show."""
    values = drawn(8, 5000, mean=mean, std=std).float()
    if layout == "transposed":
        values = values.T.contiguous().T
    target = target_of(values, granularity, mean + 0.1 * std, 1.05 * std)
    single, double = (
        pulled(nn.Parameter(values.clone().to(dtype)), target, granularity, mode, strength=1.0)
        for dtype in (torch.float32, torch.float64)
    )
    of_weights = torch.finfo(torch.float32).eps * values.abs().max() if mode == "proximal" else 0.0
    assert (single - double).abs().max() < 2e-5 * double.abs().max() + of_weights


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("std", [1e-8, 2e-17, 2e-23])
def test_narrow_weights_land_on_the_target(granularity, std):
    """Squares of 2e-23 have hardly a digit left in single precision."""
    weights = nn.Parameter(drawn(2, 500, std=std).float())
    target = target_of(weights, granularity, 0.5, 0.1)
    pulled(weights, target, granularity, "proximal", strength=1e9, divergence="wasserstein")
    landed = measure({"a": weights}, granularity=granularity)
    torch.testing.assert_close(landed.means, target.means, rtol=1e-5, atol=0)
    torch.testing.assert_close(landed.variances, target.variances, rtol=1e-4, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-4), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("ratio", [0.75, 0.995, 1.005, 1.34])
def test_half_precision_is_rounded_once(granularity, dtype, tolerance, ratio):
    """The mean of 10,000 roundings of weights, a quarter of eps at most; one of a coefficient is the same for all."""
    weights = nn.Parameter(drawn(2, 5000, mean=0.01, std=0.1).to(dtype))
    target = target_of(weights, granularity, 0.01, 0.1 * ratio)
    pulled(weights, target, granularity, "proximal", strength=1e9)
    found = measure({"a": weights}, granularity=granularity).variances.sqrt() / target.variances.sqrt()
    assert (found - 1).abs().max() < tolerance


def test_small_steps_add_up_in_every_channel():
    """A thousandth of a thousandth of the way each time, which a factor of 1 − 10⁻⁶ could not say in float32."""
    weights = nn.Parameter(drawn(3, 400).float())
    target = target_of(weights, "channel", 0.0, 2.0)
    term = WeightScopeRegularizer(
        [("a", weights)], target, mode="proximal", granularity="channel", divergence="wasserstein", strength=200e-6
    )
    start = measure({"a": weights}, granularity="channel").variances.sqrt()
    for _ in range(1000):
        term.proximal_step(1.0)  # σ moves by 2c/(n + 2c) of the distance, 10⁻⁶
    moved = measure({"a": weights}, granularity="channel").variances.sqrt() - start
    torch.testing.assert_close(moved, (2.0 - start) * (1 - (1 - 1e-6) ** 1000), rtol=0.02, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_channels_that_are_left_alone_keep_every_bit(mode):
    """Beside others that go a short and a long way; the sign of a zero counts, in weight and gradient."""
    weights = nn.Parameter(drawn(5, 64).float())
    weights.data[1], weights.data[2, 3], weights.data[4] = -0.0, math.inf, 1e-4 * weights.data[4]
    weights.grad = torch.full_like(weights, -0.0)
    before = weights.detach().clone(), weights.grad.clone()
    pulled(weights, target_of(weights, "channel", 0.0, 1.0), "channel", mode, strength=5.0)
    for now, was in zip((weights.detach(), weights.grad), before, strict=True):
        assert now[1:3].numpy().tobytes() == was[1:3].numpy().tobytes()
    changed = weights.grad if mode == "loss" else weights.detach() - before[0]
    assert all(changed[i].abs().max() > 0 for i in (0, 3, 4))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_layer_that_cannot_be_pulled_gets_no_gradient(granularity):
    """With weight decay the optimiser would move it."""
    weights = nn.Parameter(torch.full((2, 4), 0.5))
    optimizer = torch.optim.SGD([weights], lr=0.1, weight_decay=0.1)
    target = target_of(weights, granularity, 0.0, 1.0)
    WeightScopeRegularizer([("a", weights)], target, granularity=granularity).attach(optimizer)
    optimizer.step()
    assert weights.grad is None
    assert torch.equal(weights, torch.full((2, 4), 0.5))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mode", MODES)
def test_weights_beyond_what_squares_can_hold_are_reported(granularity, mode, caplog):
    layers = {"a": nn.Parameter(drawn(2, 8) * 1e200), "b": nn.Parameter(drawn(2, 8))}
    names = measure({name: tensor.detach() for name, tensor in layers.items()}, granularity=granularity).names
    target = WeightScope(names, torch.zeros(len(names)).double(), torch.ones(len(names)).double())
    before = layers["a"].detach().clone()
    with caplog.at_level(logging.WARNING, logger="fedwsa"):
        term = WeightScopeRegularizer(layers.items(), target, mode=mode, granularity=granularity)
        term.add_gradient()
        term.proximal_step(STEP)
    assert torch.equal(layers["a"], before)
    assert layers["a"].grad is None
    assert f"degenerate layers are left alone: {names[0]}" in caplog.text


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mode", MODES)
def test_weights_may_take_another_dtype_later(granularity, mode):
    weights = nn.Parameter(drawn(3, 20).float())
    target = target_of(weights, granularity, 0.5, 2.0)
    term = WeightScopeRegularizer([("a", weights)], target, strength=3.0, mode=mode, granularity=granularity)
    weights.data = weights.data.double()
    expected = pulled(nn.Parameter(weights.detach().clone()), target, granularity, mode, strength=3.0)
    before = weights.detach().clone()
    term.add_gradient()
    term.proximal_step(STEP)
    torch.testing.assert_close(weights.grad if mode == "loss" else weights.detach() - before, expected)


def test_a_layer_without_weights_has_channels_of_nothing():
    assert measure({"a": torch.zeros(0, 3)}, granularity="channel").names == ()
    empty = measure({"a": torch.zeros(2, 0)}, granularity="channel")
    assert (empty.names, empty.variances.tolist()) == (("a[0]", "a[1]"), [0.0, 0.0])
