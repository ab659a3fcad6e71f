import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from fedwsa.scope import (
    VARIANCE_FUSIONS,
    Scopes,
    WeightScope,
    degenerate,
    fuse,
    gradient_coefficients,
    is_layer,
    kl_divergence,
    measure,
    proximal_coefficients,
    scope_distance,
    scope_spread,
)

quick = settings(max_examples=30)
means = st.floats(-10, 10)
stds = st.floats(0.01, 10)
seeds = st.integers(0, 2**32 - 1)
shapes = st.lists(st.integers(1, 6), min_size=2, max_size=4).filter(lambda shape: math.prod(shape) > 1)


def scope(*layers: tuple[float, float], names: str = "abcdefgh") -> WeightScope:
    """A scope from (mean, standard deviation) pairs."""
    mean, std = torch.tensor(layers, dtype=torch.float64).reshape(-1, 2).T
    return WeightScope(tuple(names[: len(layers)]), mean.clone(), std.square())


def normal(shape: list[int], mean: float, std: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(shape, dtype=torch.float64, generator=generator)


def divergence(weights: Tensor, mean: float, std: float) -> Tensor:
    """The divergence of one layer, written so that autograd can differentiate it."""
    variance = (weights - weights.mean()).square().mean()
    return math.log(std) - variance.log() / 2 + (variance + (weights.mean() - mean) ** 2) / (2 * std**2) - 0.5


# ---- which tensors are layers, and what a scope may be


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(2, 3), True),
        (torch.zeros(2, 3, 1, 1, dtype=torch.bfloat16), True),
        (torch.zeros(6), False),
        (torch.tensor(1.0), False),
        (torch.zeros(2, 3, dtype=torch.int64), False),
        (torch.zeros(2, 3, dtype=torch.complex64), False),
    ],
)
def test_layers_are_floating_with_two_or_more_dimensions(tensor, expected):
    assert is_layer("any", tensor) is expected


def test_scopes_are_equal_by_value():
    assert scope((0, 1), (2, 3)) == scope((0, 1), (2, 3))
    assert scope((0, 1), (2, 3)) != scope((0, 1), (2, 4))
    assert scope((0, 1), (2, 3)) != scope((1, 1), (2, 3))
    assert scope((0, 1), names="a") != scope((0, 1), names="b")
    assert scope((0, 1)) != "scope"


@pytest.mark.parametrize(
    ("means", "variances", "names", "message"),
    [
        (torch.zeros(2), torch.zeros(2).double(), ("a", "b"), "means must be a float64"),
        (torch.zeros(2).double(), torch.zeros(3).double(), ("a", "b"), "variances must be .* length 2"),
        (torch.zeros(2, 1).double(), torch.zeros(2).double(), ("a", "b"), "means must be"),
        (torch.zeros(2).double(), torch.zeros(2).double(), ("a", "a"), "repeated: .'a'"),
        (torch.zeros(2).double(), torch.tensor([1, -1]).double(), ("a", "b"), "negative in layers .'b'"),
    ],
)
def test_a_malformed_scope_is_refused(means, variances, names, message):
    with pytest.raises(ValueError, match=message):
        WeightScope(names, means, variances)


# ---- measuring


def test_measure_divides_by_n_and_keeps_the_order():
    tensors = {"z": torch.tensor([[1.0, 2.0], [3.0, 6.0]]), "bias": torch.ones(3), "a": torch.tensor([[-1.0, 1.0]])}
    measured = measure(tensors)
    assert measured.names == ("z", "a")
    assert measured.means.tolist() == [3, 0]
    assert measured.variances.tolist() == [3.5, 1]


@quick
@given(shape=shapes, mean=st.sampled_from([0.0, 0.3, -1e4, 1e7]), std=st.sampled_from([1e-3, 1.0, 50.0]), seed=seeds)
def test_measure_agrees_with_exact_arithmetic(shape, mean, std, seed):
    weights = normal(shape, mean, std, seed).float()
    exact = [Fraction(value) for value in weights.flatten().tolist()]
    exact_mean = sum(exact) / len(exact)
    exact_variance = sum((value - exact_mean) ** 2 for value in exact) / len(exact)
    measured = measure({"layer": weights})
    assert measured.means.item() == pytest.approx(float(exact_mean), rel=1e-14, abs=1e-14 * std)
    assert measured.variances.item() == pytest.approx(float(exact_variance), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -12345.678, 1e-6])
