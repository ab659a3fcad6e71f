"""NP-Merge against closed forms, autograd, finite differences and a plain reference."""

import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, lists
from sklearn.datasets import load_digits

from fedwsa.merging import align, average, np_merge, successive_np_merge
from fedwsa.merging.np_merge import logit_gradients

seeds = integers(0, 2**32 - 1)
SHAPES = {"0.weight": (6, 4), "0.bias": (6,), "1.weight": (3, 6), "1.bias": (3,)}


def model(generator, dtype=torch.float32):
    return {name: torch.rand(shape, generator=generator).mul_(2).sub_(1).to(dtype) for name, shape in SHAPES.items()}


def models(count, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [model(generator, dtype) for _ in range(count)]


def squared(state, step):
    return sum(tensor.square().sum() for tensor in state.values())


def assert_close(a, b, atol):
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)


def scalar(value, dtype=torch.float64):
    return {"w": torch.tensor([value], dtype=dtype)}


@settings(max_examples=30)
@given(seed=seeds, share=floats(1e-4, 1 - 1e-4))
def test_zero_steps_give_the_weighted_average_of_a_and_aligned_b(seed, share):
    a, b = models(2, seed)
    merged = np_merge(a, b, squared, share=share, steps=0)
    nearest = align(b, a)
    assert_close(merged.state, {name: share * a[name] + (1 - share) * nearest[name] for name in a}, 1e-6)
    assert merged.losses == []


@settings(max_examples=30)
@given(seed=seeds, weights=lists(floats(0.01, 100), min_size=1, max_size=6))
def test_zero_steps_give_the_weighted_average_of_several_models(seed, weights):
    states = models(len(weights), seed)
    merged = successive_np_merge(zip(states, weights, strict=True), squared, steps=0, align=False)
    assert_close(merged, average(states, weights), 1e-6)


def test_each_next_model_is_aligned_to_the_running_merge():
    a, b, c = models(3)
    pair = average([a, align(b, a)], [2.0, 1.0])
    merged = successive_np_merge([(a, 2.0), (b, 1.0), (c, 5.0)], squared, steps=0)
    assert_close(merged, average([pair, align(c, pair)], [3.0, 5.0]), 1e-6)


def test_the_papers_start_halves_what_came_before():
    states = models(4)
    merged = successive_np_merge([(state, 9.0) for state in states], squared, share=0.5, steps=0, align=False)
    assert_close(merged, average(states, [1 / 8, 1 / 8, 1 / 4, 1 / 2]), 1e-6)


@settings(max_examples=20)
@given(seed=seeds, share=floats(0.01, 0.99), learning_rate=floats(0.01, 100))
def test_coefficients_stay_in_zero_one_and_weights_between_the_models(seed, share, learning_rate):
    a, b = models(2, seed)
    merged = np_merge(a, b, squared, share=share, steps=10, learning_rate=learning_rate, align=False)
    assert merged.coefficients.keys() == a.keys()
    for name, s in merged.coefficients.items():
        assert s.shape == a[name].shape
        assert ((s >= 0) & (s <= 1)).all()
        lower, upper = torch.minimum(a[name], b[name]), torch.maximum(a[name], b[name])
        assert ((merged.state[name] >= lower - 1e-6) & (merged.state[name] <= upper + 1e-6)).all()
        torch.testing.assert_close(merged.state[name], s * a[name] + (1 - s) * b[name], rtol=0, atol=1e-6)


def quartic(w):
    return (w**4).sum() + (w[0] * w[1:]).sum()


