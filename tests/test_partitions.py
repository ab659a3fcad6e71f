import time
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from partitions import PARTITIONERS, dirichlet, iid, label_counts
from partitions.dirichlet import draw_proportions, share_out

SEEDS = st.integers(0, 2**32 - 1)
CONCENTRATIONS = st.floats(1e-4, 1e4)
# What each partitioner may be given, for labels and a number of clients; a new one adds a line and inherits the tests.
OPTIONS = {
    "iid": lambda labels, k: st.just({}),
    "dirichlet": lambda labels, k: st.fixed_dictionaries({"alpha": CONCENTRATIONS, "balanced": st.booleans()}),
    "dirichlet_client": lambda labels, k: st.fixed_dictionaries({"alpha": CONCENTRATIONS}),
    "shards": lambda labels, k: st.fixed_dictionaries({"shards_per_client": st.integers(1, len(labels) // k)}),
    "label_skew": lambda labels, k: st.fixed_dictionaries(
        {"classes_per_client": st.integers(-(-len(np.unique(labels)) // k), len(np.unique(labels)))}
    ),
    "quantity_skew": lambda labels, k: st.fixed_dictionaries(
        {"beta": CONCENTRATIONS, "size_sigma": st.just(0.0) | st.floats(0.01, 1e3)}
    ),
    "natural": lambda labels, k: st.fixed_dictionaries({"groups": group_columns(len(labels), k)}),
}


@st.composite
def label_arrays(draw, min_samples=1):
    size, classes, seed = draw(st.integers(min_samples, 300)), draw(st.integers(1, 12)), draw(SEEDS)
    return np.random.default_rng(seed).integers(-3, classes, size)


@st.composite
def group_columns(draw, size, least):
    """So many group numbers, with `least` different ones at least."""
    rng = np.random.default_rng(draw(SEEDS))
    return rng.permutation(np.concatenate([np.arange(least) - 2, rng.integers(-5, 20, size - least)]))


@st.composite
def cases(draw, name):
    """Arguments of a partitioner: labels, number of clients, options."""
    labels = draw(label_arrays())
    if name == "label_skew":  # which needs as many samples of a class as it has holders
        labels = np.concatenate([labels, np.repeat(np.unique(labels), 12)])
    num_clients = draw(st.integers(1, min(12, len(labels))))
    return labels, num_clients, draw(OPTIONS[name](labels, num_clients))


def assert_each_sample_exactly_once(parts, num_samples):
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)  # sorted, no repeats
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(num_samples))


# ---- every partitioner


@pytest.mark.parametrize("name", PARTITIONERS)
@given(data=st.data(), seed=SEEDS)
def test_every_sample_lands_exactly_once(name, data, seed):
    labels, num_clients, options = data.draw(cases(name))
    parts = PARTITIONERS[name](labels, num_clients, **options, rng=np.random.default_rng(seed))
    assert len(parts) == num_clients
    assert_each_sample_exactly_once(parts, len(labels))


@pytest.mark.parametrize("name", PARTITIONERS)
@given(data=st.data(), seed=SEEDS)
def test_equal_generators_give_equal_parts(name, data, seed):
    labels, num_clients, options = data.draw(cases(name))
    one, two = (PARTITIONERS[name](labels, num_clients, **options, rng=np.random.default_rng(seed)) for _ in range(2))
    for first, second in zip(one, two, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("iid", {}),
        ("dirichlet", {"alpha": 1e15}),
        ("dirichlet", {"alpha": 1.0, "balanced": True}),
        ("dirichlet_client", {"alpha": 1.0}),
        ("shards", {"shards_per_client": 2}),
        ("label_skew", {"classes_per_client": 1}),
        ("quantity_skew", {"beta": 1e15}),
        ("quantity_skew", {"size_sigma": 1e-9}),
        ("natural", {"groups": np.arange(4)}),
    ],
)
def test_any_two_of_four_alike_samples_can_meet(name, options):
    rng = np.random.default_rng(0)
    draws = [PARTITIONERS[name](np.zeros(4, int), 2, **options, rng=rng)[0] for _ in range(200)]
    assert {tuple(draw) for draw in draws if len(draw) == 2} == set(combinations(range(4), 2))


@pytest.mark.parametrize(("name", "options"), [("iid", {}), ("dirichlet", {"alpha": 0.1})])
def test_ten_thousand_clients_take_less_than_a_second(name, options):
    labels = np.random.default_rng(0).integers(0, 10, 50_000)
    start = time.perf_counter()
    parts = PARTITIONERS[name](labels, 10_000, **options, rng=np.random.default_rng(1))
    assert time.perf_counter() - start < 1.0
    assert_each_sample_exactly_once(parts, 50_000)


@pytest.mark.parametrize("name", PARTITIONERS)
@pytest.mark.parametrize(
    ("labels", "num_clients", "message"),
    [
        ([], 1, "labels must be"),
        ([[0, 1]], 1, "labels must be"),
        ([0.0, 1.0], 1, "labels must be"),
        ([True, False], 1, "labels must be"),
        ([0, 1], 0, "num_clients must be an integer >= 1, got 0"),
        ([0, 1], 1.5, "num_clients must be an integer >= 1, got 1.5"),
        ([0, 1], float("nan"), "num_clients must be"),
    ],
)
def test_bad_labels_and_client_numbers_are_refused(name, labels, num_clients, message):
    needed = {"dirichlet": {"alpha": 1.0}, "dirichlet_client": {"alpha": 1.0}, "natural": {"groups": [0, 1]}}
    options = needed.get(name, {})
    with pytest.raises(ValueError, match=message):
        PARTITIONERS[name](labels, num_clients, **options, rng=np.random.default_rng(0))


# ---- iid


@given(labels=label_arrays(min_samples=12), num_clients=st.integers(1, 12), seed=SEEDS)
def test_iid_sizes_differ_by_one_at_most(labels, num_clients, seed):
    sizes = [len(part) for part in iid(labels, num_clients, rng=np.random.default_rng(seed))]
    share, over = divmod(len(labels), num_clients)
    assert sorted(sizes) == [share] * (num_clients - over) + [share + 1] * over


@pytest.mark.parametrize(
    ("name", "options"),
    [("iid", {}), ("dirichlet", {"alpha": 1.0, "balanced": True}), ("dirichlet_client", {"alpha": 1.0})],
)
def test_equal_sizes_for_more_clients_than_samples_are_refused(name, options):
    with pytest.raises(ValueError, match="num_clients must be <= the number of samples, 3, got 4"):
        PARTITIONERS[name]([0, 1, 2], 4, **options, rng=np.random.default_rng(0))


# ---- dirichlet


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("num_clients", [2, 10])
def test_proportions_have_the_moments_of_the_dirichlet(num_clients, alpha):
    """E p = 1/K, Var p = (K−1)/(K²(Kα+1)), Cov(p_i, p_j) = −1/(K²(Kα+1)); each within five standard errors."""
    draws, k = 40_000, num_clients
    p = draw_proportions(draws, k, alpha, np.random.default_rng(7))
    variance = (k - 1) / (k**2 * (k * alpha + 1))
    excess_kurtosis = float(stats.beta.stats(alpha, (k - 1) * alpha, moments="k"))
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(p.mean(axis=0), 1 / k, rtol=0, atol=5 * np.sqrt(variance / draws))
    error = variance * np.sqrt((excess_kurtosis + 2) / draws)
    np.testing.assert_allclose(p.var(axis=0), variance, rtol=0, atol=5 * error)
    covariance = np.cov(p, rowvar=False)[~np.eye(k, dtype=bool)]
    np.testing.assert_allclose(covariance, -variance / (k - 1), rtol=0, atol=5 * error)


@pytest.mark.parametrize("alpha", [0.05, 0.7, 3.0, 200.0])
def test_one_clients_proportion_is_beta_distributed(alpha):
    p = draw_proportions(20_000, 5, alpha, np.random.default_rng(3))
    for client in range(5):
        assert stats.kstest(p[:, client], stats.beta(alpha, 4 * alpha).cdf).pvalue > 1e-3


def test_every_class_is_a_draw_of_its_own_over_the_clients():
    """The closed forms again, through counts; a floor moves a share by less than 1/500."""
    classes, per_class, k, alpha = 1000, 500, 4, 0.5
    labels = np.tile(np.arange(classes), per_class)
    parts = dirichlet(labels, k, alpha, rng=np.random.default_rng(5))
    shares = label_counts(labels, parts, classes) / per_class
    variance = (k - 1) / (k**2 * (k * alpha + 1))
    error = variance * np.sqrt((float(stats.beta.stats(alpha, (k - 1) * alpha, moments="k")) + 2) / classes)
    atol = 5 * np.sqrt(variance / classes) + 1 / per_class
    np.testing.assert_allclose(shares.mean(axis=1), 1 / k, rtol=0, atol=atol)
    atol = 5 * error + 2 * np.sqrt(variance) / per_class + 1 / per_class**2
    np.testing.assert_allclose(shares.var(axis=1), variance, rtol=0, atol=atol)


def test_counts_by_hand():
    proportions = np.array([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25], [0.0, 1.0, 0.0], [0.5, 0.25, 0.25]])
    counts = share_out(np.array([4, 7, 3, 1]), proportions)
    np.testing.assert_array_equal(counts, [[1, 2, 1], [1, 4, 2], [0, 3, 0], [0, 0, 1]])


@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=5),
    k=st.integers(1, 50),
    alpha=st.floats(1e-3, 1e3),
    seed=SEEDS,
)
def test_counts_sum_to_the_class_and_stay_within_one_of_the_proportions(sizes, k, alpha, seed):
    proportions = draw_proportions(len(sizes), k, alpha, np.random.default_rng(seed))
    counts = share_out(np.array(sizes), proportions)
    np.testing.assert_array_equal(counts.sum(axis=1), sizes)
    assert (np.abs(counts - proportions * np.array(sizes)[:, None]) < 1 + 1e-6).all()


