import copy
import logging
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.scope import WeightScope, kl_divergence, measure, proximal_coefficients

quick = settings(max_examples=30)
shapes = st.lists(st.integers(1, 6), min_size=2, max_size=4).filter(lambda shape: math.prod(shape) > 1)
seeds = st.integers(0, 2**32 - 1)


def layer(shape, mean=0.0, std=1.0, seed=0, dtype=torch.float64) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((mean + std * torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype))


def scope(**layers: tuple[float, float]) -> WeightScope:
    """A scope from a (mean, standard deviation) pair for each name."""
    mean, std = torch.tensor(list(layers.values()), dtype=torch.float64).reshape(-1, 2).T
    return WeightScope(tuple(layers), mean.clone(), std.square())


def divergence(weights: Tensor, mean: float, std: float) -> Tensor:
    """The divergence of one layer, written so that autograd can differentiate it."""
    variance = (weights - weights.mean()).square().mean()
    return math.log(std) - variance.log() / 2 + (variance + (weights.mean() - mean) ** 2) / (2 * std**2) - 0.5


def network(seed: int = 0) -> nn.Sequential:
    """Two layers and a normalisation between, float64, the same for the same seed."""
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()
    for k, parameter in enumerate(model.parameters()):
        parameter.data = layer(parameter.shape, 0.1, 0.5, seed + k).data
    return model


NETWORK_TARGET = scope(**{"0.weight": (0.05, 0.2), "3.weight": (-0.1, 0.9)})


def task_loss(model: nn.Module) -> Tensor:
    inputs, labels = layer((16, 6), seed=100).detach(), torch.arange(16) % 3
    return nn.functional.cross_entropy(model(inputs), labels)


def penalty_of(model: nn.Module) -> Tensor:
    parameters = dict(model.named_parameters())
    numbers = zip(NETWORK_TARGET.names, NETWORK_TARGET.means.tolist(), NETWORK_TARGET.variances.tolist(), strict=True)
    return torch.stack([divergence(parameters[name], mean, variance**0.5) for name, mean, variance in numbers]).sum()


def groups(model: nn.Sequential) -> list[dict[str, object]]:
    """The two layers' parameters at different learning rates."""
    return [{"params": model[0].parameters(), "lr": 0.03}, {"params": model[3].parameters(), "lr": 0.2}]


def train_both(make: Callable[[nn.Module], torch.optim.Optimizer], steps: int) -> tuple[nn.Module, nn.Module]:
    """Two networks: trained on the penalised loss by autograd, and on the task's with the term attached, λ = 0.7."""
    reference, aligned = network(), network()
    reference_optimizer, optimizer = make(reference), make(aligned)
    WeightScopeRegularizer(aligned.named_parameters(), NETWORK_TARGET, strength=0.7).attach(optimizer)
    for _ in range(steps):
        reference_optimizer.zero_grad()
        (task_loss(reference) + 0.7 * penalty_of(reference)).backward()
        reference_optimizer.step()
        optimizer.zero_grad()
        task_loss(aligned).backward()
        optimizer.step()
    return reference, aligned


