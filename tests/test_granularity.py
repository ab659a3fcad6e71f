"""Scopes of layers, channels and whole models: measured and pulled alike."""

import copy
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_divergence import by_definition, minimiser
from torch import Tensor, nn

from fedwsa.granularity import GRANULARITIES, layer_of, units
from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.scope import WeightScope, measure

quick = settings(max_examples=20)
seeds = st.integers(0, 2**32 - 1)


def model_of(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A convolution and a linear layer with unlike channels."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 4))
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        spread = 1 + torch.arange(len(values)).double().reshape(-1, *[1] * (values.ndim - 1))
        parameter.data = (0.2 + 0.3 * spread * values).to(dtype)
    return model


def parts(model: nn.Module, granularity: str) -> dict[str, Tensor]:
    """Each unit's weights, flat, put together here by hand."""
    layers = {name: tensor for name, tensor in model.named_parameters() if tensor.ndim >= 2}
    if granularity == "layer":
        return {name: tensor.flatten() for name, tensor in layers.items()}
    if granularity == "channel":
        return {f"{name}[{i}]": row.flatten() for name, tensor in layers.items() for i, row in enumerate(tensor)}
    return {"model": torch.cat([tensor.flatten() for tensor in layers.values()])}


def target_for(model: nn.Module, granularity: str, seed: int = 1) -> WeightScope:
    names = tuple(parts(model, granularity))
    draw = torch.Generator().manual_seed(seed)
    means = torch.randn(len(names), dtype=torch.float64, generator=draw)
    return WeightScope(names, means, 0.2 + torch.rand(len(names), dtype=torch.float64, generator=draw))


def penalty_of(model: nn.Module, target: WeightScope, granularity: str, kind: str = "forward-kl") -> Tensor:
    numbers = zip(target.means.tolist(), target.variances.sqrt().tolist(), strict=True)
    mine = parts(model, granularity).values()
    return torch.stack([by_definition(kind, w, *pair) for w, pair in zip(mine, numbers, strict=True)]).sum()


# ---- measuring


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measure_is_each_units_mean_and_variance(granularity, dtype):
    model = model_of(dtype=dtype)
    measured = measure(dict(model.named_parameters()), granularity=granularity)
    expected = {name: values.detach().double().numpy() for name, values in parts(model, granularity).items()}
    assert measured.names == tuple(expected)
    np.testing.assert_allclose(measured.means, [values.mean() for values in expected.values()], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(measured.variances, [values.var() for values in expected.values()], rtol=1e-12)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_units_are_what_is_measured(granularity):
    model = model_of()
    shapes = {name: tensor.shape for name, tensor in model.named_parameters() if tensor.ndim >= 2}
    found = units(shapes, granularity)
    assert found == {name: len(values) for name, values in parts(model, granularity).items()}
    layers = {layer_of(unit, granularity) for unit in found}
    assert layers == ({"model"} if granularity == "model" else set(shapes))


def test_a_constant_channel_has_variance_zero_exactly():
    weights = torch.randn(3, 97, generator=torch.Generator().manual_seed(0))
    weights[1] = 0.1
    variances = measure({"a": weights}, granularity="channel").variances.tolist()
    assert [variance == 0 for variance in variances] == [False, True, False]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nothing_to_measure(granularity):
    assert measure({"bias": torch.ones(3)}, granularity=granularity).names == ()
    empty = measure({"a": torch.empty(2, 0)}, granularity=granularity)
    assert empty.variances.tolist() == [0.0] * len(empty.names)


def test_unknown_granularity_is_refused():
    with pytest.raises(ValueError, match="one of layer, channel, model, got 'block'"):
        measure({"a": torch.ones(2, 2)}, granularity="block")


# ---- pulling


@quick
@given(
    granularity=st.sampled_from(GRANULARITIES),
    kind=st.sampled_from(["forward-kl", "reverse-kl", "wasserstein"]),
    reduction=st.sampled_from(["sum", "mean"]),
    strength=st.floats(0.01, 50),
    seed=seeds,
)
def test_gradient_and_penalty_agree_with_autograd(granularity, kind, reduction, strength, seed):
    model = model_of(seed)
    target = target_for(model, granularity, seed)
    total = penalty_of(model, target, granularity, kind) / (len(target.names) if reduction == "mean" else 1)
    weights = [model[0].weight, model[2].weight]
    expected = torch.autograd.grad(strength * total, weights)
    regularizer = WeightScopeRegularizer(
        model.named_parameters(),
        target,
        strength=strength,
        reduction=reduction,
        divergence=kind,
        granularity=granularity,
    )
    regularizer.add_gradient()
    for actual, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(actual.grad, gradient, rtol=0, atol=1e-9 * gradient.abs().max().item())
    assert regularizer.penalty() == pytest.approx(total.item(), rel=1e-9)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["forward-kl", "wasserstein"])
def test_proximal_step_is_where_a_minimiser_ends(granularity, kind):
    model = model_of()
    target = target_for(model, granularity)
    goals = zip(target.means.tolist(), target.variances.sqrt().tolist(), strict=True)
    before = parts(copy.deepcopy(model), granularity)
    c = 0.1 * 20.0 / (1 - 0.5)
    WeightScopeRegularizer(
        model.named_parameters(), target, strength=20.0, mode="proximal", divergence=kind, granularity=granularity
    ).proximal_step(0.1, momentum=0.5)
    for (name, weights), goal in zip(before.items(), goals, strict=True):
        expected = minimiser(kind, weights.detach(), *goal, c)
        torch.testing.assert_close(parts(model, granularity)[name].detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mode", ["loss", "proximal"])
@pytest.mark.parametrize("mean", [0.0, 1.0, -300.0])
def test_float32_is_as_good_as_float64(granularity, mode, mean):
    exact, rounded = model_of(), model_of(dtype=torch.float32)
    for model in (exact, rounded):
        with torch.no_grad():
            for plain, own in zip(rounded.parameters(), model.parameters(), strict=True):
                if model is rounded:
                    own.add_(mean)
                else:
                    own.copy_((plain + mean).double())
    near = target_for(exact, granularity)
    target = WeightScope(near.names, near.means + mean, near.variances)
    for model in (exact, rounded):
        regularizer = WeightScopeRegularizer(model.named_parameters(), target, mode=mode, granularity=granularity)
        regularizer.add_gradient()
        regularizer.proximal_step(0.1)
    for one, other in ((exact[0].weight, rounded[0].weight), (exact[2].weight, rounded[2].weight)):
        expected, actual = (one.grad, other.grad) if mode == "loss" else (one.detach(), other.detach())
        tolerance = 2e-6 if mode == "loss" else 1e-7  # of the largest gradient; of the largest weight
        torch.testing.assert_close(
            actual.double(), expected, rtol=0, atol=tolerance * max(expected.abs().max().item(), 1e-3)
        )


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_variance_is_exact_where_the_mean_is_a_hundred_million_deviations(granularity):
    model = model_of()
    for layer in (model[0].weight, model[2].weight):
        layer.data = 1e6 + 0.01 * layer.data
    near = measure(dict(model.named_parameters()), granularity=granularity)
    target = WeightScope(near.names, near.means + 0.01, near.variances * 4)
    expected = torch.autograd.grad(penalty_of(model, target, granularity), [model[0].weight, model[2].weight])
    WeightScopeRegularizer(model.named_parameters(), target, granularity=granularity).add_gradient()
    for weights, gradient in zip((model[0].weight, model[2].weight), expected, strict=True):
        torch.testing.assert_close(weights.grad, gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_an_update_that_the_dtype_cannot_hold_is_not_made(granularity, mode, caplog):
    weights = nn.Parameter(torch.randn(2, 9, generator=torch.Generator().manual_seed(0)))
    before = weights.detach().clone()
    names = tuple(units({"a": weights.shape}, granularity))
    # Loss mode would divide by σ_t² = 1e-60; the proximal map would go to 1e40.
    mean, variance = (0.0, 1e-60) if mode == "loss" else (1e40, 1.0)
    target = WeightScope(
        names,
        torch.full((len(names),), mean, dtype=torch.float64),
        torch.full((len(names),), variance, dtype=torch.float64),
    )
    with caplog.at_level(logging.WARNING, logger="fedwsa"):
        regularizer = WeightScopeRegularizer([("a", weights)], target, strength=1e9, mode=mode, granularity=granularity)
        regularizer.add_gradient()
        regularizer.proximal_step(1.0)
    assert torch.equal(weights, before)
    assert weights.grad is None or not weights.grad.any()
    assert all(name in caplog.text for name in names)


def test_channels_of_half_precision_are_pulled():
    weights = nn.Parameter(model_of()[0].weight.detach().bfloat16())
    target = WeightScope(("a[0]", "a[1]", "a[2]"), torch.zeros(3).double(), torch.full((3,), 0.25).double())
    WeightScopeRegularizer(
        [("a", weights)], target, strength=1e9, mode="proximal", granularity="channel"
    ).proximal_step(0.1)
    landed = measure({"a": weights}, granularity="channel")
    assert landed.variances.tolist() == pytest.approx([0.25] * 3, rel=0.02)


@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_degenerate_channels_are_left_alone_and_reported_once(mode, caplog):
    weights = nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))
    weights.data[1], weights.data[2, 3] = 0.1, float("nan")
    before = weights.detach().clone()
    variances = torch.ones(5).double()
    variances[3] = 0
    target = WeightScope(tuple(f"a[{i}]" for i in range(5)), torch.ones(5).double(), variances)
    with caplog.at_level(logging.WARNING, logger="fedwsa"):
        regularizer = WeightScopeRegularizer([("a", weights)], target, mode=mode, granularity="channel")
        for _ in range(2):
            regularizer.add_gradient()
            regularizer.proximal_step(0.1)
    assert [record.getMessage().split(": ")[-1] for record in caplog.records] == ["a[1], a[2], a[3]"]
    changed = weights.grad if mode == "loss" else weights.detach().nan_to_num() - before.nan_to_num()
    assert [bool(row.any()) for row in changed] == [True, False, False, False, True]


@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_a_constant_model_is_left_alone(value, mode, caplog):
    weights = nn.Parameter(torch.full((3, 4), value))
    target = WeightScope(("model",), torch.ones(1).double(), torch.ones(1).double())
    with caplog.at_level(logging.WARNING, logger="fedwsa"):
        regularizer = WeightScopeRegularizer([("a", weights)], target, mode=mode, granularity="model")
        regularizer.add_gradient()
        regularizer.proximal_step(0.1)
    assert weights.grad is None
    assert torch.equal(weights, torch.full((3, 4), value))
    assert caplog.text.count("degenerate") == 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_frozen_layers_and_layers_of_another_optimizer_are_not_written(granularity, mode):
    model, original = model_of(), model_of()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    target = target_for(model, granularity)
    WeightScopeRegularizer(model.named_parameters(), target, mode=mode, granularity=granularity).attach(optimizer)
    optimizer.step()
    assert model[0].weight.grad is None
    assert torch.equal(model[0].weight, original[0].weight)
    assert not torch.equal(model[2].weight, original[2].weight)


def test_a_whole_model_with_two_rates_is_refused_in_proximal_mode_and_taken_in_loss_mode():
    groups = lambda model: [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}]  # noqa: E731
    model = model_of()
    target, weights = target_for(model, "model"), [model[0].weight, model[2].weight]
    expected = torch.autograd.grad(penalty_of(model, target, "model"), weights)
    optimizer = torch.optim.SGD(groups(model), lr=0.01)
    WeightScopeRegularizer(model.named_parameters(), target, granularity="model").attach(optimizer)
    optimizer.step()
    for rate, gradient, actual, original in zip(
        (0.01, 0.2), expected, weights, (model_of()[0].weight, model_of()[2].weight), strict=True
    ):
        torch.testing.assert_close(actual, original - rate * gradient, rtol=1e-12, atol=1e-12)

    model = model_of()
    optimizer = torch.optim.SGD(groups(model), lr=0.01)
    WeightScopeRegularizer(model.named_parameters(), target, mode="proximal", granularity="model").attach(optimizer)
    with pytest.raises(ValueError, match="needs one learning rate and momentum"):
        optimizer.step()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_strength_zero_changes_no_bit(granularity, mode):
    model = model_of()
    target = target_for(model, granularity)
    regularizer = WeightScopeRegularizer(
        model.named_parameters(), target, strength=0.0, mode=mode, granularity=granularity
    )
    regularizer.add_gradient()
    regularizer.proximal_step(0.1)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), model_of().parameters(), strict=True))


