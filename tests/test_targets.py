"""Targets that no training decides."""

import copy

import pytest
import torch
from torch import nn

from fedwsa.granularity import GRANULARITIES
from fedwsa.models.initialisation import SCHEMES, initial_std, initialise
from fedwsa.scope import measure
from fedwsa.targets import gaussian, init_scheme


class Wide(nn.Module):
    """One layer of each kind, with weights enough that a sample tells a standard deviation to a per cent."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(300, 200)
        self.convolution = nn.Conv2d(40, 60, 5)
        self.grouped = nn.Conv2d(60, 120, 7, groups=3)
        self.transposed = nn.ConvTranspose2d(50, 70, 5)
        self.attention = nn.MultiheadAttention(120, 4)
        self.norm = nn.BatchNorm2d(60)


def drawn(scheme: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Wide()
    if scheme != "default":
        initialise(model, scheme, seed=0)
    return model


@pytest.mark.parametrize("scheme", ["default", *SCHEMES])
def test_init_scheme_is_what_the_initialiser_draws(scheme):
    model = drawn(scheme)
    target, sample = init_scheme(model, scheme), measure(dict(model.named_parameters()))
    assert target.names == sample.names
    assert target.names[:2] == ("linear.weight", "convolution.weight")
    assert len(target.names) == 6
    assert target.means.tolist() == [0] * 6
    torch.testing.assert_close(sample.variances.sqrt(), target.variances.sqrt(), rtol=0.01, atol=0)


def test_embeddings_are_standard_normal():
    model = nn.Sequential(nn.Embedding(300, 200))
    assert init_scheme(model).variances.item() == 1
    assert init_scheme(model, "orthogonal").variances.item() == 1
    assert measure(dict(model.named_parameters())).variances.item() == pytest.approx(1, rel=0.05)


def test_no_weight_is_looked_at():
    model = drawn("default")
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.fill_(7)
    assert init_scheme(other) == init_scheme(model)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_granularity_of_init_scheme(granularity):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))  # variances 1/9 of 6 weights and 1/6 of 8
    target = init_scheme(model, granularity=granularity)
    assert target.names == measure(dict(model.named_parameters()), granularity=granularity).names
    expected = {
        "layer": [1 / 9, 1 / 6],
        "channel": [1 / 9] * 2 + [1 / 6] * 4,
        "model": [(6 / 9 + 8 / 6) / 14],
    }
    assert target.variances.tolist() == pytest.approx(expected[granularity], rel=1e-12)


def test_layers_whose_initialiser_is_not_known_are_named():
    model = nn.Sequential(nn.Linear(3, 2), nn.Bilinear(2, 3, 4))
    with pytest.raises(ValueError, match=r"no initialiser is known for 1.weight; known are"):
        init_scheme(model)
    with pytest.raises(ValueError, match="unknown init 'he': allowed are default, kaiming-normal"):
        initial_std(model[0], model[0].weight, "he")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gaussian_is_the_same_for_every_unit(granularity):
    parameters = dict(nn.Linear(3, 2).named_parameters())
    target = gaussian(parameters, 0.5, 0.1, granularity=granularity)
    assert target.names == measure(parameters, granularity=granularity).names
    assert set(target.means.tolist()) == {0.5}
    assert target.variances.sqrt().tolist() == pytest.approx([0.1] * len(target.names), rel=1e-15)


def test_gaussian_takes_the_callers_predicate():
    assert gaussian(dict(nn.Linear(3, 2).named_parameters()), 0, 1, lambda name, _: name == "bias").names == ("bias",)


@pytest.mark.parametrize(("mean", "std"), [(0, 0), (0, -1), (0, float("nan")), (float("inf"), 1), (0, float("inf"))])
def test_a_gaussian_needs_a_width(mean, std):
    with pytest.raises(ValueError, match="a finite mean and 0 < std < ∞"):
        gaussian({}, mean, std)