def test_a_constant_layer_has_variance_zero_exactly(dtype, value):
    weights = torch.full((37, 91), value, dtype=dtype)
    measured = measure({"layer": weights})
    assert measured.variances.item() == 0
    assert measured.means.item() == weights[0, 0].item()


def test_measure_takes_strided_gradient_carrying_and_empty_tensors():
    weights = torch.arange(4.0).reshape(2, 2)
    measured = measure({"a": weights.T, "b": weights.clone().requires_grad_(), "c": torch.empty(0, 4)})
    assert measured.names == ("a", "b", "c")
    assert measured.means.tolist() == [1.5, 1.5, 0]
    assert measured.variances.tolist() == [1.25, 1.25, 0]


def test_measure_takes_tensors_of_a_subclass():
    """Some of them, as distributed ones, have no NumPy array."""

    class Own(torch.Tensor):
        pass

    weights = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    measured = measure({"a": weights.as_subclass(Own), "b": torch.empty(0, 4).as_subclass(Own)})
    assert (measured.means.tolist(), measured.variances.tolist()) == ([3, 0], [3.5, 0])


def test_measure_uses_the_callers_predicate():
    tensors = {"weight": torch.eye(2), "bias": torch.tensor([1.0, 3.0])}
    assert measure(tensors, lambda name, tensor: name == "bias") == WeightScope(
        ("bias",), torch.tensor([2.0]).double(), torch.tensor([1.0]).double()
    )
    assert measure({"bias": torch.ones(3)}).names == ()


# ---- divergence


def test_doubling_std_costs_log2_minus_three_eighths():
    assert kl_divergence(scope((0.7, 3)), scope((0.7, 6))).item() == pytest.approx(math.log(2) - 3 / 8, rel=1e-14)


def test_halving_std_costs_three_halves_minus_log2():
    assert kl_divergence(scope((0.7, 3)), scope((0.7, 1.5))).item() == pytest.approx(1.5 - math.log(2), rel=1e-14)


def test_moving_the_mean_by_one_target_std_costs_a_half():
    assert kl_divergence(scope((1, 2)), scope((3, 2))).item() == pytest.approx(0.5, rel=1e-14)


@quick
@given(st.lists(st.tuples(means, stds, means, stds), min_size=1, max_size=5))
def test_divergence_agrees_with_torch_distributions(layers):
    ours = kl_divergence(scope(*(layer[:2] for layer in layers)), scope(*(layer[2:] for layer in layers)))
    mean, std, target_mean, target_std = torch.tensor(layers, dtype=torch.float64).T
    torch.testing.assert_close(
        ours, torch_kl(Normal(mean, std), Normal(target_mean, target_std)), rtol=1e-9, atol=1e-13
    )


@given(means, stds, st.floats(-1e-9, 1e-9))
def test_divergence_is_zero_at_equality_and_never_negative(mean, std, nudge):
    assert kl_divergence(scope((mean, std)), scope((mean, std))).item() == 0
    assert kl_divergence(scope((mean, std)), scope((mean, std * (1 + nudge)))).item() >= 0


def test_degenerate_layers_diverge_by_zero():
    ours = scope((0, 0), (0, 1), (math.nan, 1), (0, math.inf), (0, 1), (0, 1), (0, 1e-160), (0, 1))
    target = scope((0, 1), (0, 0), (0, 1), (0, 1), (math.inf, 1), (0, math.nan), (0, 1), (1, 1))
    assert degenerate(ours, target).tolist() == [True] * 7 + [False]
    assert kl_divergence(ours, target).tolist() == [0] * 7 + [0.5]


def test_a_single_weight_is_degenerate():
    assert degenerate(measure({"a": torch.tensor([[3.0]])}), scope((0, 1))).tolist() == [True]


def test_unlike_layers_are_named():
    with pytest.raises(ValueError, match=r"only one of them has \['a', 'c'\]"):
        kl_divergence(scope((0, 1), (0, 1), names="ab"), scope((0, 1), (0, 1), names="bc"))
    with pytest.raises(ValueError, match="order, 'a' stands where 'b' does"):
        kl_divergence(scope((0, 1), (0, 1), names="ab"), scope((0, 1), (0, 1), names="ba"))


# ---- fusion