def assert_same_weights(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    for (name, expected), actual in zip(other.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=name)


# ---- loss mode: the gradient


@quick
@given(
    layers=st.lists(
        st.tuples(shapes, st.floats(-3, 3), st.floats(0.1, 3), st.floats(-3, 3), st.floats(0.1, 3)),
        min_size=1,
        max_size=4,
    ),
    strength=st.floats(1e-3, 50),
    reduction=st.sampled_from(["sum", "mean"]),
    strided=st.booleans(),
    seed=seeds,
)
def test_gradient_and_penalty_agree_with_autograd(layers, strength, reduction, strided, seed):
    parameters, total, goals = {}, torch.zeros(()).double(), {}
    for k, (shape, mean, std, target_mean, target_std) in enumerate(layers):
        weights = layer(shape, mean, std, seed + k)
        parameters[f"l{k}"] = nn.Parameter(weights.data.transpose(0, -1)) if strided else weights
        goals[f"l{k}"] = (target_mean, target_std)
        total = total + divergence(parameters[f"l{k}"], target_mean, target_std)
    if reduction == "mean":
        total = total / len(layers)
    expected = torch.autograd.grad(strength * total, list(parameters.values()))

    regularizer = WeightScopeRegularizer(parameters.items(), scope(**goals), strength=strength, reduction=reduction)
    for weights in parameters.values():
        weights.grad = torch.zeros_like(weights)
    regularizer.add_gradient()
    for weights, gradient in zip(parameters.values(), expected, strict=True):
        torch.testing.assert_close(weights.grad, gradient, rtol=0, atol=1e-9 * gradient.abs().max().item())
    assert regularizer.penalty() == pytest.approx(total.item(), rel=1e-9, abs=1e-13)


def test_gradient_is_added_to_what_is_there():
    weights = layer((4, 5))
    weights.grad = torch.full_like(weights, 3.0)
    WeightScopeRegularizer([("a", weights)], scope(a=(1, 2)), strength=7).add_gradient()
    torch.testing.assert_close(weights.grad, 3 + 7 * torch.autograd.grad(divergence(weights, 1, 2), weights)[0])


def test_a_parameter_without_gradient_gets_one_and_a_frozen_one_does_not():
    used, frozen = layer((4, 5)), layer((4, 5)).requires_grad_(False)
    WeightScopeRegularizer([("a", used), ("b", frozen)], scope(a=(1, 2), b=(1, 2))).add_gradient()
    torch.testing.assert_close(used.grad, torch.autograd.grad(divergence(used, 1, 2), used)[0])
    assert frozen.grad is None


@pytest.mark.parametrize("shape", [(200, 784), (10, 200)])
@pytest.mark.parametrize(
    ("mean", "std"), [(0.0, 0.03), (0.02, 0.03), (0.05, 0.03), (1.0, 1e-3), (-300.0, 0.1), (0.0, 1e-20), (0.0, 1e10)]
)
def test_float32_gradient_is_accurate_even_where_the_mean_dwarfs_the_deviation(shape, mean, std):
    weights = layer(shape, mean, std, dtype=torch.float32)
    exact = nn.Parameter(weights.detach().double())
    goal = scope(a=(mean + 0.3 * std, 0.8 * std))
    for parameter in (weights, exact):
        WeightScopeRegularizer([("a", parameter)], goal).add_gradient()
    (expected,) = torch.autograd.grad(divergence(exact, mean + 0.3 * std, 0.8 * std), exact)
    scale = expected.abs().max().item()
    torch.testing.assert_close(exact.grad, expected, rtol=0, atol=1e-9 * scale)
    torch.testing.assert_close(weights.grad.double(), expected, rtol=0, atol=2e-6 * scale)


def test_float32_gradient_of_millions_of_weights_is_accurate():
    weights = layer((2000, 2000), 0.0, 0.05, dtype=torch.float32)  # 5e-5 off where all are added up in one go
    WeightScopeRegularizer([("a", weights)], scope(a=(0, 0.04))).add_gradient()
    exact = weights.detach().double()
    expected = (exact / 0.04**2 - (exact - exact.mean()) / exact.var(correction=0)) / exact.numel()
    torch.testing.assert_close(weights.grad.double(), expected, rtol=0, atol=5e-6 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_layers_are_measured_in_float64(dtype):
    # One per cent from the target: a variance rounded to the layer's dtype would be wrong by a tenth of that or more.
    weights = layer((200, 784), 0.0, 0.05, dtype=dtype)
    exact = nn.Parameter(weights.detach().double())
    for parameter in (weights, exact):
        WeightScopeRegularizer([("a", parameter)], scope(a=(0, 0.0505)), strength=1e4).add_gradient()
    scale = exact.grad.abs().max().item()
    torch.testing.assert_close(weights.grad.double(), exact.grad, rtol=0, atol=2 * torch.finfo(dtype).eps * scale)


def test_layers_of_several_dtypes_each_get_their_gradient():
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    parameters = {f"l{k}": layer((4, 5), seed=k, dtype=dtype) for k, dtype in enumerate(dtypes)}
    alone = {name: copy.deepcopy(weights) for name, weights in parameters.items()}
    WeightScopeRegularizer(parameters.items(), scope(l0=(1, 2), l1=(1, 2), l2=(1, 2))).add_gradient()
    for name, weights in alone.items():
        WeightScopeRegularizer([(name, weights)], scope(**{name: (1, 2)})).add_gradient()
        assert parameters[name].grad.dtype == weights.dtype
        assert torch.equal(parameters[name].grad, weights.grad)


# ---- proximal mode

TERMS = {
    "mean": st.floats(-3, 3),
    "std": st.floats(0.1, 3),
    "target_mean": st.floats(-3, 3),
    "target_std": st.floats(0.1, 3),
    "strength": st.floats(1e-3, 1e3),
}


@quick
@given(
    shape=shapes,
    **TERMS,
    strided=st.booleans(),
    seed=seeds,
)
def test_proximal_step_is_stationary(shape, mean, std, target_mean, target_std, strength, strided, seed):
    weights = layer(shape, mean, std, seed)
    if strided:
        weights = nn.Parameter(weights.data.transpose(0, -1))
    before = weights.detach().clone()
    WeightScopeRegularizer(
        [("a", weights)], scope(a=(target_mean, target_std)), strength=strength, mode="proximal"
    ).proximal_step(0.1, momentum=0.75)
    c = 0.1 * strength / (1 - 0.75)
    (gradient,) = torch.autograd.grad(divergence(weights, target_mean, target_std), weights)
    # c ∇KL is a difference of terms of this size
    size = (
        1 + before.abs().max().item() + c * (3 + weights.abs().max().item()) * (1 / target_std**2 + 1 / weights.var())
    )
    assert (weights - before + c * gradient).abs().max().item() <= 1e-12 * size.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.1), (2.0, 0.1), (50.0, 1e-2)])
