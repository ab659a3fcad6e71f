"""What is particular to each partitioner; what all have in common, iid and dirichlet are in test_partitions.py."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_partitions import SEEDS, assert_each_sample_exactly_once, label_arrays

from partitions import (
    PARTITIONERS,
    dirichlet,
    dirichlet_client,
    heterogeneity,
    label_counts,
    label_skew,
    natural,
    quantity_skew,
    shards,
)
from partitions._filling import fill
from partitions.dirichlet import log_proportions
from partitions.label_skew import deal_classes

EQUAL_SIZES = {
    "dirichlet": lambda labels, k, alpha, rng: dirichlet(labels, k, alpha, balanced=True, rng=rng),
    "dirichlet_client": lambda labels, k, alpha, rng: dirichlet_client(labels, k, alpha, rng=rng),
}


def counts_of(labels, parts):
    return label_counts(labels, parts, int(np.max(labels)) + 1)


# ---- equal sizes: dirichlet with balanced, dirichlet_client


@pytest.mark.parametrize("name", EQUAL_SIZES)
@given(labels=label_arrays(min_samples=12), k=st.integers(1, 12), alpha=st.floats(1e-300, 1e300), seed=SEEDS)
def test_sizes_differ_by_one_at_most(name, labels, k, alpha, seed):
    sizes = [len(part) for part in EQUAL_SIZES[name](labels, k, alpha, np.random.default_rng(seed))]
    share, over = divmod(len(labels), k)
    assert sorted(sizes) == [share] * (k - over) + [share + 1] * over


@pytest.mark.parametrize("name", EQUAL_SIZES)
@pytest.mark.parametrize("alpha", [1e-6, 1e-300, 5e-324])
def test_tiny_alpha_gives_every_client_one_class(name, alpha):
    """Ten clients fill a class exactly, so that nobody has to take another one too."""
    labels = np.tile(np.arange(10), 1000)
    found = heterogeneity(counts_of(labels, EQUAL_SIZES[name](labels, 100, alpha, np.random.default_rng(0))))
    assert found.effective_classes == pytest.approx(1, abs=1e-12)
    assert found.total_variation == pytest.approx(0.9, abs=1e-12)


@pytest.mark.parametrize("name", EQUAL_SIZES)
def test_huge_alpha_gives_everybody_the_pooled_labels(name):
    """Then every client draws evenly from all: counts are hypergeometric; five standard errors of the wider Poisson."""
    labels = np.repeat([0, 1, 2], [6000, 3000, 1000])
    for alpha in (1e9, 1e300):
        counts = counts_of(labels, EQUAL_SIZES[name](labels, 10, alpha, np.random.default_rng(0)))
        expected = np.array([600, 300, 100])
        assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("name", EQUAL_SIZES)
def test_unlikeness_falls_as_alpha_grows(name):
    labels = np.tile(np.arange(10), 1000)
    found = [
        heterogeneity(counts_of(labels, EQUAL_SIZES[name](labels, 50, alpha, np.random.default_rng(0)))).total_variation
        for alpha in (0.01, 0.1, 1.0, 10.0, 1000.0)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.8
    assert found[-1] < 0.15


def test_an_own_distribution_has_the_moments_of_the_dirichlet_around_the_prior():
    """E q = p, Var q = p (1 − p)/(α + 1), Cov(q_i, q_j) = −p_i p_j/(α + 1); within five standard errors."""
    prior, alpha, draws = np.array([0.6, 0.3, 0.1]), 0.5, 40_000
    q = np.exp(log_proportions(draws, 3, alpha * prior, np.random.default_rng(3)))
    np.testing.assert_allclose(q.sum(axis=1), 1, atol=1e-12)
    variance = prior * (1 - prior) / (alpha + 1)
    np.testing.assert_allclose(q.mean(axis=0), prior, rtol=0, atol=5 * np.sqrt(variance.max() / draws))
    excess_kurtosis = stats.beta.stats(alpha * prior, alpha * (1 - prior), moments="k")
    error = variance * np.sqrt((excess_kurtosis + 2) / draws)
    assert (np.abs(q.var(axis=0) - variance) < 5 * error).all()
    assert np.cov(q, rowvar=False)[0, 1] == pytest.approx(-0.6 * 0.3 / 1.5, abs=5 * error.max())


@pytest.mark.parametrize("alpha", [0.3, 1.0, 5.0])
def test_what_the_clients_hold_has_the_moments_of_the_dirichlet_too(alpha):
    """Of n_c/n with m samples a client: E = p, Var = p (1 − p) (1/(α+1) + 1/m − 1/(m (α+1))), to some per cent.

    Only nearly, since all clients together hold what there is: a draw that is free would have these moments.
    """
    prior, k, m = np.array([0.6, 0.3, 0.1]), 2000, 50
    labels = np.repeat(np.arange(3), np.rint(prior * k * m).astype(int))
    shares = counts_of(labels, dirichlet_client(labels, k, alpha, rng=np.random.default_rng(0))) / m
    np.testing.assert_allclose(shares.mean(axis=0), prior, atol=1e-12)
    variance = prior * (1 - prior) * (1 / (alpha + 1) + 1 / m - 1 / (m * (alpha + 1)))
    np.testing.assert_allclose(shares.var(axis=0), variance, rtol=0.1)


def test_logarithms_of_proportions_are_finite_for_every_alpha():
    for alpha in (5e-324, 1e-300, np.array([0.0, 1e-320, 1.0]), 1e300):
        assert np.isfinite(log_proportions(100, 3, alpha, np.random.default_rng(0))).all()


def test_drawing_from_what_is_left_is_wallenius_distribution():
    """Of 60 and 40 samples with odds 3 to 1, the first of two clients draws 50, and the other has the rest."""
    sizes, weights, draws = np.array([60, 40]), np.log([[3.0, 1.0], [3.0, 1.0]]), 4000
    rng = np.random.default_rng(0)
    drawn = [fill(sizes, weights, rng)[0, 0] for _ in range(draws)]
    value = np.arange(61)
    first = stats.nchypergeom_wallenius(100, 60, 50, 3.0).pmf(value)
    likelihood = (first + first[::-1]) / 2  # client 0 is the first, or has 60 less what the first has
    seen = np.bincount(drawn, minlength=61)
    common = draws * likelihood > 5
    expected = draws * np.append(likelihood[common], likelihood[~common].sum())
    assert stats.chisquare(np.append(seen[common], seen[~common].sum()), expected).pvalue > 1e-3


def test_filling_by_hand():
    """Both want the first class: whoever is first gets all of it, the other what is left."""
    wishes = np.array([[0.0, -1e300], [0.0, -1e300]])
    outcomes = {tuple(fill(np.array([2, 2]), wishes, np.random.default_rng(seed)).ravel()) for seed in range(20)}
    assert outcomes == {(2, 0, 0, 2), (0, 2, 2, 0)}


def test_what_nobody_wants_goes_to_whoever_is_last():
    wishes = np.array([[0.0, -900.0, -9000.0]] * 2 + [[-900.0, 0.0, -9000.0]] * 3)
    last = set()
    for seed in range(40):
        counts = fill(np.array([40, 40, 20]), wishes, np.random.default_rng(seed)).T.tolist()
        assert sorted(counts) == [[0, 0, 20], [0, 20, 0], [0, 20, 0], [20, 0, 0], [20, 0, 0]]
        last.add(counts.index([0, 0, 20]))
    assert last == set(range(5))


# ---- shards


def test_shards_by_hand():
    labels = np.repeat(np.arange(10), 20)
    counts = counts_of(labels, shards(labels, 10, 2, rng=np.random.default_rng(0)))
    assert ((counts == 0) | (counts == 10) | (counts == 20)).all()  # twenty shards of ten
    np.testing.assert_array_equal(counts.sum(axis=1), 20)
    assert (counts > 0).sum(axis=1).max() == 2


def test_any_shards_can_be_a_clients():
    rng = np.random.default_rng(0)
    held = [tuple(shards(np.arange(4), 2, 2, rng=rng)[0]) for _ in range(600)]
    _, times = np.unique(held, axis=0, return_counts=True)
    assert len(times) == 6
    assert stats.chisquare(times).pvalue > 1e-3


@given(labels=label_arrays(min_samples=40), k=st.integers(1, 8), s=st.integers(1, 5), seed=SEEDS)
def test_shards_are_runs_of_the_sorted_labels_of_equal_length(labels, k, s, seed):
    parts = shards(labels, k, s, rng=np.random.default_rng(seed))
    short = len(labels) // (k * s)
    assert all(s * short <= len(part) <= s * (short + 1) for part in parts)
    borders = k * s - 1  # each splits one class more
    classes = len(np.unique(labels))
    assert sum(len(np.unique(labels[part])) for part in parts) <= classes + borders


def test_more_shards_than_samples_are_refused():
    with pytest.raises(
        ValueError, match="3 clients with shards_per_client=4 need 12 samples, got 11; use fewer shards"
    ):
        shards(np.zeros(11, int), 3, 4, rng=np.random.default_rng(0))


# ---- label_skew


@given(classes=st.integers(1, 12), k=st.integers(1, 30), data=st.data(), seed=SEEDS)
def test_every_client_has_exactly_so_many_classes_and_every_class_a_holder(classes, k, data, seed):
    own = data.draw(st.integers(-(-classes // k), classes))
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), 30 + np.arange(classes)))
    counts = counts_of(labels, label_skew(labels, k, own, rng=np.random.default_rng(seed)))
    np.testing.assert_array_equal((counts > 0).sum(axis=1), own)
    for size, held in zip(np.bincount(labels), counts.T, strict=True):
        share, over = divmod(size, (held > 0).sum())
        assert sorted(held[held > 0]) == [share] * ((held > 0).sum() - over) + [share + 1] * over
    holders = (counts > 0).sum(axis=0)
    assert holders.max() - holders.min() <= 1


def test_any_classes_can_be_a_clients():
    """Five classes in decks, two a client: the third gets one from each of two decks, and never the same one twice."""
    rng = np.random.default_rng(0)
    pairs = np.array([deal_classes(5, 5, 2, rng).reshape(5, 2) for _ in range(4000)])
    assert (pairs[:, :, 0] != pairs[:, :, 1]).all()
    for client in range(5):
        sets = np.sort(pairs[:, client], axis=1) @ [5, 1]
        _, times = np.unique(sets, return_counts=True)
        assert len(times) == 10  # all the pairs there are
        assert stats.chisquare(times).pvalue > 1e-4


@pytest.mark.parametrize(
    ("labels", "k", "own", "message"),
    [
        ([0, 1], 1, 3, "classes_per_client must be <= the number of classes, 2, got 3"),
        ([0, 1, 2, 3], 1, 2, "1 clients with classes_per_client=2 cannot hold all of 4 classes"),
        ([7, 7, 8], 4, 1, r"class 8 has 1 samples for 2 clients; use a smaller classes_per_client than 1 or fewer"),
        ([0, 1], 1, 0, "classes_per_client must be an integer >= 1, got 0"),
    ],
)
def test_classes_that_cannot_be_dealt_are_refused(labels, k, own, message):
    with pytest.raises(ValueError, match=message):
        label_skew(labels, k, own, rng=np.random.default_rng(0))


# ---- quantity_skew


def test_sizes_have_the_moments_of_the_dirichlet():
    """Of each client over many draws: E = n/K, Var = n² (K−1)/(K² (Kβ+1)); rounding moves a size by less than one."""
    n, k, beta, draws = 10_000, 4, 0.5, 3000
    rng, labels = np.random.default_rng(0), np.zeros(10_000, int)
    sizes = np.array([[len(part) for part in quantity_skew(labels, k, beta, rng=rng)] for _ in range(draws)]) / n
    variance = (k - 1) / (k**2 * (k * beta + 1))
    np.testing.assert_allclose(sizes.mean(axis=0), 1 / k, rtol=0, atol=5 * np.sqrt(variance / draws) + 1 / n)
    error = variance * np.sqrt((float(stats.beta.stats(beta, (k - 1) * beta, moments="k")) + 2) / draws)
    np.testing.assert_allclose(sizes.var(axis=0), variance, rtol=0, atol=5 * error + 2 * np.sqrt(variance) / n)


@pytest.mark.parametrize("sigma", [0.3, 1.5])
def test_log_normal_sizes(sigma):
    """The logarithms of two clients' ratio are normal, with variance 2 σ²."""
    rng, labels = np.random.default_rng(1), np.zeros(100_000, int)
    sizes = [[len(part) for part in quantity_skew(labels, 2, size_sigma=sigma, rng=rng)] for _ in range(300)]
    ratios = np.log([one / other for one, other in sizes])
    assert stats.kstest(ratios, stats.norm(0, np.sqrt(2) * sigma).cdf).pvalue > 1e-3


