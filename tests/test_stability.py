"""The bound of loss mode from both sides, λ → ∞ in proximal mode, and λ as a share of the task's gradient."""

import logging
import math

import pytest
import torch
from test_granularity import model_of, parts, penalty_of, target_for
from torch import nn

from fedwsa.divergence import DIVERGENCES
from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.scope import WeightScope, measure
from fedwsa.stability import Descent, stable_strength, warning

DESCENTS = [Descent(0.1), Descent(0.03, 0.9), Descent(0.1, 0.5), Descent(0.1, 0.9, nesterov=True)]


def scope(**layers: tuple[float, float]) -> WeightScope:
    mean, std = torch.tensor(list(layers.values()), dtype=torch.float64).reshape(-1, 2).T
    return WeightScope(tuple(layers), mean.clone(), std.square())


def sizes_of(model: nn.Module, granularity: str = "layer") -> dict[str, int]:
    return {name: len(values) for name, values in parts(model, granularity).items()}


def settle(strength: float, descent: Descent, divergence: str, reduction: str, steps: int) -> tuple[float, float]:
    """The penalty before and after so many steps of SGD on the term alone, which starts 0.1 % from the target."""
    model = model_of()
    target = scope(
        **{name: (w.mean().item(), 1.001 * w.std(correction=0).item()) for name, w in parts(model, "layer").items()}
    )
    layers = [model[0].weight, model[2].weight]
    optimizer = torch.optim.SGD(layers, descent.learning_rate, descent.momentum, nesterov=descent.nesterov)
    regularizer = WeightScopeRegularizer(
        model.named_parameters(), target, strength=strength, divergence=divergence, reduction=reduction
    )
    regularizer.attach(optimizer)
    before = regularizer.penalty()
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.step()
    return before, regularizer.penalty()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("descent", DESCENTS, ids=str)
def test_loss_mode_settles_below_the_bound_and_not_above(descent, reduction, divergence):
    target = measure(dict(model_of().named_parameters()))
    target = WeightScope(target.names, target.means, target.variances * 1.001**2)
    bound = stable_strength(target, sizes_of(model_of()), descent, reduction=reduction, divergence=divergence)
    before, below = settle(0.95 * bound, descent, divergence, reduction, steps=200)
    assert below < 1e-6 * before
    before, above = settle(1.05 * bound, descent, divergence, reduction, steps=200)
    assert above > 10 * before


@pytest.mark.parametrize(
    ("descent", "limit"), [(Descent(0.2, 0.9), 1.9), (Descent(0.2, 0.9, nesterov=True), 1.9 / 2.8)]
)
def test_a_quadratic_of_that_curvature_shows_the_bound_from_both_sides(descent, limit):
    """x ↦ ½ h x² with h = 2 λ/(n σ_t²), PyTorch's own SGD."""
    target, n, std = scope(a=(0, 0.01)), 50, 0.01
    bound = stable_strength(target, {"a": n}, descent)
    assert descent.learning_rate * bound / (n * std**2) == pytest.approx(limit, rel=1e-12)
    ends = []
    for factor in (0.98, 1.02):
        x = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([x], descent.learning_rate, descent.momentum, nesterov=descent.nesterov)
        for _ in range(400):
            x.grad = 2 * factor * bound / (n * std**2) * x.detach()
            optimizer.step()
        ends.append(abs(x.item()))
    assert ends[0] < 1e-3
    assert ends[1] > 1e3