@pytest.mark.parametrize("alpha", [1e12, 1e300, np.finfo(float).max])
def test_huge_alpha_splits_every_class_evenly(alpha):
    labels = np.repeat(np.arange(10), 100)
    counts = label_counts(labels, dirichlet(labels, 8, alpha, rng=np.random.default_rng(0)), 10)
    assert (np.abs(counts - 100 / 8) < 1).all()


@pytest.mark.parametrize("alpha", [1e-8, 1e-300, 1e-310, 5e-324])
def test_tiny_alpha_gives_every_class_to_one_client_and_any_client(alpha):
    labels = np.repeat(np.arange(500), 4)
    parts = dirichlet(labels, 8, alpha, rng=np.random.default_rng(0))
    assert_each_sample_exactly_once(parts, 2000)
    counts = label_counts(labels, parts, 500)
    np.testing.assert_array_equal(counts.max(axis=0), 4)
    assert stats.chisquare(counts.sum(axis=1) / 4).pvalue > 1e-3  # each client is as likely as any other


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 100.0])
def test_effective_number_of_clients_of_a_class(alpha):
    """1 / E Σ p² = (Kα+1)/(α+1): from one client, as α → 0, to all K = 10, as α → ∞."""
    squares = (draw_proportions(20_000, 10, alpha, np.random.default_rng(2)) ** 2).sum(axis=1)
    exact = (alpha + 1) / (10 * alpha + 1)
    assert squares.mean() == pytest.approx(exact, rel=0, abs=5 * squares.std() / np.sqrt(20_000))