@settings(max_examples=30)
@given(seed=seeds)
def test_the_gradient_is_autograds_and_that_of_finite_differences(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b, logits = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))

    def loss(logits):
        return quartic(torch.sigmoid(logits) * a + (1 - torch.sigmoid(logits)) * b)

    s = torch.sigmoid(logits)
    merged = (s * a + (1 - s) * b).requires_grad_()
    (to_weights,) = torch.autograd.grad(quartic(merged), merged)
    (ours,) = logit_gradients([to_weights], [a], [b], [s])

    leaf = logits.clone().requires_grad_()
    (through_sigmoid,) = torch.autograd.grad(loss(leaf), leaf)
    scale = 1 + through_sigmoid.abs().max().item()
    torch.testing.assert_close(ours, through_sigmoid, rtol=0, atol=1e-9 * scale)

    for index in range(logits.numel()):
        step = torch.zeros_like(logits)
        step.view(-1)[index] = 1e-5
        slope = (loss(logits + step) - loss(logits - step)) / 2e-5
        assert ours.view(-1)[index].item() == pytest.approx(slope.item(), abs=1e-7 * scale)


def test_learning_is_adam_on_the_logits():
    """Against autograd through the sigmoid and Adam written out, in float64."""
    a, b = models(2, dtype=torch.float64)
    share, rate, steps = 0.3, 0.2, 7

    def loss(state, step):
        return squared(state, step) + (1 + step) * state["0.weight"].sum() * state["1.bias"].sum()

    start = np.log(share / (1 - share))
    logits = {name: torch.full_like(tensor, start).requires_grad_() for name, tensor in a.items()}
    m, v = ({name: torch.zeros_like(tensor) for name, tensor in a.items()} for _ in range(2))
    expected_losses = []
    for step in range(steps + 1):
        s = {name: torch.sigmoid(logit) for name, logit in logits.items()}
        state = {name: s[name] * a[name] + (1 - s[name]) * b[name] for name in a}
        if step == steps:
            break
        value = loss(state, step)
        expected_losses.append(value.item())
        gradients = torch.autograd.grad(value, list(logits.values()))
        for (name, logit), g in zip(logits.items(), gradients, strict=True):
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g * g
            corrected = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.999 ** (step + 1))
            logit.data -= rate * corrected[0] / (corrected[1].sqrt() + 1e-8)

    merged = np_merge(a, b, loss, share=share, steps=steps, learning_rate=rate, align=False)
    assert merged.losses == pytest.approx(expected_losses, rel=1e-9)
    assert_close(merged.coefficients, {name: tensor.detach() for name, tensor in s.items()}, 1e-9)
    assert_close(merged.state, {name: tensor.detach() for name, tensor in state.items()}, 1e-9)