def test_channels_last_convolutions_keep_their_memory_format():
    for mode in ("loss", "proximal"):
        plain, other = model_of()[0], model_of()[0].to(memory_format=torch.channels_last)
        for module in (plain, other):
            target = WeightScope(
                tuple(f"weight[{i}]" for i in range(3)), torch.zeros(3).double(), torch.ones(3).double()
            )
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            WeightScopeRegularizer(module.named_parameters(), target, mode=mode, granularity="channel").attach(
                optimizer
            )
            optimizer.step()
        assert other.weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(other.weight, plain.weight, rtol=1e-12, atol=1e-12)
        assert not torch.equal(plain.weight, model_of()[0].weight)


def test_a_target_of_other_units_is_refused():
    model = model_of()
    whole = target_for(model, "channel")
    cut = WeightScope(whole.names[1:], whole.means[1:], whole.variances[1:])
    with pytest.raises(ValueError, match=r"units of granularity 'channel' in order, odd are \['0.weight\[0\]'\]"):
        WeightScopeRegularizer(model.named_parameters(), cut, granularity="channel")
    with pytest.raises(ValueError, match="granularity 'model'"):
        WeightScopeRegularizer(model.named_parameters(), target_for(model, "layer"), granularity="model")
    with pytest.raises(ValueError, match=r"got \['model'\]"):
        WeightScopeRegularizer(model.named_parameters(), target_for(model, "model"))