def test_infinite_strength_lands_on_the_target(dtype, mean, std):
    weights = layer((40, 50), mean, std, dtype=dtype)
    exact = weights.detach().double()
    expected = 0.3 + 0.05 * (exact - exact.mean()) / exact.std(correction=0)
    regularizer = WeightScopeRegularizer([("a", weights)], scope(a=(0.3, 0.05)), strength=1e30, mode="proximal")
    regularizer.proximal_step(0.1)
    assert regularizer.penalty() == pytest.approx(0, abs=1e-12)
    # Rounding of w − μ, whose size is the old deviation's, shrinks by σ_t/σ, but μ itself is rounded in float64.
    tolerance = 4 * torch.finfo(dtype).eps * 0.5 + 4 * torch.finfo(torch.float64).eps * mean * 0.05 / std
    torch.testing.assert_close(weights.detach().double(), expected, rtol=0, atol=tolerance)


def test_proximal_mode_settles_where_loss_mode_does_not():
    # A 512×10 head with σ_t = 0.01: η λ/(n σ_t²) = 2.93 is beyond heavy-ball's bound 1 + β = 1.9.
    distances = {}
    for mode in ("loss", "proximal"):
        weights = layer((512, 10), 0.05, 0.02)
        weights.grad = torch.zeros_like(weights)
        optimizer = torch.optim.SGD([weights], lr=0.03, momentum=0.9)
        regularizer = WeightScopeRegularizer([("a", weights)], scope(a=(0, 0.01)), strength=50.0, mode=mode)
        regularizer.attach(optimizer)
        for _ in range(30):
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()
        distances[mode] = regularizer.penalty()
    assert distances["proximal"] < 1e-12
    assert distances["loss"] > 1


def test_each_mode_does_nothing_at_the_others_call():
    for mode in ("loss", "proximal"):
        weights = layer((4, 5))
        weights.grad = torch.ones_like(weights)
        regularizer = WeightScopeRegularizer([("a", weights)], scope(a=(1, 2)), mode=mode)
        regularizer.proximal_step(0.1) if mode == "loss" else regularizer.add_gradient()
        assert torch.equal(weights, layer((4, 5)))
        assert torch.equal(weights.grad, torch.ones_like(weights))


@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf])
def test_proximal_step_refuses_a_bad_learning_rate(rate):
    regularizer = WeightScopeRegularizer([("a", layer((4, 5)))], scope(a=(1, 2)), mode="proximal")
    with pytest.raises(ValueError, match="learning rate must be"):
        regularizer.proximal_step(rate)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_proximal_step_refuses_a_bad_momentum(momentum):
    regularizer = WeightScopeRegularizer([("a", layer((4, 5)))], scope(a=(1, 2)), mode="proximal")
    with pytest.raises(ValueError, match="momentum must be"):
        regularizer.proximal_step(0.1, momentum)


# ---- loss mode under plain SGD