def test_labels_are_alike_whatever_the_sizes():
    labels = np.tile(np.arange(4), 10_000)
    counts = counts_of(labels, quantity_skew(labels, 8, 0.5, min_size=100, rng=np.random.default_rng(0)))
    assert counts.sum(axis=1).max() > 2 * counts.sum(axis=1).min()
    assert stats.chi2_contingency(counts).pvalue > 1e-3


def test_min_size_of_a_quantity_skew():
    labels = np.zeros(1000, int)
    for seed in range(20):
        parts = quantity_skew(labels, 5, 0.3, min_size=20, rng=np.random.default_rng(seed))
        assert min(map(len, parts)) >= 20
        assert_each_sample_exactly_once(parts, 1000)
    with pytest.raises(ValueError, match=r"no draw of 3 .* use a larger beta than 0.001 or fewer"):
        quantity_skew(labels, 50, 0.001, min_size=20, rng=np.random.default_rng(0), max_tries=3)
    with pytest.raises(ValueError, match=r"no draw of 3 .* a smaller size_sigma than 9.0 or fewer"):
        quantity_skew(labels, 50, size_sigma=9.0, min_size=20, rng=np.random.default_rng(0), max_tries=3)


@pytest.mark.parametrize(
    "option", [{"beta": 0}, {"beta": np.nan}, {"beta": np.inf}, {"size_sigma": -1}, {"size_sigma": np.nan}]
)
def test_sizes_that_are_none_are_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be finite and >"):
        quantity_skew([0, 1], 2, **option, rng=np.random.default_rng(0))


