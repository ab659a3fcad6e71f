"""Linear layers by oneDNN: the numbers of nn.Linear, and nn.Linear itself wherever they do not suit."""

import copy
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedwsa import models
from fedwsa.models import linear

needs_operator = pytest.mark.skipif(not linear._has_operator(), reason="this build of PyTorch has no such operator")


def pair(inputs: int, outputs: int, *, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    plain = nn.Linear(inputs, outputs, bias=bias)
    fast = copy.deepcopy(plain)
    fast.__class__ = linear.Linear
    return plain, fast


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@needs_operator
@given(
    rows=st.sampled_from([8, 32, 33, 50, 200]),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 300),
    bias=st.booleans(),
    first=st.booleans(),
)
def test_product_and_gradients_are_those_of_float64(rows, inputs, outputs, bias, first):
    _, fast = pair(inputs, outputs, bias=bias)
    exact = copy.deepcopy(fast).double()
    x = torch.randn(rows, inputs)
    ours, truth = x.clone().requires_grad_(not first), x.double().requires_grad_()
    upstream = torch.randn(rows, outputs)
    with patch("fedwsa.models.linear.LEAST_PRODUCTS", 0):
        found = fast(ours)
    assert type(found.grad_fn).__name__ == "_ProductBackward"
    found.backward(upstream)
    product = truth @ exact.weight.t() + (exact.bias if bias else 0)
    product.backward(upstream.double())
    size = max(rows, inputs, outputs) ** 0.5
    for mine, theirs in (
        (found, product),
        *zip((p.grad for p in fast.parameters()), (p.grad for p in exact.parameters()), strict=True),
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5 * size)
    if first:
        assert ours.grad is None
    else:
        torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-5, atol=1e-5 * size)


@needs_operator
def test_second_derivatives_are_those_of_the_plain_layer():
    results = []
    for layer in pair(200, 200):
        x = torch.randn(40, 200, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (slope,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        slope.square().sum().backward()
        results.append([x.grad, layer.weight.grad, layer.bias.grad])
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


@needs_operator
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_parameters_get_no_gradient(frozen):
    _, fast = pair(200, 200)
    for name in frozen:
        getattr(fast, name).requires_grad_(False)
    x = torch.randn(40, 200, requires_grad=True)
    fast(x).sum().backward()
    assert x.grad is not None
    assert {name for name, each in fast.named_parameters() if each.grad is None} == set(frozen)


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(26, 200),  # 1,040,000 products, of 1,048,576
        torch.ones(40, 2, 200),
        torch.ones(200),
        torch.ones(200, 40).t(),
    ],
    ids=["few rows", "three dimensions", "one dimension", "not contiguous"],
)
def test_what_does_not_suit_goes_the_usual_way(x):
    plain, fast = pair(200, 200)
    assert torch.equal(fast(x), plain(x))
    assert type(fast(x).grad_fn).__name__ != "_ProductBackward"


def test_other_types_go_the_usual_way():
    plain, fast = (layer.double() for layer in pair(200, 200))
    x = torch.randn(40, 200, dtype=torch.float64)
    assert torch.equal(fast(x), plain(x))
    plain, fast = pair(200, 200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(x.float()).dtype == torch.bfloat16
        assert torch.equal(fast(x.float()), plain(x.float()))


def test_only_large_plain_layers_are_replaced(monkeypatch):
    class Own(nn.Linear):
        pass

    def model():
        return nn.Sequential(nn.Linear(784, 200), nn.Linear(200, 10), Own(200, 200), nn.Conv2d(1, 8, 3))

    monkeypatch.setattr(linear, "_gains", lambda: True)
    placed = models.placed(model(), torch.device("cpu"))
    assert [type(each) for each in placed] == [linear.Linear, nn.Linear, Own, nn.Conv2d]
    assert list(placed.state_dict()) == list(model().state_dict())
    monkeypatch.setattr(linear, "_gains", lambda: False)
    assert type(next(iter(models.placed(model(), torch.device("cpu"))))) is nn.Linear