@quick
@given(
    shape=shapes,
    **TERMS,
    reduction=st.sampled_from(["sum", "mean"]),
    seed=seeds,
)
def test_descend_is_the_gradient_and_a_plain_step(shape, mean, std, target_mean, target_std, strength, reduction, seed):
    both = [{"a": layer(shape, mean, std, seed), "b": layer((3, 4), seed=seed)} for _ in range(2)]
    target = scope(a=(target_mean, target_std), b=(0, 1))
    ours, theirs = (
        WeightScopeRegularizer(each.items(), target, strength=strength, reduction=reduction) for each in both
    )
    task = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for each in both:
        each["a"].grad = task.clone()
    ours.descend(0.01)
    theirs.add_gradient()
    for name in ("a", "b"):
        fast, slow = both[0][name], both[1][name]
        plain = slow.detach() - 0.01 * slow.grad
        moved = fast.detach() - (0.01 * fast.grad if fast.grad is not None else 0)
        size = slow.detach().abs().max() + 0.01 * slow.grad.abs().max()
        torch.testing.assert_close(moved, plain, rtol=0, atol=1e-12 * size.item())
    assert torch.equal(both[0]["a"].grad, task)


def test_descend_does_nothing_in_proximal_mode_at_strength_zero_or_at_rate_zero():
    for options, rate in (({"mode": "proximal"}, 0.1), ({"strength": 0.0}, 0.1), ({}, 0.0)):
        weights = layer((4, 5))
        WeightScopeRegularizer([("a", weights)], scope(a=(1, 2)), **options).descend(rate)
        assert torch.equal(weights, layer((4, 5)))


@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf])
def test_descend_refuses_a_bad_learning_rate(rate):
    with pytest.raises(ValueError, match="learning rate must be"):
        WeightScopeRegularizer([("a", layer((4, 5)))], scope(a=(1, 2))).descend(rate)


# ---- what is left alone