@pytest.mark.parametrize("best", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_best_coefficient_of_a_quadratic_is_learned(best, dtype):
    a, b = scalar(3.0, dtype), scalar(-1.0, dtype)
    target = best * 3.0 + (1 - best) * -1.0
    merged = np_merge(a, b, lambda state, step: (state["w"] - target).square().sum(), steps=400, align=False)
    assert merged.coefficients["w"].item() == pytest.approx(best, abs=1e-3)
    assert merged.state["w"].item() == pytest.approx(target, abs=4e-3)


def test_a_target_beyond_a_model_is_met_by_that_model():
    a, b = scalar(1.0), scalar(0.0)
    merged = np_merge(a, b, lambda state, step: (state["w"] - 2).square().sum(), steps=200, align=False)
    assert 0.99 < merged.coefficients["w"].item() <= 1


@settings(max_examples=15)
@given(seed=seeds)
def test_the_loss_never_rises_on_a_convex_quadratic_with_small_steps(seed):
    a, b = models(2, seed, torch.float64)
    target = model(torch.Generator().manual_seed(seed ^ 1), torch.float64)
    # beyond one of the two models, so that 100 steps of at most about 0.01 cannot overshoot
    target = {name: torch.where(target[name] > 0, 2 * a[name] - b[name], 2 * b[name] - a[name]) for name in a}
    merged = np_merge(
        a,
        b,
        lambda state, step: sum((state[name] - target[name]).square().sum() for name in state),
        steps=100,
        learning_rate=0.01,
        align=False,
    )
    assert all(after < before for before, after in pairwise(merged.losses))
    assert len(merged.losses) == 100


def broken_at(step_of_nan):
    return lambda state, step: squared(state, step) * (float("nan") if step == step_of_nan else 1.0)


def test_a_loss_that_is_not_finite_ends_at_the_last_finite_state():
    a, b = models(2)
    merged = np_merge(a, b, broken_at(3), steps=10)
    assert_close(merged.state, np_merge(a, b, squared, steps=2).state, 0)
    assert len(merged.losses) == 4
    assert np.isnan(merged.losses[3])


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_a_loss_that_is_never_finite_leaves_the_average(share):
    a, b = models(2)
    merged = np_merge(a, b, broken_at(0), share=share)
    assert_close(merged.state, np_merge(a, b, squared, share=share, steps=0).state, 0)


def test_a_gradient_that_is_not_finite_ends_the_learning():
    a, b = models(2)

    def loss(state, step):  # finite, but its slope is 0 · ∞ from step 2 on
        flat = (state["0.bias"] - state["0.bias"].detach()).abs().sqrt().sum()
        return squared(state, step) + (flat if step >= 2 else 0)

    merged = np_merge(a, b, loss, steps=10)
    assert_close(merged.state, np_merge(a, b, squared, steps=2).state, 0)
    assert len(merged.losses) == 3


def with_buffers(state, mean, count, flag):
    buffers = {"mean": torch.tensor([mean]), "count": torch.tensor(count), "flag": torch.tensor(flag)}
    return {**state, **buffers}


def test_only_trainable_tensors_are_learned_and_the_rest_is_averaged_by_share():
    a, b = models(2)
    a, b = with_buffers(a, 1.0, 10, True), with_buffers(b, 5.0, 21, False)
    seen = []

    def loss(state, step):
        seen.append({name: state[name].clone() for name in ("mean", "count")})
        state["mean"].fill_(99.0)  # as BatchNorm does in training mode
        state["count"].add_(1)
        return state["0.weight"].square().sum() + state["1.weight"].square().sum()

    names = {"0.weight", "1.weight", "0.bias"}
    merged = np_merge(a, b, loss, share=0.75, steps=3, align=False, trainable=names)
    assert merged.coefficients.keys() == names
    assert list(merged.state) == list(a)
    assert merged.state["mean"].item() == 2.0
    assert (merged.state["count"].item(), merged.state["count"].dtype) == (13, torch.int64)  # 12.75
    assert merged.state["flag"].item() is True
    assert all(state["mean"].item() == 2.0 and state["count"].item() == 13 for state in seen)
    expected = average([a, b], [0.75, 0.25])
    assert torch.equal(merged.state["1.bias"], expected["1.bias"])
    torch.testing.assert_close(merged.state["0.bias"], expected["0.bias"])  # trainable, but the loss ignores it
    assert not torch.allclose(merged.state["0.weight"], expected["0.weight"], atol=0.01)


def test_all_floating_tensors_are_trainable_by_default():
    a, b = (with_buffers(state, 1.0, 1, True) for state in models(2))
    merged = np_merge(a, b, lambda state, step: state["mean"].sum(), steps=1, align=False)
    assert merged.coefficients.keys() == {*SHAPES, "mean"}


def test_nothing_trainable_gives_the_average():
    a, b = models(2)
    merged = np_merge(a, b, squared, share=0.3, align=False, trainable=[])
    assert_close(merged.state, average([a, b], [0.3, 0.7]), 0)
    assert (merged.coefficients, merged.losses) == ({}, [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_learns_in_float32(dtype):
    a, b = scalar(3.0, dtype), scalar(-1.0, dtype)
    seen = []

    def loss(state, step):
        seen.append(state["w"].dtype)
        return (state["w"].float() - 2).square().sum()

    merged = np_merge(a, b, loss, steps=200, align=False)
    assert set(seen) == {dtype}
    assert merged.coefficients["w"].dtype == torch.float32
    assert merged.state["w"].dtype == dtype
    assert merged.state["w"].item() == pytest.approx(2, abs=0.03)


def test_learning_works_under_no_grad():
    a, b = models(2)
    with torch.no_grad():
        merged = np_merge(a, b, squared).state
    assert_close(merged, np_merge(a, b, squared).state, 0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"share": 0.0}, "share must"),
        ({"share": 1.0}, "share must"),
        ({"share": float("nan")}, "share must"),
        ({"steps": -1}, "steps must"),
        ({"learning_rate": 0.0}, "learning_rate must"),
        ({"learning_rate": float("nan")}, "learning_rate must"),
        ({"learning_rate": float("inf")}, "learning_rate must"),
        ({"trainable": ["0.weight", "9.weight"]}, r"\['9\.weight'\]"),
    ],
)
def test_options_out_of_range_are_refused(options, reason):
    a, b = models(2)
    with pytest.raises(ValueError, match=reason):
        np_merge(a, b, squared, **options)