@pytest.mark.parametrize(
    ("variance", "expected"),
    [
        ("mean", 0.25 * 4 + 0.75 * 16),
        ("mixture", 0.25 * (4 + 9) + 0.75 * (16 + 1)),
        ("independent", 0.0625 * 4 + 0.5625 * 16),
    ],
)
def test_fusion_of_two_by_hand(variance, expected):
    # p = (1/4, 3/4), μ̄ = 1/4·2 + 3/4·6 = 5
    fused = fuse([scope((2, 2)), scope((6, 4))], [10, 30], variance)
    assert fused.means.item() == pytest.approx(5, rel=1e-15)
    assert fused.variances.item() == pytest.approx(expected, rel=1e-15)


@quick
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5), seed=seeds)
def test_mixture_is_the_scope_of_all_weights_pooled(sizes, seed):
    clients = [normal([size, 1], 0.5 * k, 1 + k, seed + k) for k, size in enumerate(sizes)]
    fused = fuse([measure({"a": weights}) for weights in clients], sizes, "mixture")
    pooled = measure({"a": torch.cat(clients)})
    torch.testing.assert_close(fused.means, pooled.means, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused.variances, pooled.variances, rtol=1e-12, atol=1e-12)


def test_independent_is_the_variance_of_the_average_of_independent_gaussians():
    one, two = normal([400, 500], 1.0, 2.0, 1), normal([400, 500], -1.0, 0.5, 2)
    fused = fuse([measure({"a": one}), measure({"a": two})], [3, 1], "independent")
    average = measure({"a": 0.75 * one + 0.25 * two})
    assert fused.means.item() == pytest.approx(average.means.item(), rel=1e-12)
    # cov(one, two) ≠ 0 in a sample of 200,000: four standard errors of 2·(3/4)(1/4)·cov
    assert fused.variances.item() == pytest.approx(average.variances.item(), abs=4 * 0.375 * 2 * 0.5 / 200_000**0.5)


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), mean=means, std=stds)
def test_fusing_equal_scopes_changes_nothing_but_independent(weights, mean, std):
    same = [scope((mean, std))] * len(weights)
    concentration = sum(weight**2 for weight in weights) / sum(weights) ** 2
    for variance, factor in (("mean", 1), ("mixture", 1), ("independent", concentration)):
        fused = fuse(same, weights, variance)
        assert fused.means.item() == pytest.approx(mean, rel=1e-13)
        assert fused.variances.item() == pytest.approx(factor * std**2, rel=1e-12)


def test_merged_fusion_is_the_merged_models_scope():
    merged = scope((9, 9))
    assert fuse([scope((0, 1)), scope((2, 1))], [1, 1], "merged", merged) == merged
    assert fuse([scope((0, 1)), scope((2, 1))], [1, 1], "mean", merged) == scope((1, 1))


def test_huge_weights_do_not_overflow():
    assert fuse([scope((0, 1)), scope((2, 1))], [1e308, 1e308]) == scope((1, 1))


def test_a_diverged_client_makes_the_layer_degenerate_and_no_other():
    fused = fuse([scope((0, 1), (0, 1)), scope((math.nan, 1), (2, 1))], [1, 1])
    assert degenerate(fused, fused).tolist() == [True, False]
    assert fused.means[1].item() == 1


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("function", [fuse, lambda scopes, weights: scope_distance(scopes, weights, scopes[0])])
def test_weights_must_be_positive_and_finite(function, weight):
    with pytest.raises(ValueError, match="positive and finite"):
        function([scope((0, 1)), scope((0, 1))], [1.0, weight])


def test_fusion_refuses_what_it_cannot_fuse():
    one = scope((0, 1))
    with pytest.raises(ValueError, match="got 0 scopes"):
        fuse([], [])
    with pytest.raises(ValueError, match="got 1 scopes, 2 weights"):
        fuse([one], [1, 2])
    with pytest.raises(ValueError, match="one of mean, mixture, independent, merged, got 'median'"):
        fuse([one], [1], "median")
    with pytest.raises(ValueError, match="pass it as merged="):
        fuse([one], [1], "merged")
    with pytest.raises(ValueError, match="'b'"):
        fuse([one], [1], "merged", scope((0, 1), names="b"))


@pytest.mark.parametrize("variance", VARIANCE_FUSIONS)
def test_every_fusion_refuses_unlike_layers(variance):
    with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
        fuse([scope((0, 1)), scope((0, 1), names="b")], [1, 1], variance, scope((0, 1)))