def degenerate_layers(dtype=torch.float32) -> dict[str, nn.Parameter]:
    infinite, undefined = layer((5, 7), seed=1, dtype=dtype), layer((5, 7), seed=2, dtype=dtype)
    infinite.data[1, 2], undefined.data[0, 0] = math.inf, math.nan
    return {
        "zeros": nn.Parameter(torch.zeros(5, 7, dtype=dtype)),
        "constant": nn.Parameter(torch.full((37, 91), 0.1, dtype=dtype)),
        "single": nn.Parameter(torch.ones(1, 1, dtype=dtype)),
        "empty": nn.Parameter(torch.ones(0, 3, dtype=dtype)),
        "infinite": infinite,
        "undefined": undefined,
        "target_zero": layer((5, 7), seed=3, dtype=dtype),
        "target_undefined": layer((5, 7), seed=4, dtype=dtype),
        "target_tiny": layer((5, 7), seed=5, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_degenerate_layers_are_left_alone_and_reported_once(mode, dtype, caplog):
    parameters = {**degenerate_layers(dtype), "sound": layer((5, 7), dtype=dtype)}
    before = {name: weights.detach().clone() for name, weights in parameters.items()}
    goals = dict.fromkeys(parameters, (0.5, 2.0)) | {"target_zero": (0, 0), "target_undefined": (math.nan, 1)}
    goals["target_tiny"] = (0.5, 1e-170)
    for weights in parameters.values():
        weights.grad = torch.full_like(weights, 0.25)
    with caplog.at_level(logging.WARNING, logger="fedwsa"):
        regularizer = WeightScopeRegularizer(parameters.items(), scope(**goals), mode=mode)
        for _ in range(3):
            regularizer.add_gradient()
            regularizer.proximal_step(0.1)
    reported = [name for record in caplog.records for name in record.getMessage().split(": ")[-1].split(", ")]
    assert sorted(reported) == sorted(degenerate_layers())
    for name, weights in parameters.items():
        untouched = torch.equal(weights.view(torch.uint8), before[name].view(torch.uint8))
        untouched &= torch.equal(weights.grad, torch.full_like(weights, 0.25))
        assert untouched == (name != "sound"), name
    assert regularizer.penalty() == pytest.approx(
        kl_divergence(measure({"a": parameters["sound"]}), scope(a=(0.5, 2))).item(), rel=1e-12
    )


@pytest.mark.parametrize(
    ("mode", "std", "target_std"), [("loss", 1.0, 1e-30), ("loss", 1e-42, 1.0), ("proximal", 1e-42, 1.0)]
)
def test_an_update_that_the_dtype_cannot_hold_is_not_made(mode, std, target_std, caplog):
    weights = layer((40, 50), std=std, dtype=torch.float32)
    before = weights.detach().clone()
    regularizer = WeightScopeRegularizer([("narrow", weights)], scope(narrow=(0, target_std)), mode=mode)
    with caplog.at_level(logging.WARNING, logger="fedwsa"):
        for _ in range(2):
            regularizer.add_gradient()
            regularizer.proximal_step(1e6)
    assert torch.equal(weights, before)
    assert weights.grad is None
    assert caplog.text.count("narrow") == 1


@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_strength_zero_changes_no_bit(mode):
    plain, aligned = network().float(), network().float()
    optimizers = [torch.optim.SGD(groups(model), momentum=0.9, weight_decay=0.01) for model in (plain, aligned)]
    WeightScopeRegularizer(aligned.named_parameters(), NETWORK_TARGET, strength=0.0, mode=mode).attach(optimizers[1])
    for _ in range(5):
        for model, optimizer in zip((plain, aligned), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.ones(3, 6)), torch.arange(3)).backward()
            optimizer.step()
    for one, other in zip(plain.parameters(), aligned.parameters(), strict=True):
        assert torch.equal(one, other)


def test_strength_zero_keeps_absent_gradients_and_the_sign_of_zeros():
    absent, negative = layer((4, 5)), layer((4, 5))
    negative.grad = torch.full_like(negative, -0.0)
    WeightScopeRegularizer([("a", absent), ("b", negative)], scope(a=(1, 2), b=(1, 2)), strength=0.0).add_gradient()
    assert absent.grad is None
    assert negative.grad.signbit().all()


def test_learning_rate_zero_changes_no_bit():
    # w − μ + μ would, where |w| is far below μ.
    weights, same = (layer((40, 50), mean=1.5, dtype=torch.float32) for _ in range(2))
    WeightScopeRegularizer([("a", weights)], scope(a=(1, 2)), mode="proximal").proximal_step(0.0)
    assert torch.equal(weights, same)


# ---- attached to an optimiser

OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(groups(model), momentum=0.9, weight_decay=0.01),
    "nesterov": lambda model: torch.optim.SGD(groups(model), momentum=0.5, nesterov=True),
    "adam": lambda model: torch.optim.Adam(groups(model)),
}
MOMENTUM = {"sgd": 0.9, "nesterov": 0.5, "adam": 0.0}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_attached_loss_mode_is_training_on_the_penalised_loss(kind):
    reference, aligned = train_both(OPTIMIZERS[kind], steps=6)
    assert_same_weights(aligned, reference, 1e-10)
    assert (aligned[0].weight - network()[0].weight).abs().max() > 0.01


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_attached_proximal_mode_is_a_step_and_the_proximal_map_at_each_groups_rate(kind):
    reference, aligned = network(), network()
    reference_optimizer, optimizer = OPTIMIZERS[kind](reference), OPTIMIZERS[kind](aligned)
    WeightScopeRegularizer(aligned.named_parameters(), NETWORK_TARGET, strength=3.0, mode="proximal").attach(optimizer)
    for _ in range(6):
        reference_optimizer.zero_grad()
        task_loss(reference).backward()
        reference_optimizer.step()
        for k, weights, rate in ((0, reference[0].weight, 0.03), (1, reference[3].weight, 0.2)):
            c = rate * 3.0 / (1 - MOMENTUM[kind])
            sizes = [reference[0].weight.numel(), reference[3].weight.numel()]
            a, b = proximal_coefficients(measure(dict(reference.named_parameters())), NETWORK_TARGET, sizes, c)
            weights.data = a[k] + b[k] * weights.data
        optimizer.zero_grad()
        task_loss(aligned).backward()
        optimizer.step()
    assert_same_weights(aligned, reference, 1e-10)
    assert (aligned[0].weight - network()[0].weight).abs().max() > 0.01


def test_a_changed_learning_rate_counts_from_the_next_step():
    weights = layer((4, 5))
    weights.grad = torch.zeros_like(weights)
    optimizer = torch.optim.SGD([weights], lr=0.1)
    WeightScopeRegularizer([("a", weights)], scope(a=(1, 2)), mode="proximal").attach(optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(weights, layer((4, 5)))


def test_layers_that_the_optimizer_does_not_hold_are_left_alone():
    for mode in ("loss", "proximal"):
        model = network()
        optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)
        WeightScopeRegularizer(model.named_parameters(), NETWORK_TARGET, mode=mode).attach(optimizer)
        optimizer.step()
        assert model[0].weight.grad is None
        assert torch.equal(model[0].weight, network()[0].weight)
        assert not torch.equal(model[3].weight, network()[3].weight)