def test_an_integer_tensor_is_not_trainable():
    a, b = (with_buffers(state, 1.0, 1, True) for state in models(2))
    with pytest.raises(ValueError, match=r"\['count'\]"):
        np_merge(a, b, squared, align=False, trainable=["count"])


@pytest.mark.parametrize("side", [0, 1])
def test_weights_that_are_not_finite_are_refused(side):
    pair = models(2)
    pair[side]["0.bias"][2] = float("nan")
    with pytest.raises(ValueError, match=r"finite.*\['0\.bias'\]"):
        np_merge(*pair, squared)


def test_a_loss_that_ignores_the_models_is_refused():
    with pytest.raises(ValueError, match="does not depend on the merged tensors"):
        np_merge(*models(2), lambda state, step: torch.tensor(1.0))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_of_successive_merges_must_be_positive(weight):
    a, b = models(2)
    with pytest.raises(ValueError, match="weights must be > 0"):
        successive_np_merge([(a, 1.0), (b, weight)], squared)


def test_no_models_are_refused_and_one_comes_back_copied():
    with pytest.raises(ValueError, match="at least one model"):
        successive_np_merge([], squared)
    (a,) = models(1)
    merged = successive_np_merge([(a, 3.0)], squared)
    assert_close(merged, a, 0)
    assert merged["0.bias"].data_ptr() != a["0.bias"].data_ptr()


def test_a_model_is_dropped_before_the_next_is_asked_for():
    given_out = []

    def pairs():
        for seed in range(4):
            (state,) = models(1, seed)
            given_out.extend(weakref.ref(tensor) for tensor in state.values())
            yield state, 1.0
            del state
            assert all(reference() is None for reference in given_out)

    successive_np_merge(pairs(), squared, steps=2)
    assert len(given_out) == 4 * len(SHAPES)


def test_it_beats_the_average_on_digits_it_never_saw():
    """Two networks from one start, each trained on five of the ten digits; 100 samples to learn from, 500 to judge."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = torch.tensor(digits.data[order] / 16, dtype=torch.float32), torch.tensor(digits.target[order])
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (64, 64), "0.bias": (64,), "1.weight": (10, 64), "1.bias": (10,)}
    start = {name: (torch.rand(shape, generator=generator) - 0.5) / 4 for name, shape in shapes.items()}

    def loss(state, samples):
        hidden = F.linear(x[samples], state["0.weight"], state["0.bias"]).relu()
        return F.cross_entropy(F.linear(hidden, state["1.weight"], state["1.bias"]), y[samples])

    def trained(samples):
        state = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        for batch in samples.repeat(5).split(32):
            gradients = torch.autograd.grad(loss(state, batch), list(state.values()))
            state = {
                name: (tensor - 0.2 * g).detach().requires_grad_()
                for (name, tensor), g in zip(state.items(), gradients, strict=True)
            }
        return {name: tensor.detach() for name, tensor in state.items()}

    held_out, test, rest = torch.arange(100), torch.arange(100, 600), torch.arange(600, len(y))
    a, b = trained(rest[y[rest] < 5]), trained(rest[y[rest] >= 5])
    merged = np_merge(a, b, lambda state, step: loss(state, held_out)).state
    assert loss(merged, test) < 0.8 * loss(average([a, b]), test)
