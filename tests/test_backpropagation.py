"""An MLP's gradients by hand: the bits of autograd's, and autograd's own wherever something else may be meant."""

import copy
import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from federations import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from clients import training
from fedwsa import models
from fedwsa.config import Config
from fedwsa.messages import Alignment
from fedwsa.models import MLP, linear
from fedwsa.models.backpropagation import by_hand
from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.scope import is_layer, measure
from fedwsa.seeding import torch_generator

SHAPE, CLASSES = (1, 16, 16), 7
quick = settings(max_examples=60)


def mlp(hidden: tuple[int, ...], seed: int = 0) -> MLP:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLP(SHAPE, CLASSES, hidden)


def by_onednn(model: MLP) -> MLP:
    """As `placed` leaves it on a processor where that is faster."""
    for layer in model.layers:
        if layer.weight.numel() >= linear.LEAST_WEIGHTS:
            layer.__class__ = linear.Linear
    return model


def batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, *SHAPE, generator=generator), torch.randint(CLASSES, (size,), generator=generator)


def gradients(model: MLP, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The loss, and by id of the parameter what was handed over."""
    backpropagate, taken = by_hand(model), {}
    assert backpropagate is not None
    loss = backpropagate(lambda parameter, gradient: taken.update({id(parameter): gradient}), images, labels)
    return loss, taken


@quick
@given(
    # Of one unit and one sample autograd multiplies the other way round: up to rounding the same.
    hidden=st.lists(st.sampled_from([2, 3, 40, 200]), max_size=3).map(tuple),
    size=st.sampled_from([1, 2, 31, 32, 50]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    fast=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradients_are_autograds_to_the_last_bit(hidden, size, dtype, fast, seed):
    model = mlp(hidden, seed).to(dtype)
    if fast and linear._has_operator():
        by_onednn(model)
    images, labels = batch(size, seed)
    images = images.to(dtype)
    wanted = F.cross_entropy(model(images), labels)
    wanted.backward()
    loss, taken = gradients(model, images, labels)
    assert torch.equal(loss, wanted)
    assert not loss.requires_grad
    assert len(taken) == len(list(model.parameters()))
    for parameter in model.parameters():
        assert torch.equal(taken[id(parameter)], parameter.grad)
        assert taken[id(parameter)].stride() == parameter.grad.stride()


def test_gradients_are_the_slopes_of_the_loss():
    """By finite differences, in double precision, of a model of which every weight is tried."""
    model = mlp((5, 4)).double()
    images, labels = batch(6)
    images = images.double()
    _, taken = gradients(model, images, labels)
    for parameter in model.parameters():
        flat = parameter.detach().view(-1)
        slopes = torch.empty_like(flat)
        for i in range(len(flat)):
            value, around = flat[i].item(), []
            for step in (1e-5, -1e-5):
                flat[i] = value + step
                around.append(F.cross_entropy(model(images), labels).item())
            flat[i] = value
            slopes[i] = (around[0] - around[1]) / 2e-5
        torch.testing.assert_close(taken[id(parameter)].view(-1), slopes, rtol=1e-5, atol=1e-8)


def test_parameters_may_be_changed_as_soon_as_they_are_handed_over():
    images, labels = batch(50)
    model = mlp((40, 30))
    _, wanted = gradients(copy.deepcopy(model), images, labels)
    backpropagate, taken = by_hand(model), []

    def take(parameter: Tensor, gradient: Tensor) -> None:
        taken.append(gradient.clone())
        parameter.fill_(torch.nan)

    assert backpropagate is not None
    assert torch.isfinite(backpropagate(take, images, labels))
    for found, expected in zip(taken, wanted.values(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_what_is_not_finite_is_so_where_autograd_has_it(odd):
    model = mlp((40, 30))
    with torch.no_grad():
        model.layers[1].weight[3, 5] = odd
    images, labels = batch(8)
    F.cross_entropy(model(images), labels).backward()
    _, taken = gradients(model, images, labels)
    for parameter in model.parameters():
        torch.testing.assert_close(taken[id(parameter)], parameter.grad, rtol=0, atol=0, equal_nan=True)


class Doubled(MLP):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(2 * images)


def changed(change: Callable[[MLP], object]) -> MLP:
    model = mlp((40, 40, 40))
    change(model)
    return model


def nothing(*_: object) -> None:
    """A hook that changes nothing, and might have."""


def column_major(weights: Tensor) -> nn.Parameter:
    return nn.Parameter(weights.detach().t().contiguous().t())


OTHERS: dict[str, Callable[[MLP], object]] = {
    "hook": lambda model: model.layers[0].register_forward_hook(nothing),
    "pre-hook": lambda model: model.layers[0].register_forward_pre_hook(nothing),
    "backward hook": lambda model: model.layers[0].register_full_backward_hook(nothing),
    "backward pre-hook": lambda model: model.layers[0].register_full_backward_pre_hook(nothing),
    "hook on the model": lambda model: model.register_forward_hook(nothing),
    "pre-hook on the model": lambda model: model.register_forward_pre_hook(nothing),
    "backward hook on the model": lambda model: model.register_full_backward_hook(nothing),
    "hook on a gradient": lambda model: model.layers[1].weight.register_hook(nothing),
    "hook after a gradient": lambda model: model.layers[1].bias.register_post_accumulate_grad_hook(nothing),
    "frozen": lambda model: model.layers[0].bias.requires_grad_(False),
    "tied layers": lambda model: model.layers.__setitem__(2, model.layers[1]),
    "tied weights": lambda model: setattr(model.layers[2], "weight", model.layers[1].weight),
    "no bias": lambda model: model.layers.__setitem__(1, nn.Linear(40, 40, bias=False)),
    "parametrised": lambda model: nn.utils.parametrizations.weight_norm(model.layers[0]),
    "pruned": lambda model: prune.l1_unstructured(model.layers[0], "weight", 0.5),
    "column-major": lambda model: setattr(model.layers[1], "weight", column_major(model.layers[1].weight)),
    "another parameter": lambda model: model.register_parameter("scale", nn.Parameter(torch.ones(1))),
    "another module": lambda model: model.add_module("scale", nn.Linear(1, 1)),
    "another layer": lambda model: model.layers.append(nn.Identity()),
    "no layers": lambda model: setattr(model, "layers", nn.ModuleList()),
    "forward of its own": lambda model: setattr(model, "forward", model.forward),
    "forward of a layer's own": lambda model: setattr(model.layers[0], "forward", model.layers[0].forward),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_changed_models_are_left_to_autograd(change):
    assert by_hand(changed(change)) is None


@pytest.mark.parametrize(
    "model",
    [Doubled(SHAPE, CLASSES, (40,)), models.build("cnn", SHAPE, CLASSES, seed=0), nn.Sequential(mlp((40,)))],
    ids=["subclass", "other model", "inside another"],
)
def test_other_models_are_left_to_autograd(model):
    assert by_hand(model) is None


def test_what_holds_for_all_modules_is_left_to_autograd():
    model = mlp((40,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert by_hand(model) is None
    hook = nn.modules.module.register_module_forward_hook(nothing)
    try:
        assert by_hand(model) is None
    finally:
        hook.remove()
    assert by_hand(model) is not None


# ---- in training


def trained(
    config: Config, mode: str | None, granularity: str = "layer", named: slice = slice(None), share: float = 0.0
) -> tuple[training.Training, MLP]:
    """Of a model that begins anew, aligned in mode `mode`; named: the layers that the target names."""
    model = mlp((40, 30))
    layers = [(name, weights) for name, weights in model.named_parameters() if is_layer(name, weights)][named]
    target = measure({name: 1.5 * weights for name, weights in layers}, granularity=granularity)
    options = {"granularity": granularity, "layers": tuple(dict(layers)), "share": share}
    alignment = Alignment(target, 2.0, mode, "sum", **options) if mode else None
    return training.train(model, *batch(70), config, torch_generator(0, "client"), alignment), model


def both_ways(*arguments: Any, **options: Any) -> tuple[MLP, list[Tensor]]:
    """Trained by hand; as assertions, without autograd and to its bits. Also the gradients that were left."""
    with patch.object(training, "_gradient", side_effect=AssertionError("autograd")):
        result, model = trained(*arguments, **options)
    with patch.object(training, "by_hand", lambda model: None):
        same, other = trained(*arguments, **options)
    assert result == same
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, another)
    assert not torch.equal(model.layers[0].weight, mlp((40, 30)).layers[0].weight)
    return model, [each.grad for each in model.parameters()]


FIX = WeightScopeRegularizer.fix_strength
PLAIN = tiny(batch_size=20, local_epochs=2, learning_rate=0.1)
ALIGNED = [(None, "layer"), *((m, g) for m in ("loss", "proximal") for g in ("layer", "channel", "model"))]


@pytest.mark.parametrize(("mode", "granularity"), ALIGNED)
@pytest.mark.parametrize(
    "changes",
    [{}, {"momentum": 0.9}, {"weight_decay": 0.01}, {"clip_norm": 0.5}, {"optimizer": "adam"}],
    ids=["plain", "momentum", "decay", "clipped", "adam"],
)
def test_training_has_the_bits_of_autograds(mode, granularity, changes):
    _, left = both_ways(PLAIN.model_copy(update=changes), mode, granularity)
    at_once = not changes and granularity != "model"  # then nobody keeps a gradient
    assert all((gradient is None) == at_once for gradient in left)


@pytest.mark.parametrize("mode", ["loss", "proximal"])
@pytest.mark.parametrize("named", [slice(1), slice(1, 3), slice(2, 3)], ids=["first", "others", "last"])
def test_layers_that_the_target_does_not_name_make_plain_steps(mode, named):
    model, _ = both_ways(PLAIN, mode, named=named)
    _, without = trained(PLAIN, None)
    assert not torch.equal(model.layers[0].weight, without.layers[0].weight)


def test_a_relative_strength_is_fixed_once_by_the_first_gradient():
    with patch.object(WeightScopeRegularizer, "fix_strength", autospec=True, side_effect=FIX) as fixed:
        _, left = both_ways(PLAIN, "loss", share=0.5)
    assert fixed.call_count == 2  # once by hand, once by autograd
    assert all(gradient is not None for gradient in left)


# ---- one parameter after the other


@pytest.mark.parametrize("mode", ["loss", "proximal"])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_a_step_of_one_parameter_is_the_step_of_all(mode, granularity):
    steps = []
    for one_by_one in (True, False):
        model = mlp((40, 30))
        layers = {name: weights for name, weights in model.named_parameters() if is_layer(name, weights)}
        target = measure({name: 1.5 * weights for name, weights in layers.items()}, granularity=granularity)
        term = WeightScopeRegularizer(layers.items(), target, strength=2.0, mode=mode, granularity=granularity)
        gradients = [torch.randn(each.shape, generator=torch.Generator().manual_seed(1)) for each in model.parameters()]
        with torch.no_grad():
            if one_by_one:
                step = term.one_by_one(0.1)
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    step(parameter, gradient)
            else:
                term.descend(0.1)
                torch._foreach_add_(list(model.parameters()), gradients, alpha=-0.1)
                term.proximal_step(0.1)
        steps.append([each.detach() for each in model.parameters()])
    for one, other in zip(*steps, strict=True):
        assert torch.equal(one, other)


def test_there_is_no_step_of_one_parameter_where_the_unit_is_the_model():
    layers = {name: weights for name, weights in mlp((40,)).named_parameters() if is_layer(name, weights)}
    target = measure(layers, granularity="model")
    assert WeightScopeRegularizer(layers.items(), target, granularity="model").one_by_one(0.1) is None


@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf])
def test_a_step_of_one_parameter_refuses_a_bad_learning_rate(rate):
    layers = {"a": nn.Parameter(torch.randn(3, 4))}
    with pytest.raises(ValueError, match="learning rate must be"):
        WeightScopeRegularizer(layers.items(), measure(layers)).one_by_one(rate)
