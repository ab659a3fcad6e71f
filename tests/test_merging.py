"""Weighted averages, and what every way of merging has in common."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, lists

from fedwsa.merging import average, interpolate, merge_in_stages, np_merge, successive_np_merge

MERGERS = {
    "average": lambda states, loss: average(states),
    "interpolate": lambda states, loss: interpolate(states[0], states[1], 0.5),
    "merge_in_stages": lambda states, loss: merge_in_stages(states, lambda a, b, share: interpolate(a, b, 1 - share)),
    "np_merge": lambda states, loss: np_merge(states[0], states[1], loss).state,
    "successive_np_merge": lambda states, loss: successive_np_merge([(state, 1.0) for state in states], loss),
}


def model(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "0.weight": torch.randn(5, 3, generator=generator).to(dtype),
        "0.bias": torch.randn(5, generator=generator).to(dtype),
        "2.weight": torch.randn(2, 5, generator=generator).to(dtype),
    }


@pytest.mark.parametrize("merge", MERGERS.values(), ids=MERGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merging_equal_models_changes_nothing(merge, dtype):
    states = [model(0, dtype) for _ in range(2)]
    merged = merge(states, lambda state, step: sum(tensor.double().square().sum() for tensor in state.values()))
    assert list(merged) == list(states[0])
    for name, tensor in states[0].items():
        assert merged[name].dtype == dtype
        assert torch.equal(merged[name], tensor)


@pytest.mark.parametrize("merge", MERGERS.values(), ids=MERGERS)
def test_the_models_stay_untouched_and_share_no_memory_with_the_result(merge):
    states, before = [model(0), model(1)], [model(0), model(1)]
    merged = merge(states, lambda state, step: state["0.weight"].square().sum())
    for tensor in merged.values():
        assert not tensor.requires_grad
        tensor.fill_(7.0)
    for state, original in zip(states, before, strict=True):
        assert all(torch.equal(state[name], original[name]) for name in original)


@pytest.mark.parametrize("merge", MERGERS.values(), ids=MERGERS)
def test_unlike_models_are_refused_and_the_odd_ones_named(merge):
    def loss(state, step):
        raise AssertionError("not reached")

    renamed = {name.replace("2.weight", "3.weight"): tensor for name, tensor in model(1).items()}
    with pytest.raises(ValueError, match=r"\['2\.weight', '3\.weight'\]"):
        merge([model(0), renamed], loss)
    with pytest.raises(ValueError, match=r"0\.bias \(6,\) float32 instead of \(5,\) float32"):
        merge([model(0), {**model(1), "0.bias": torch.zeros(6)}], loss)
    with pytest.raises(ValueError, match=r"0\.bias \(5,\) float64 instead of \(5,\) float32"):
        merge([model(0), {**model(1), "0.bias": torch.zeros(5, dtype=torch.float64)}], loss)


@settings(max_examples=50)
@given(weights=lists(floats(0.01, 100), min_size=1, max_size=6), seed=integers(0, 2**32 - 1))
def test_average_is_the_weighted_mean(weights, seed):
    values = np.random.default_rng(seed).normal(size=(len(weights), 4, 3))
    merged = average([{"w": torch.from_numpy(value)} for value in values], weights)["w"]
    np.testing.assert_allclose(merged.numpy(), np.average(values, axis=0, weights=weights), rtol=0, atol=1e-14)


def test_average_without_weights_weighs_all_alike():
    states = [{"w": torch.tensor([value])} for value in (1.0, 2.0, 6.0)]
    assert average(states)["w"].item() == 3.0


def test_average_ignores_a_model_of_weight_zero():
    merged = average([model(0), model(1)], [0.0, 3.0])
    assert all(torch.equal(merged[name], tensor) for name, tensor in model(1).items())


def test_average_sums_in_float64():
    states = [{"w": torch.tensor([value])} for value in (1e8, 1.0, -1e8)]  # float32 has no room for 1e8 + 1
    assert average(states)["w"].item() == pytest.approx(1 / 3, rel=1e-7)


@pytest.mark.parametrize(
    ("dtype", "values", "weights", "expected"),
    [
        (torch.int64, [3, 4, 4], None, 4),  # integer arithmetic would give 3
        (torch.int64, [1, 100], [3, 1], 26),  # 25.75
        (torch.int64, [-3, -4], [1, 3], -4),  # -3.75, which truncation would make -3
        (torch.uint8, [200, 250], None, 225),  # the sum does not fit
        (torch.int32, [2, 3], None, 2),  # halves to even
        (torch.bool, [True, False, False], None, True),  # carried from the first
    ],
)
def test_integers_are_averaged_in_float64_and_rounded(dtype, values, weights, expected):
    merged = average([{"n": torch.tensor(value, dtype=dtype)} for value in values], weights)["n"]
    assert merged.dtype == dtype
    assert merged.item() == expected


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0], [0.0, 0.0]])
def test_average_refuses_weights_that_are_none(weights):
    with pytest.raises(ValueError, match="weights must be"):
        average([model(0), model(1)], weights)


def test_average_refuses_no_models():
    with pytest.raises(ValueError, match="at least one model"):
        average([])


def test_slow_imports_are_left_out():
    code = (
        "import sys, torch, fedwsa.merging as m; assert 'scipy' not in sys.modules;"
        "a, b = ({'weight': torch.tensor([[x]])} for x in (1.0, 2.0));"
        "m.np_merge(a, b, lambda state, step: state['weight'].sum());"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
