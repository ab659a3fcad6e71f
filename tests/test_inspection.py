"""The numbers of `fedwsa inspect`, against SciPy and by hand, and its picture."""

import math
import re
from io import StringIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from rich.console import Console
from scipy import stats

from experiments.inspection import MAX_PANELS, draw_layers, layer_cells, layers_of
from experiments.table import rich_table
from fedwsa import models
from fedwsa.scope import measure


def one(weights):
    (layer,) = layers_of({"w": torch.as_tensor(weights)})
    return layer


@given(
    arrays(np.float32, array_shapes(min_dims=2, max_dims=4, max_side=6), elements=st.floats(-4, 4, width=16)).filter(
        lambda weights: weights.std() > 0.01
    )
)
def test_numbers_are_scipys(weights):
    layer, flat = one(weights), weights.astype(float).ravel()
    assert layer.shape == weights.shape
    assert layer.mean == pytest.approx(flat.mean(), abs=1e-12)
    assert layer.std == pytest.approx(flat.std(), rel=1e-9)
    assert layer.kurtosis == pytest.approx(stats.kurtosis(flat), rel=1e-9, abs=1e-9)
    expected = stats.kstest(flat, stats.norm(flat.mean(), flat.std()).cdf).statistic
    assert layer.distance == pytest.approx(expected, abs=1e-12)


def test_a_layer_of_two_values_by_hand():
    layer = one([[-1.0, 3.0], [3.0, -1.0]])  # one σ to both sides of 1
    assert (layer.mean, layer.std, layer.kurtosis) == (1.0, 2.0, -2.0)
    assert layer.distance == pytest.approx(0.5 - stats.norm.cdf(-1), abs=1e-12)


def test_uniform_weights():
    layer = one(torch.linspace(-0.1, 0.1, 100_001, dtype=torch.float64).reshape(1, -1))
    assert layer.std == pytest.approx(0.1 / 3**0.5, rel=1e-4)
    assert layer.kurtosis == pytest.approx(-1.2, abs=1e-3)
    turn = (-2 * math.log((math.pi / 6) ** 0.5)) ** 0.5  # where the two densities cross
    expected = stats.norm.cdf(turn) - (0.5 + turn / 12**0.5)
    assert layer.distance == pytest.approx(expected, abs=1e-4)
    assert round(expected, 3) == 0.057  # as documented


def test_gaussian_weights():
    generator = torch.Generator().manual_seed(0)
    found = [one(torch.randn(1, 400, generator=generator)).distance for _ in range(300)]
    assert np.mean(found) * 400**0.5 == pytest.approx(0.6, abs=0.05)  # as documented
    large = one(torch.randn(1000, 1000, generator=generator))
    assert abs(large.kurtosis) < 0.02
    assert large.distance < 0.002


def test_scopes_are_those_of_the_method():
    state = models.build("cnn", (1, 8, 8), 10, seed=0).state_dict()
    layers, scope = layers_of(state), measure(state)
    assert tuple(layer.name for layer in layers) == scope.names
    np.testing.assert_allclose([layer.mean for layer in layers], scope.means, atol=1e-9)
    np.testing.assert_allclose([layer.std**2 for layer in layers], scope.variances, rtol=1e-6)


@pytest.mark.parametrize("weights", [torch.full((7, 3), 0.1), torch.ones(1, 1), torch.tensor([[1.0, math.nan]])])
def test_layer_without_a_gaussian(weights):
    layer = one(weights)
    assert math.isnan(layer.kurtosis)
    assert math.isnan(layer.distance)
    assert layer_cells([layer], "mine").rows[0][-2:] == ("–", "–")
    assert b"no Gaussian" in draw_layers([layer], "mine", "svg")


def test_what_is_no_layer_is_left_out():
    state = {"bias": torch.ones(3), "w": torch.randn(2, 2), "n": torch.ones(2, 2, dtype=torch.int64)}
    assert [layer.name for layer in layers_of(state)] == ["w"]
    with pytest.raises(ValueError, match=r"no layers: .* nothing has a weight scope"):
        layers_of({"bias": torch.ones(3)})


def test_table():
    layers = layers_of(models.build("resnet20", (3, 32, 32), 10, seed=0).state_dict())
    console = Console(width=80, record=True, file=StringIO())
    console.print(rich_table(layer_cells(layers, "mine.safetensors")))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    row = next(line for line in text.splitlines() if line.startswith("conv.weight"))
    assert re.fullmatch(r"conv\.weight +16×3×3×3 +432 +−?\d\.\d\de[−+]\d\d +0\.1\d{3} +−1\.\d\d +0\.\d{4} *", row)
    assert all(layer.name in text for layer in layers)


def test_picture_has_a_panel_a_layer_and_is_repeatable():
    layers = layers_of(models.build("vgg8", (1, 8, 8), 10, seed=0, width=0.25).state_dict())
    picture = draw_layers(layers, "mine & yours", "svg")
    assert picture == draw_layers(layers, "mine & yours", "svg")
    text = picture.decode()
    assert text.startswith("<svg")
    assert all(layer.name in text for layer in layers)
    assert "mine &amp; yours" in text
    assert draw_layers(layers, "mine", "png").startswith(b"\x89PNG")


def test_picture_of_many_layers():
    layers = layers_of({f"layer-{number:03}": torch.randn(3, 3) for number in range(MAX_PANELS + 5)})
    text = draw_layers(layers, "mine", "svg").decode()
    assert "mine; the first 60 layers, 5 are left out" in text
    assert "layer-059" in text
    assert "layer-060" not in text
