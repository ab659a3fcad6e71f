"""BatchNorm's statistics estimated anew, against NumPy and against PyTorch's own way for averaged weights."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from fedwsa import models
from fedwsa.merging import interpolate, recalibrate


def small(seed=0, dropout=0.0):
    """Linear, BatchNorm, ReLU, dropout, Linear, BatchNorm, with affine parameters that are not 1 and 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(dropout), nn.Linear(5, 4), nn.BatchNorm1d(4)
        )
        for layer in (model[1], model[5]):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    return model


def batches(count, size=40, shape=(6,), seed=3):
    return list(torch.randn(count, size, *shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1)


def numbers(module):
    return [tensor.detach().double().numpy() for tensor in (module.weight, module.bias)]


def test_statistics_are_the_averages_of_the_batches_own():
    model, data = small(), batches(3)
    recalibrate(model, data)
    found = []
    for x in (batch.double().numpy() for batch in data):
        (w1, b1), (gamma, beta), (w2, b2) = map(numbers, (model[0], model[1], model[4]))
        first = x @ w1.T + b1
        seen = gamma * (first - first.mean(0)) / np.sqrt(first.var(0) + model[1].eps) + beta
        second = np.maximum(seen, 0) @ w2.T + b2
        found.append((first.mean(0), first.var(0, ddof=1), second.mean(0), second.var(0, ddof=1)))
    expected = [np.mean(each, 0) for each in zip(*found, strict=True)]
    layers = (model[1], model[5])
    actual = [tensor for layer in layers for tensor in (layer.running_mean, layer.running_var)]
    for tensor, values in zip(actual, expected, strict=True):
        np.testing.assert_allclose(tensor.numpy(), values, rtol=1e-5, atol=1e-6)


def test_it_is_what_pytorch_does_for_averaged_weights():
    ends = [models.build("resnet8", (1, 8, 8), 10, seed=seed, width=0.5) for seed in (0, 1)]
    ours, theirs = copy.deepcopy(ends[0]), copy.deepcopy(ends[0])
    middle = interpolate(ends[0].state_dict(), ends[1].state_dict(), 0.5)
    for model in (ours, theirs):
        model.load_state_dict(middle)
    data = batches(3, shape=(1, 8, 8)) + batches(1, 7, shape=(1, 8, 8))
    recalibrate(ours, data)
    update_bn(data, theirs)
    before, unlike = dict(middle), 0
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
        unlike += not torch.equal(tensor, before[name])
    assert unlike == 3 * 7  # mean, variance and counter of each BatchNorm layer, and nothing else


def test_after_one_batch_the_network_normalises_that_batch():
    model, (data,) = small(), batches(1, 400)
    recalibrate(model, [data])
    outputs = model.eval()(data).detach()
    torch.testing.assert_close(outputs.mean(0), model[5].bias.detach(), rtol=1e-2, atol=1e-2)
    spread = model[5].weight.detach().square() * 399 / 400
    torch.testing.assert_close(outputs.var(0, unbiased=False), spread, rtol=1e-2, atol=1e-3)


def test_the_momentum_and_what_the_statistics_were_play_no_part():
    one, other = small(), small()
    other[1].momentum, other[5].momentum = 0.9, None
    for layer in (other[1], other[5]):
        layer.running_mean.fill_(torch.nan)
        layer.running_var.fill_(77.0)
        layer.num_batches_tracked.fill_(9)
    recalibrate(one, batches(4))
    recalibrate(other, batches(4))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert (one[1].momentum, other[1].momentum, other[5].momentum) == (0.1, 0.9, None)


def test_dropout_is_off_and_no_random_number_is_drawn():
    still, dropping = small(), small(dropout=0.5).train()
    before = torch.get_rng_state()
    recalibrate(still, batches(2))
    recalibrate(dropping, batches(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(still[5].running_var, dropping[5].running_var)


def test_modes_are_afterwards_as_they_were_even_if_the_model_raises():
    model = small().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    recalibrate(model, batches(2))
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError):
        recalibrate(model, [torch.zeros(3, 99)])
    assert [module.training for module in model.modules()] == modes
    assert (model[1].momentum, model[5].momentum) == (0.1, 0.1)


def test_parameters_stay_and_get_no_gradient():
    model = small()
    before = [parameter.clone() for parameter in model.parameters()]
    recalibrate(model, batches(2))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def refuse():
    raise AssertionError("a batch was asked for")
    yield


@pytest.mark.parametrize(
    "model",
    [nn.Linear(6, 2), nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2, track_running_stats=False))],
    ids=["none", "no statistics"],
)
def test_without_statistics_nothing_is_done(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recalibrate(model, refuse())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="at least one batch, got none"):
        recalibrate(small(), [])