def test_scope_distance_by_hand():
    # layer a: client 2 (share 3/4) is one σ_t away: 1/2; layer b: client 1 (1/4) has half the std: ln 2 − 3/8
    clients = [scope((0, 2), (0, 1)), scope((2, 2), (0, 2))]
    distance = scope_distance(clients, [1, 3], scope((0, 2), (0, 2)))
    assert distance.tolist() == pytest.approx([3 / 8, (math.log(2) - 3 / 8) / 4], rel=1e-14)


def test_scope_spread_by_hand():
    # layer a: means 0 and 2, shares 1/4 and 3/4: √(1/4·3/4)·2; stds 1 and 3 likewise; layer b: equal scopes
    mean_spread, std_spread = scope_spread([scope((0, 1), (0.1, 0.3)), scope((2, 3), (0.1, 0.3))], [1, 3])
    assert mean_spread.tolist() == [pytest.approx(math.sqrt(3) / 2, rel=1e-14), 0.0]
    assert std_spread.tolist() == [pytest.approx(math.sqrt(3) / 2, rel=1e-14), 0.0]


@given(k=st.integers(1, 8), seed=seeds)
def test_scope_spread_is_the_weighted_standard_deviation(k, seed):
    rng = np.random.default_rng(seed)
    means, stds, weights = rng.normal(size=(k, 3)), rng.uniform(0, 2, (k, 3)), rng.uniform(1, 9, k)
    clients = [scope(*zip(m, s, strict=True)) for m, s in zip(means, stds, strict=True)]
    for found, values in zip(scope_spread(clients, weights.tolist()), (means, stds), strict=True):
        centre = np.average(values, axis=0, weights=weights)
        expected = np.sqrt(np.average((values - centre) ** 2, axis=0, weights=weights))
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_some_of_the_layers():
    every = Scopes.of([scope((0, 1), (2, 3)), scope((4, 5), (6, 7))])
    some = every.only(("b",))
    assert (some.names, some.means.tolist(), some.variances.tolist()) == (("b",), [[2], [6]], [[9], [49]])
    assert every.only(("b", "a")).means.tolist() == [[2, 0], [6, 4]]
    with pytest.raises(KeyError, match="c"):
        every.only(("c",))
    alone = scope((0, 1), (2, 3))
    assert alone.only(("b", "a")) == WeightScope(("b", "a"), alone.means.flip(0), alone.variances.flip(0))
    assert alone.only(()).means.shape == (0,)
    with pytest.raises(KeyError):
        alone.only(("c",))


# ---- the affine maps


@quick
@given(shape=shapes, mean=means, std=stds, target_mean=means, target_std=stds, seed=seeds)
def test_gradient_coefficients_agree_with_autograd(shape, mean, std, target_mean, target_std, seed):
    weights = normal(shape, mean, std, seed).requires_grad_()
    (expected,) = torch.autograd.grad(divergence(weights, target_mean, target_std), weights)
    a, b = gradient_coefficients(measure({"a": weights}), scope((target_mean, target_std)), [weights.numel()])
    scale = expected.abs().max().item()
    # a + b w cancels where |μ| is large beside σ.
    lost = 1 + abs(mean) * abs(b.item()) / scale
    torch.testing.assert_close(a + b * weights.detach(), expected, rtol=0, atol=1e-11 * lost * scale)


@quick
@given(shape=shapes, mean=means, std=stds, target_mean=means, target_std=stds, ratio=st.floats(1e-6, 1e8), seed=seeds)
def test_proximal_map_is_stationary(shape, mean, std, target_mean, target_std, ratio, seed):
    weights = normal(shape, mean, std, seed)
    c = ratio * weights.numel() * target_std**2
    a, b = proximal_coefficients(measure({"a": weights}), scope((target_mean, target_std)), [weights.numel()], c)
    moved = (a + b * weights).requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(moved, target_mean, target_std), moved)
    size = weights.abs().max() + moved.detach().abs().max() + abs(target_mean) + target_std
    # The gradient is multiplied by c, and so is its rounding; b w rounds at b |μ|.
    rounding = 1e-14 * (1 + ratio) * (size + b.item() * abs(mean)).item() * (1 + target_std / moved.std().item())
    assert (moved - weights + c * gradient).abs().max().item() <= 100 * rounding