def test_the_bound_by_hand():
    """The narrowest layer decides: nσ_t² = 4 · 0.25, against 100 · 1; by W2² the one with the fewest weights, 4."""
    target, sizes = scope(wide=(0, 1), narrow=(0, 0.5)), {"wide": 100, "narrow": 4}
    assert stable_strength(target, sizes, Descent(0.1)) == pytest.approx(10)
    assert stable_strength(target, sizes, Descent(0.1, 0.5)) == pytest.approx(15)
    assert stable_strength(target, sizes, Descent(0.1, 0.5, nesterov=True)) == pytest.approx(7.5)
    assert stable_strength(target, sizes, Descent(0.1), reduction="mean") == pytest.approx(20)
    assert stable_strength(target, sizes, Descent(0.1), divergence="wasserstein") == pytest.approx(40)
    assert stable_strength(target, {"wide": 100}, Descent(0.1)) == pytest.approx(1000)
    assert stable_strength(scope(flat=(0, 0)), {"flat": 9}, Descent(0.1)) == math.inf
    assert stable_strength(scope(single=(0, 1)), {"single": 1}, Descent(0.1)) == math.inf
    assert stable_strength(target, sizes, Descent(0.0)) == math.inf


def test_the_warning_has_the_numbers_and_the_alternative():
    target, sizes = scope(wide=(0, 1), narrow=(0, 0.5)), {"wide": 100, "narrow": 4}
    assert warning(target, sizes, Descent(0.1, 0.5), strength=14.9) is None
    line = warning(target, sizes, Descent(0.1, 0.5), strength=30)
    assert line == (
        "weight scope: in loss mode ηλ/(nσ_t²) = 3 of narrow is not below 1 + β = 1.5 "
        "(η = 0.1, β = 0.5, λ = 30 a unit, n = 4, σ_t = 0.5), so that it does not settle; "
        "take a strength < 15, or mode proximal, stable for every λ"
    )
    assert "proximal" not in warning(target, sizes, Descent(0.1), strength=30, divergence="reverse-kl")
    assert "(1 + β)/(1 + 2β) = 0.75" in warning(target, sizes, Descent(0.1, 0.5, nesterov=True), strength=30)