@given(seed=SEEDS)
def test_min_size_is_honoured(seed):
    labels = np.tile(np.arange(10), 20)
    parts = dirichlet(labels, 5, 0.2, min_size=10, rng=np.random.default_rng(seed))
    assert min(map(len, parts)) >= 10
    assert_each_sample_exactly_once(parts, 200)


def test_min_size_draws_again_only_when_it_must():
    labels = np.tile(np.arange(10), 20)
    smallest = []
    for seed in range(20):
        free, bound = (dirichlet(labels, 5, 0.2, min_size=size, rng=np.random.default_rng(seed)) for size in (0, 10))
        smallest.append(min(map(len, free)))
        same = all(np.array_equal(one, two) for one, two in zip(free, bound, strict=True))
        assert same == (smallest[-1] >= 10)
    assert min(smallest) < 10 <= max(smallest)


def test_min_size_that_no_split_has_is_refused_at_once():
    class NoDraws:
        def __getattr__(self, name):
            raise AssertionError("drew")

    with pytest.raises(ValueError, match=r"3 clients with min_size=4 need 12 samples, got 11; use a smaller min_size"):
        dirichlet(np.zeros(11, int), 3, 1.0, min_size=4, rng=NoDraws())


@pytest.mark.parametrize(("alpha", "smaller"), [(0.1, ""), (5, "a smaller min_size, ")])
def test_min_size_gives_up_after_max_tries_and_says_how_close_it_came(alpha, smaller):
    """Where the best draw leaves a client empty, no smaller min_size helps."""
    labels, tries = np.zeros(100, int), 5
    rng = np.random.default_rng(0)
    best = max(min(map(int, share_out(np.array([100]), draw_proportions(1, 10, alpha, rng))[0])) for _ in range(tries))
    assert (best > 0) == bool(smaller)
    message = (
        rf"no draw of {tries} gave every client min_size=10 samples, the best left the smallest with {best}; "
        f"use {smaller}a larger alpha than {alpha} or fewer clients than 10"
    )
    with pytest.raises(ValueError, match=message):
        dirichlet(labels, 10, alpha, min_size=10, rng=np.random.default_rng(0), max_tries=tries)


def test_more_clients_than_samples_leaves_some_empty():
    parts = dirichlet([0, 1], 5, 1.0, rng=np.random.default_rng(0))
    assert len(parts) == 5
    assert_each_sample_exactly_once(parts, 2)


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet_client"])
@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_finite_and_positive(name, alpha):
    with pytest.raises(ValueError, match="alpha must be finite and > 0"):
        PARTITIONERS[name]([0, 1], 2, alpha, rng=np.random.default_rng(0))


@pytest.mark.parametrize("name", ["dirichlet", "quantity_skew"])
@pytest.mark.parametrize("option", [{"min_size": -1}, {"min_size": 0.5}, {"max_tries": 0}])
def test_counts_of_tries_and_samples_are_checked(name, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be an integer"):
        PARTITIONERS[name]([0, 1], 2, 1.0, **option, rng=np.random.default_rng(0))


# ---- label_counts


def test_label_counts_by_hand():
    parts = [np.array([0, 2, 4]), np.array([], np.int64), np.array([1, 3])]
    counts = label_counts([0, 1, 1, 1, 0], parts, 3)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, [[2, 1, 0], [0, 0, 0], [0, 2, 0]])
    assert label_counts([0, 1], [], 3).shape == (0, 3)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_label_counts_refuses_labels_outside_the_classes(labels):
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
        label_counts(labels, [np.array([0, 1])], 3)