@quick
@given(shape=shapes, mean=means, target_mean=means, std=stds, target_std=stds, ratio=st.floats(0.01, 100), seed=seeds)
def test_no_perturbation_beats_the_proximal_map(shape, mean, target_mean, std, target_std, ratio, seed):
    weights = normal(shape, mean, std, seed)
    c = ratio * weights.numel() * target_std**2

    def objective(candidate: Tensor) -> float:
        return ((candidate - weights).square().sum() / 2 + c * divergence(candidate, target_mean, target_std)).item()

    a, b = proximal_coefficients(measure({"a": weights}), scope((target_mean, target_std)), [weights.numel()], c)
    moved = a + b * weights
    best = objective(moved)
    for k, step in enumerate((1e-3, 1e-2, 0.1, 1.0, 10.0)):
        assert objective(moved + step * normal(shape, 0, target_std, seed + k)) >= best - 1e-12 * (abs(best) + c)
    for factor in (-1.0, 0.9, 1.1):
        assert objective(moved.mean() + factor * (moved - moved.mean())) >= best - 1e-12 * (abs(best) + c)


@quick
@given(st.tuples(means, stds), st.tuples(means, stds), st.floats(1e-8, 1e300), st.integers(2, 10**9))
def test_proximal_coefficients_agree_with_the_textbook_root_in_700_digits(layer, goal, c, size):
    ours, target = scope(layer), scope(goal)
    with localcontext(prec=700):
        mean, variance = Decimal(ours.means.item()), Decimal(ours.variances.item())
        target_mean, target_variance = Decimal(target.means.item()), Decimal(target.variances.item())
        ratio = Decimal(c) / (size * target_variance)
        quadratic, linear = size + Decimal(c) / target_variance, size * variance.sqrt()
        std = (linear + (linear**2 + 4 * quadratic * Decimal(c)).sqrt()) / (2 * quadratic)
        scale = std / variance.sqrt()
        shift = (mean + ratio * target_mean) / (1 + ratio) - mean * scale
    a, b = proximal_coefficients(ours, target, [size], c)
    assert b.item() == pytest.approx(float(scale), rel=1e-14)
    assert a.item() == pytest.approx(float(shift), abs=1e-14 * (abs(layer[0]) * (1 + b.item()) + abs(goal[0])))


@pytest.mark.parametrize("ratio", [1e8, 1e30, 1e200])
def test_a_huge_step_lands_on_the_target(ratio):
    ours, target, sizes = scope((3, 0.5), (-0.1, 2)), scope((-2, 0.25), (0.1, 3)), [10, 10]
    for layer, size in enumerate(sizes):
        c = ratio * size * target.variances[layer].item()
        a, b = proximal_coefficients(ours, target, sizes, c)
        assert (a + b * ours.means)[layer].item() == pytest.approx(target.means[layer].item(), rel=1e-6)
        assert (b * ours.variances.sqrt())[layer].item() == pytest.approx(
            target.variances[layer].sqrt().item(), rel=1e-6
        )


def test_a_step_of_zero_is_the_identity():
    a, b = proximal_coefficients(scope((0.3, 0.1), (-7, 3)), scope((1, 2), (3, 4)), [6, 8], 0)
    assert a.tolist() == [0, 0]
    assert b.tolist() == [1, 1]


def test_degenerate_layers_keep_their_weights():
    ours, target = scope((0, 0), (0, 1), (math.nan, 1), (0, 1)), scope((0, 1), (0, 0), (0, 1), (1, 1))
    a, b = gradient_coefficients(ours, target, [2, 2, 2, 2])
    assert a.tolist() == [0, 0, 0, -0.5]
    assert b.tolist() == [0, 0, 0, 0]
    a, b = proximal_coefficients(ours, target, [2, 2, 2, 2], 2)
    assert a.tolist() == [0, 0, 0, 0.5]
    assert b.tolist() == pytest.approx([1, 1, 1, 1])


def test_affine_maps_refuse_bad_arguments():
    with pytest.raises(ValueError, match="got 2 for 1 layers"):
        gradient_coefficients(scope((0, 1)), scope((0, 1)), [2, 3])
    for c in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="c must be >= 0 and finite"):
            proximal_coefficients(scope((0, 1)), scope((0, 1)), [2], c)
