"""An MLP's gradients by hand: the bits of autograd's, and autograd's own wherever something else may be meant."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from federations import alignment_towards, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clients import training
from fedwsa import models
from fedwsa.messages import Alignment
from fedwsa.models import MLP, linear
from fedwsa.models.backpropagation import by_hand
from fedwsa.scope import is_layer, measure
from fedwsa.seeding import torch_generator

SHAPE, CLASSES = (1, 16, 16), 7
quick = settings(max_examples=60, deadline=None)


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


def hooked(kind: str) -> MLP:
    model = mlp((40,))
    getattr(model.layers[0], f"register_{kind}")(lambda *_: None)
    return model


def frozen() -> MLP:
    model = mlp((40,))
    model.layers[0].bias.requires_grad_(False)
    return model


def replaced() -> MLP:
    model = mlp((40,))
    model.layers[0] = nn.utils.parametrizations.weight_norm(model.layers[0])
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: Doubled(SHAPE, CLASSES, (40,)),
        lambda: hooked("forward_hook"),
        lambda: hooked("forward_pre_hook"),
        frozen,
        replaced,
        lambda: models.build("cnn", SHAPE, CLASSES, seed=0),
    ],
    ids=["subclass", "hook", "pre-hook", "frozen", "other layer", "other model"],
)
def test_other_models_are_left_to_autograd(make: Callable[[], nn.Module]):
    assert by_hand(make()) is None


@pytest.mark.parametrize("mode", [None, "loss", "proximal"])
@pytest.mark.parametrize("granularity", ["layer", "channel", "model"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": 0.9},
        {"weight_decay": 0.01},
        {"clip_norm": 0.5},
        {"optimizer": "adam"},
    ],
    ids=["plain", "momentum", "decay", "clipped", "adam"],
)
def test_training_has_the_bits_of_autograds(mode, granularity, changes, monkeypatch):
    if mode is None and granularity != "layer":
        pytest.skip("without alignment there are no units")
    config = tiny(batch_size=20, local_epochs=2, learning_rate=0.1, **changes)
    images, labels = batch(70)
    trained = []
    for way in (by_hand, lambda model: None):
        monkeypatch.setattr(training, "by_hand", way)
        model = mlp((40, 30))
        layers = {name: weights for name, weights in model.named_parameters() if is_layer(name, weights)}
        target = measure({name: 1.5 * weights for name, weights in layers.items()}, granularity=granularity)
        options = {"granularity": granularity, "layers": tuple(layers)}
        alignment = Alignment(target, 2.0, mode, "sum", **options) if mode else None
        result = training.train(model, images, labels, config, torch_generator(0, "client"), alignment)
        trained.append((result, [weights.detach() for weights in model.parameters()]))
    (result, weights), (same, others) = trained
    assert result == same
    for one, other in zip(weights, others, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(weights[0], mlp((40, 30)).layers[0].weight)


def test_a_relative_strength_is_fixed_by_the_first_gradient(monkeypatch):
    images, labels = batch(70)
    strengths = []
    for way in (by_hand, lambda model: None):
        monkeypatch.setattr(training, "by_hand", way)
        model = mlp((40, 30))
        alignment = alignment_towards(1.5, model.state_dict(), share=0.5)
        config = tiny(batch_size=20, local_epochs=1)
        result = training.train(model, images, labels, config, torch_generator(0, "client"), alignment)
        strengths.append((result, model.layers[0].weight.detach()))
    assert strengths[0][0] == strengths[1][0]
    assert strengths[0][0].strength not in (0.0, 1.0)
    assert torch.equal(strengths[0][1], strengths[1][1])