@pytest.mark.parametrize("granularity", ["layer", "channel", "model"])
def test_attaching_beyond_the_bound_is_told(granularity, caplog):
    target = target_for(model_of(), granularity)
    bound = stable_strength(target, sizes_of(model_of(), granularity), Descent(0.1, 0.9))
    said = []
    for strength, mode in ((0.99 * bound, "loss"), (1.01 * bound, "loss"), (1.01 * bound, "proximal")):
        model = model_of()
        regularizer = WeightScopeRegularizer(
            model.named_parameters(), target, strength=strength, mode=mode, granularity=granularity
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="fedwsa"):
            regularizer.attach(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        said.append(caplog.text.count("does not settle"))
    assert said == [0, 1, 0]


def test_adam_has_no_bound(caplog):
    model = model_of()
    target = target_for(model, "layer")
    WeightScopeRegularizer(model.named_parameters(), target, strength=1e9).attach(torch.optim.Adam(model.parameters()))
    assert caplog.records == []


@pytest.mark.parametrize("divergence", ["forward-kl", "wasserstein"])
@pytest.mark.parametrize("granularity", ["layer", "channel", "model"])
def test_a_hundred_million_in_proximal_mode_holds_the_target_while_it_trains(granularity, divergence):
    """λ = 10⁸ · nσ_t²/η of the widest unit, float64."""
    model, rate = model_of(), 0.05
    target, sizes = target_for(model, granularity), sizes_of(model, granularity)
    strength = 1e8 * max(n * max(v, 1) for n, v in zip(sizes.values(), target.variances.tolist(), strict=True)) / rate
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    WeightScopeRegularizer(
        model.named_parameters(),
        target,
        strength=strength,
        mode="proximal",
        divergence=divergence,
        granularity=granularity,
    ).attach(optimizer)
    images = torch.randn(16, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(16) % 4).backward()
        optimizer.step()
        landed = measure(dict(model.named_parameters()), granularity=granularity)
        torch.testing.assert_close(landed.means, target.means, rtol=0, atol=1e-6)
        torch.testing.assert_close(landed.variances.sqrt(), target.variances.sqrt(), rtol=0, atol=1e-6)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# ---- λ as a share


def with_task_gradient(model: nn.Module) -> float:
    """Gradients in place; the norm over both layers."""
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return math.sqrt(sum(layer.grad.square().sum().item() for layer in (model[0].weight, model[2].weight)))


@pytest.mark.parametrize("granularity", ["layer", "channel", "model"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_relative_strength_makes_the_terms_gradient_that_share_of_the_tasks(granularity, reduction, divergence):
    model = model_of()
    target = target_for(model, granularity)
    task = with_task_gradient(model)
    regularizer = WeightScopeRegularizer(
        model.named_parameters(), target, divergence=divergence, reduction=reduction, granularity=granularity
    )
    regularizer.fix_strength(1e-3, learning_rate=1e-4)  # small, so that nothing caps it
    total = penalty_of(model, target, granularity, divergence) / (len(target.names) if reduction == "mean" else 1)
    term = torch.autograd.grad(regularizer.strength * total, [model[0].weight, model[2].weight])
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in term))
    assert norm == pytest.approx(1e-3 * task, rel=1e-9)


def test_relative_strength_is_capped_by_the_bound():
    for factor in (1.0, 1.0001):  # at the target, where the term has no gradient, and near it
        model = model_of()
        target = measure(dict(model.named_parameters()))
        target = WeightScope(target.names, target.means, target.variances * factor)
        with_task_gradient(model)
        regularizer = WeightScopeRegularizer(model.named_parameters(), target, reduction="mean")
        regularizer.fix_strength(1.0, 0.1, 0.9)
        bound = stable_strength(target, sizes_of(model), Descent(0.1, 0.9), reduction="mean")
        assert regularizer.strength == pytest.approx(bound / 2, rel=1e-12)


def test_frozen_layers_count_on_neither_side():
    model = model_of()
    target = target_for(model, "layer")
    with_task_gradient(model)
    model[0].weight.requires_grad_(False)
    regularizer = WeightScopeRegularizer(model.named_parameters(), target)
    regularizer.fix_strength(1e-3, 1e-4)
    (term,) = torch.autograd.grad(penalty_of(model, target, "layer"), model[2].weight)
    assert regularizer.strength == pytest.approx(1e-3 * (model[2].weight.grad.norm() / term.norm()).item(), rel=1e-9)


def test_a_frozen_layer_bounds_nothing(caplog):
    """The narrower of two layers, which is never pulled: neither the cap nor the warning is of it."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 50)).double()
    target = scope(**{"0.weight": (0, 0.01), "2.weight": (0, 1)})
    with_task_gradient(model)
    model[0].weight.requires_grad_(False)
    regularizer = WeightScopeRegularizer(model.named_parameters(), target, strength=100.0)
    with caplog.at_level(logging.WARNING, logger="fedwsa"):
        regularizer.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert caplog.text == ""
    regularizer.fix_strength(1e9, 0.1)
    assert regularizer.strength == pytest.approx(0.5 * stable_strength(target, {"2.weight": 150}, Descent(0.1)))


def test_degenerate_layers_do_not_count():
    model = model_of()
    target = target_for(model, "layer")
    norm = with_task_gradient(model)
    (term,) = torch.autograd.grad(penalty_of(model, target, "layer"), model[2].weight)
    model[0].weight.data[0, 0, 0, 0] = math.nan
    regularizer = WeightScopeRegularizer(model.named_parameters(), target)
    regularizer.fix_strength(1e-3, 1e-4)
    assert regularizer.strength == pytest.approx(1e-3 * norm / term.norm().item(), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_without_a_task_gradient_the_term_is_off(value):
    model = model_of()
    regularizer = WeightScopeRegularizer(model.named_parameters(), target_for(model, "layer"))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    regularizer.fix_strength(0.1, 0.1)
    assert regularizer.strength == 0


@pytest.mark.parametrize("share", [-0.1, math.nan, math.inf])
def test_share_must_be_finite_and_not_negative(share):
    with pytest.raises(ValueError, match="share must be >= 0 and finite"):
        WeightScopeRegularizer([], WeightScope((), *[torch.zeros(0).double()] * 2)).fix_strength(share, 0.1)
