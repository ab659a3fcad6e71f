"""The straight line between two models, and barriers: closed forms, cases by hand, symmetry."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, lists

from fedwsa.merging import Barrier, accuracy_drop, barrier, interpolate

seeds = integers(0, 2**32 - 1)
GRID = [i / 20 for i in range(21)]


def model(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(5, 3, generator=generator).to(dtype),
        "running_var": torch.rand(5, generator=generator).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_ends_are_the_models_in_memory_of_their_own(dtype):
    a, b = model(0, dtype), model(1, dtype)
    for t, end in ((0, a), (1, b)):
        found = interpolate(a, b, t)
        assert list(found) == list(end)
        for name, tensor in found.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, end[name])
            assert tensor.data_ptr() != end[name].data_ptr()


def test_a_broken_model_does_not_spoil_the_other_end():
    broken = {name: torch.full_like(tensor, torch.inf) for name, tensor in model(1).items()}
    assert torch.equal(interpolate(model(0), broken, 0)["w"], model(0)["w"])
    assert torch.equal(interpolate(broken, model(0), 1)["w"], model(0)["w"])


@settings(max_examples=50)
@given(seed=seeds, t=floats(0, 1))
def test_between_them_it_is_numpys_interpolation(seed, t):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 4, 3)).astype(np.float32)
    found = interpolate({"w": torch.from_numpy(a)}, {"w": torch.from_numpy(b)}, t)["w"].numpy()
    expected = [np.interp(t, [0, 1], pair) for pair in zip(a.ravel(), b.ravel(), strict=True)]
    np.testing.assert_allclose(found.ravel(), expected, rtol=0, atol=1e-6)
    swapped = interpolate({"w": torch.from_numpy(b)}, {"w": torch.from_numpy(a)}, 1 - t)["w"].numpy()
    np.testing.assert_allclose(found, swapped, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "a", "b", "t", "expected"),
    [
        (torch.int64, 3, 8, 0.3, 4),  # 4.5, halves to even; in integers 0.3 would be 0
        (torch.int64, 3, 8, 0.35, 5),
        (torch.uint8, 200, 255, 0.5, 228),  # 227.5; the sum does not fit
        (torch.int32, -3, -8, 0.25, -4),
        (torch.bool, True, False, 0.9, True),
        (torch.bool, True, False, 1, False),
    ],
)
def test_integers_are_rounded(dtype, a, b, t, expected):
    found = interpolate({"n": torch.tensor(a, dtype=dtype)}, {"n": torch.tensor(b, dtype=dtype)}, t)["n"]
    assert found.dtype == dtype
    assert found.item() == expected


@pytest.mark.parametrize("t", [-0.01, 1.01, float("nan"), float("inf")])
def test_no_model_lies_beyond_the_ends(t):
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        interpolate(model(0), model(1), t)


def test_unlike_models_have_no_line_between_them():
    with pytest.raises(ValueError, match=r"w .* instead of"):
        interpolate(model(0), {**model(1), "w": torch.ones(3, 3)}, 0.5)


def along(loss, a, b, points=GRID):
    """The loss of states interpolated between the vectors a and b."""
    ends = [{"x": torch.as_tensor(end, dtype=torch.float64)} for end in (a, b)]
    return [float(loss(interpolate(*ends, t)["x"])) for t in points]


@settings(max_examples=50)
@given(seed=seeds, curvature=floats(-3, 3))
def test_of_a_quadratic_it_is_an_eighth_of_the_curvature_between_the_ends(seed, curvature):
    """On the line, L − the chord is −½ t(1 − t) dᵀHd with d = θ_B − θ_A, whatever the minimum and the ends."""
    rng = np.random.default_rng(seed)
    a, b, centre = torch.from_numpy(rng.normal(size=(3, 4)))
    h = curvature * torch.eye(4, dtype=torch.float64)
    losses = along(lambda x: 0.5 * (x - centre) @ h @ (x - centre), a, b)
    found = barrier(GRID, losses)
    expected = max(0.0, -0.125 * float((b - a) @ h @ (b - a)))
    assert found.height == pytest.approx(expected, abs=1e-12)
    if expected > 1e-9:
        assert found.t == 0.5
    if curvature >= 0:  # convex: no rise; over the mean half of the difference between the ends is left
        assert barrier(GRID, losses, "mean").height == pytest.approx(0.5 * abs(losses[0] - losses[-1]), abs=1e-12)


def double_well(x):
    return ((x * x - 1) ** 2).sum()


def test_between_the_minima_of_a_double_well_it_is_the_height_of_the_hill():
    losses = along(double_well, [-1.0], [1.0])
    assert barrier(GRID, losses) == pytest.approx((1.0, 0.5))
    assert barrier(GRID, losses, "mean") == pytest.approx((1.0, 0.5))


def test_a_hill_below_the_chord_is_no_barrier_but_the_mean_sees_the_worse_end():
    losses = along(double_well, [-1.0], [2.0], [0, 1 / 3, 2 / 3, 1])  # x = −1, 0, 1, 2
    assert losses == pytest.approx([0, 1, 0, 9])
    assert barrier([0, 1 / 3, 2 / 3, 1], losses) == Barrier(0.0, 0)
    assert barrier([0, 1 / 3, 2 / 3, 1], losses, "mean") == pytest.approx((4.5, 1))


def test_by_hand_with_unequal_ends():
    assert barrier([0, 0.25, 0.5, 1], [1.0, 4.0, 4.0, 3.0]) == Barrier(2.5, 0.25)  # chord 1.5 and 2
    assert barrier([0, 0.25, 0.5, 1], [1.0, 4.0, 4.0, 3.0], "mean") == Barrier(2.0, 0.25)  # the first of two


def test_accuracy_drop_by_hand():
    assert accuracy_drop([0, 0.25, 1], [0.9, 0.5, 0.8]) == pytest.approx((0.375, 0.25))  # from 0.875
    assert accuracy_drop([0, 0.25, 1], [0.9, 0.5, 0.8], "mean") == pytest.approx((0.35, 0.25))  # from 0.85
    assert accuracy_drop([0, 0.5, 1], [0.8, 0.95, 0.8]) == Barrier(0.0, 0)  # better between them


@given(losses=lists(floats(0, 100), min_size=2, max_size=9), lift=floats(-50, 50))
@pytest.mark.parametrize("baseline", ["line", "mean"])
def test_it_is_symmetric_not_negative_and_of_no_origin(baseline, losses, lift):
    points = [i / (len(losses) - 1) for i in range(len(losses))]
    height = barrier(points, losses, baseline).height
    assert height >= 0
    assert height == pytest.approx(barrier(points, losses[::-1], baseline).height, abs=1e-9)
    assert height == pytest.approx(barrier(points, [loss + lift for loss in losses], baseline).height, abs=1e-9)


@pytest.mark.parametrize(
    ("points", "losses", "message"),
    [
        ([0, 0.5], [1, 1], r"points must rise from 0 to 1, both included, got \[0, 0.5\]"),
        ([0.1, 1], [1, 1], "points must rise"),
        ([0, 0.5, 0.5, 1], [1, 1, 1, 1], "points must rise"),
        ([0, float("nan"), 1], [1, 1, 1], "points must rise"),
        ([0], [1], "points must rise"),
        ([], [], "points must rise"),
        ([0, 1], [1, 2, 3], "one value a point is needed, got 3 for 2 points"),
        ([0, 0.5, 1], [1, float("nan"), float("inf")], r"must be finite, one is not at t = 0\.5, 1$"),
    ],
)
@pytest.mark.parametrize("measure", [barrier, accuracy_drop])
def test_what_is_no_path_is_refused(measure, points, losses, message):
    with pytest.raises(ValueError, match=message):
        measure(points, losses)


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ValueError, match=r"baseline must be .*, got 'max'"):
        barrier([0, 1], [1.0, 1.0], "max")