# ---- natural


def test_natural_by_hand():
    groups = [30, 10, 20, 10, 30]
    parts = natural(np.zeros(5, int), 3, groups, rng=np.random.default_rng(0))
    assert [part.tolist() for part in parts] == [[1, 3], [2], [0, 4]]


@given(groups=st.lists(st.integers(0, 9), min_size=1, max_size=100), data=st.data(), seed=SEEDS)
def test_groups_stay_whole_and_are_dealt_evenly(groups, data, seed):
    column = np.array(groups)
    k = data.draw(st.integers(1, len(set(groups))))
    parts = natural(np.zeros(len(groups), int), k, column, rng=np.random.default_rng(seed))
    held = [set(column[part]) for part in parts]
    assert sum(map(len, held)) == len(set(groups))  # so no group is with two clients
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_fewer_clients_than_groups_get_any_of_them():
    labels, rng = np.zeros(4, int), np.random.default_rng(0)
    assert {tuple(natural(labels, 2, np.arange(4), rng=rng)[0]) for _ in range(100)} == {
        (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([1, 1, 1], "num_clients must be <= the number of groups, 1, got 2"),
        ([1, 2], "groups must be 3 integers"),
        ([0.0, 1.0, 2.0], "groups must be 3 integers"),
        ([[0, 1, 2]], "groups must be 3 integers"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        natural([0, 0, 0], 2, groups, rng=np.random.default_rng(0))


def test_every_partitioner_is_registered_under_its_own_name():
    assert all(partitioner.__name__ == name for name, partitioner in PARTITIONERS.items())