@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_an_optimizer_that_climbs_is_pulled_to_the_target_too(mode):
    climbing, descending = network(), network()
    for model, sign in ((climbing, -1.0), (descending, 1.0)):
        optimizer = torch.optim.SGD(groups(model), momentum=0.5, maximize=sign < 0)
        WeightScopeRegularizer(model.named_parameters(), NETWORK_TARGET, strength=3.0, mode=mode).attach(optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            (sign * task_loss(model)).backward()
            optimizer.step()
    assert_same_weights(climbing, descending, 1e-10)


@pytest.mark.parametrize("granularity", ["layer", "channel", "model"])
def test_sparse_gradients_are_refused_in_loss_mode_and_taken_in_proximal_mode(granularity):
    for mode in ("loss", "proximal"):
        table = nn.Embedding(30, 8, sparse=True)
        target = measure(
            {"weight": torch.randn(30, 8, generator=torch.Generator().manual_seed(0))}, granularity=granularity
        )
        regularizer = WeightScopeRegularizer(
            table.named_parameters(), target, strength=1e9, mode=mode, granularity=granularity
        )
        optimizer = torch.optim.SGD(table.parameters(), lr=0.01)
        regularizer.attach(optimizer)
        table(torch.tensor([1, 2])).sum().backward()
        if mode == "loss":
            with pytest.raises(ValueError, match=r"sparse gradient, .* use mode='proximal'"):
                optimizer.step()
        else:
            optimizer.step()
            assert regularizer.penalty() < 1e-6


def test_attach_refuses_another_models_optimizer():
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of the target's parameters"):
        WeightScopeRegularizer(network().named_parameters(), NETWORK_TARGET).attach(optimizer)


def test_loss_mode_refuses_a_closure_and_proximal_mode_takes_it():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    WeightScopeRegularizer(model.named_parameters(), NETWORK_TARGET).attach(optimizer)
    with pytest.raises(ValueError, match="misses gradients made by a closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match="misses gradients made by a closure"):
        optimizer.step(closure=lambda: 0.0)
    optimizer.step(None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    WeightScopeRegularizer(model.named_parameters(), NETWORK_TARGET, mode="proximal").attach(optimizer)
    assert optimizer.step(lambda: 1.5) == 1.5


def test_channels_last_convolutions_keep_their_memory_format():
    for mode in ("loss", "proximal"):
        convolution = nn.Conv2d(3, 4, 3).double()
        convolution.weight.data = layer((4, 3, 3, 3), 0.2).data
        twin = copy.deepcopy(convolution).to(memory_format=torch.channels_last)
        for model in (convolution, twin):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            WeightScopeRegularizer(model.named_parameters(), scope(weight=(0, 0.3)), mode=mode).attach(optimizer)
            optimizer.step()
        assert twin.weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(twin.weight, convolution.weight, rtol=1e-12, atol=1e-12)
        assert not torch.equal(convolution.weight, layer((4, 3, 3, 3), 0.2))


# ---- arguments


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf])
def test_strength_must_be_finite_and_not_negative(strength):
    with pytest.raises(ValueError, match="strength must be >= 0 and finite"):
        WeightScopeRegularizer([("a", layer((2, 2)))], scope(a=(0, 1)), strength=strength)


@pytest.mark.parametrize(("option", "value"), [("mode", "both"), ("reduction", "max")])
def test_unknown_options_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option} must be .*, got '{value}'"):
        WeightScopeRegularizer([("a", layer((2, 2)))], scope(a=(0, 1)), **{option: value})


def test_a_target_layer_that_the_model_lacks_is_named():
    with pytest.raises(ValueError, match=r"got \['b', 'c'\]"):
        WeightScopeRegularizer(
            [("a", layer((2, 2))), ("c", torch.ones(2, 2, dtype=torch.int64))], scope(a=(0, 1), b=(0, 1), c=(0, 1))
        )


def test_layers_outside_the_target_are_free():
    parameters = {"a": layer((4, 5)), "b": layer((4, 5))}
    WeightScopeRegularizer(parameters.items(), scope(b=(1, 2))).add_gradient()
    assert parameters["a"].grad is None
    assert parameters["b"].grad is not None
