"""Three divergences against PyTorch's distributions, quadrature, autograd and a numerical minimiser."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from fedwsa.divergence import DIVERGENCES, divergence_of
from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.scope import WeightScope, divergence, gradient_coefficients, measure, proximal_coefficients

quick = settings(max_examples=30)
means, stds, seeds = st.floats(-3, 3), st.floats(0.1, 3), st.integers(0, 2**32 - 1)
kinds = st.sampled_from(list(DIVERGENCES))
proximal_kinds = [name for name, row in DIVERGENCES.items() if row.proximal]

NODES, MASSES = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(8))


def scope(mean: float, std: float) -> WeightScope:
    return WeightScope(("a",), number(mean).reshape(1), number(std).reshape(1).square())


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def normal(shape: list[int], mean: float, std: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(shape, dtype=torch.float64, generator=generator)


def by_definition(kind: str, weights: Tensor, mean: float, std: float) -> Tensor:
    """Of one layer, so that autograd can differentiate it; W2² by the quantiles μ + σ z, integrated over z."""
    own_mean, own_std = weights.mean(), (weights - weights.mean()).square().mean().sqrt()
    ours, target = Normal(own_mean, own_std), Normal(number(mean), number(std))
    if kind == "forward-kl":
        return torch_kl(ours, target)
    if kind == "reverse-kl":
        return torch_kl(target, ours)
    apart = (own_mean + own_std * NODES) - (mean + std * NODES)
    return (MASSES * apart.square()).sum() / math.sqrt(2 * math.pi)


shapes = st.lists(st.integers(1, 6), min_size=2, max_size=4).filter(lambda shape: math.prod(shape) > 1)


@quick
@given(kind=kinds, shape=shapes, mean=means, std=stds, target_mean=means, target_std=stds, seed=seeds)
def test_value_and_gradient_agree_with_the_definition(kind, shape, mean, std, target_mean, target_std, seed):
    weights, target = normal(shape, mean, std, seed).requires_grad_(), scope(target_mean, target_std)
    expected = by_definition(kind, weights, target_mean, target_std)
    ours = measure({"a": weights})
    assert divergence(ours, target, kind).item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    (gradient,) = torch.autograd.grad(expected, weights)
    a, b = gradient_coefficients(ours, target, [weights.numel()], kind)
    values = weights.detach()
    size = gradient.abs().max().item() + 1e-3 * (a.abs() + b.abs() * values.abs().max()).item()  # a + b w cancels
    torch.testing.assert_close(a + b * values, gradient, rtol=0, atol=1e-9 * size)


@quick
@given(kind=kinds, shape=shapes, mean=means, std=stds, target_mean=means, target_std=stds, seed=seeds)
def test_regularizer_adds_the_gradient(kind, shape, mean, std, target_mean, target_std, seed):
    weights = normal(shape, mean, std, seed).requires_grad_()
    (gradient,) = torch.autograd.grad(by_definition(kind, weights, target_mean, target_std), weights)
    regularizer = WeightScopeRegularizer([("a", weights)], scope(target_mean, target_std), divergence=kind)
    regularizer.add_gradient()
    scale = gradient.abs().max().item() + 1e-3 * weights.abs().max().item() / weights.numel()
    torch.testing.assert_close(weights.grad, gradient, rtol=0, atol=1e-9 * max(scale, 1))
    assert regularizer.penalty() == pytest.approx(
        by_definition(kind, weights, target_mean, target_std).item(), rel=1e-9, abs=1e-12
    )


@given(kind=kinds, mean=means, std=stds, other=means, other_std=stds)
def test_zero_iff_equal(kind, mean, std, other, other_std):
    assert divergence(scope(mean, std), scope(mean, std), kind).item() == 0
    apart = divergence(scope(mean, std), scope(other, other_std), kind).item()
    assert apart >= 0
    if abs(mean - other) > 1e-3 or abs(std - other_std) > 1e-3:
        assert apart > 0


def test_by_hand():
    """From N(1, 4) to N(3, 1): forward (4 + 4)/2 − 1/2 − ln 2, reverse ln 2 + 5/8 − 1/2, W2² = 4 + 1."""
    values = {kind: divergence(scope(1, 2), scope(3, 1), kind).item() for kind in DIVERGENCES}
    assert values == pytest.approx(
        {"forward-kl": 3.5 - math.log(2), "reverse-kl": math.log(2) + 1 / 8, "wasserstein": 5}, rel=1e-14
    )


def minimiser(kind: str, weights: Tensor, mean: float, std: float, c: float) -> Tensor:
    """Of ½‖w′ − w‖² + c D(w′), by L-BFGS from w."""
    moved = weights.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [moved],
        max_iter=2000,
        max_eval=4000,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (moved - weights).square().sum() / 2 + c * by_definition(kind, moved, mean, std)
        loss.backward()
        return loss

    optimizer.step(closure)
    return moved.detach()


@pytest.mark.parametrize("kind", proximal_kinds)
@pytest.mark.parametrize("c", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(("target_mean", "target_std"), [(0.0, 0.5), (2.0, 2.0)])
def test_proximal_map_is_where_a_minimiser_ends(kind, c, target_mean, target_std):
    weights = normal([2, 3], 0.7, 1.2, seed=1)
    a, b = proximal_coefficients(measure({"a": weights}), scope(target_mean, target_std), [6], c, kind)
    expected = minimiser(kind, weights, target_mean, target_std, c)
    assert (expected - weights).abs().max() > 1e-3  # the minimiser has moved
    torch.testing.assert_close(a + b * weights, expected, rtol=0, atol=1e-6)


@quick
@given(shape=shapes, mean=means, std=stds, target_mean=means, target_std=stds, c=st.floats(1e-3, 1e3), seed=seeds)
def test_wasserstein_proximal_map_is_stationary(shape, mean, std, target_mean, target_std, c, seed):
    weights = normal(shape, mean, std, seed)
    a, b = proximal_coefficients(
        measure({"a": weights}), scope(target_mean, target_std), [weights.numel()], c, "wasserstein"
    )
    moved = (a + b * weights).requires_grad_()
    (gradient,) = torch.autograd.grad(by_definition("wasserstein", moved, target_mean, target_std), moved)
    assert (moved - weights + c * gradient).abs().max().item() <= 1e-11 * (1 + c) * (1 + std / target_std)


@pytest.mark.parametrize("kind", proximal_kinds)
def test_a_huge_proximal_step_lands_on_the_target(kind):
    weights = normal([5, 8], 3.0, 0.5, seed=0).requires_grad_()
    regularizer = WeightScopeRegularizer(
        [("a", weights)], scope(-1, 0.25), strength=1e12, mode="proximal", divergence=kind
    )
    regularizer.proximal_step(0.1)
    landed = measure({"a": weights})
    assert landed.means.item() == pytest.approx(-1, abs=1e-6)
    assert landed.variances.sqrt().item() == pytest.approx(0.25, abs=1e-6)


def test_reverse_kl_is_refused_in_proximal_mode():
    for refused in (
        lambda: proximal_coefficients(scope(0, 1), scope(0, 2), [4], 1.0, "reverse-kl"),
        lambda: WeightScopeRegularizer([], scope(0, 1), mode="proximal", divergence="reverse-kl"),
    ):
        with pytest.raises(ValueError, match=r"'reverse-kl' has no proximal map .* allowed is mode 'loss', or forward"):
            refused()


def test_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match="one of forward-kl, reverse-kl, wasserstein, got 'js'"):
        divergence_of("js")


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_degenerate_layers_are_left_alone(kind):
    constant = torch.full((3, 4), 0.1).double().requires_grad_()
    regularizer = WeightScopeRegularizer([("a", constant)], scope(0, 1), divergence=kind)
    regularizer.add_gradient()
    assert constant.grad is None
    assert regularizer.penalty() == 0


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_curvature_at_the_target_is_the_hessians(kind):
    """Half the largest eigenvalue of ∂²D/∂w², by autograd."""
    weights = normal([2, 3], 0.4, 0.8, seed=3)
    ours = measure({"a": weights})
    mean, std = ours.means.item(), ours.variances.sqrt().item()
    hessian = torch.autograd.functional.hessian(lambda w: by_definition(kind, w, mean, std), weights.flatten())
    largest = torch.linalg.eigvalsh(hessian)[-1].item()
    assert DIVERGENCES[kind].curvature(std**2, 6.0) == pytest.approx(largest / 2, rel=1e-8)
