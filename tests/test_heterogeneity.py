"""How unlike clients are: cases by hand, SciPy's functions, and the page that explains it."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers import require_fashion_mnist
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from clients.federation import federation
from experiments.cli import _value
from fedwsa.config import Config, assign, parse
from partitions import PARTITIONERS, heterogeneity

COUNTS = arrays(np.int64, st.tuples(st.integers(1, 8), st.integers(1, 6)), elements=st.integers(0, 50)).filter(np.any)


def test_clients_that_share_no_class():
    found = heterogeneity([[4, 0], [0, 4]])
    assert found.total_variation == 0.5
    # q = (1, 0), p = (½, ½), middle (¾, ¼): ½ log₂ 4/3 + ½ (½ log₂ 2/3 + ½ log₂ 2) = 3/2 − ¾ log₂ 3 bits
    assert found.jensen_shannon == pytest.approx(np.sqrt(1.5 - 0.75 * np.log2(3)), abs=1e-12)
    assert (found.effective_classes, found.size_gini) == (1.0, 0.0)


def test_clients_that_are_alike():
    found = heterogeneity([[3, 6, 9], [1, 2, 3], [2, 4, 6]])
    assert found.total_variation == pytest.approx(0, abs=1e-15)
    assert found.jensen_shannon == pytest.approx(0, abs=1e-7)
    assert found.effective_classes == pytest.approx(6 / (1 * 2**2 * 3**3) ** (1 / 6))  # exp H = Π q^−q, q = 1/6 2/6 3/6
    assert found.size_gini == pytest.approx(2 * (6 * 1 + 12 * 2 + 18 * 3) / (3 * 36) - 4 / 3)


def test_clients_weigh_alike_and_empty_ones_not():
    """p = (¾, ¼) of a large and a small client: ½ (|1 − ¾| + |0 − ¼|) = ¼, and ¾."""
    found = heterogeneity([[3, 0], [0, 1], [0, 0]])
    assert found.total_variation == pytest.approx((0.25 + 0.75) / 2)
    assert found.effective_classes == 1
    assert found.size_gini == pytest.approx((1 + 2 + 3) * 2 / (2 * 3 * 4))  # |3−1|, |1−0| and |3−0|, each twice


def test_one_client_that_holds_all():
    assert heterogeneity([[0, 0], [5, 5], [0, 0], [0, 0]]).size_gini == pytest.approx(3 / 4)


@given(counts=COUNTS)
def test_each_number_is_scipys_or_the_definitions(counts):
    sizes = counts.sum(axis=1)
    held, p = counts[sizes > 0] / sizes[sizes > 0, None], counts.sum(axis=0) / counts.sum()
    found = heterogeneity(counts)
    assert found.total_variation == pytest.approx(np.mean([0.5 * np.abs(q - p).sum() for q in held]), abs=1e-12)
    assert found.jensen_shannon == pytest.approx(np.mean([jensenshannon(q, p, base=2) for q in held]), abs=1e-7)
    assert found.effective_classes == pytest.approx(np.mean([np.exp(entropy(q)) for q in held]), rel=1e-12)
    differences = np.abs(sizes[:, None] - sizes).sum()
    assert found.size_gini == pytest.approx(differences / (2 * len(sizes) * sizes.sum()), abs=1e-12)


@given(counts=COUNTS)
def test_ranges(counts):
    found = heterogeneity(counts)
    assert 0 <= found.total_variation <= 1
    assert 0 <= found.jensen_shannon <= 1
    assert 1 <= found.effective_classes <= counts.shape[1] + 1e-9
    assert -1e-12 <= found.size_gini < 1


@pytest.mark.parametrize("counts", [[], [[]], [1, 2], [[0, 0]], [[1, -1]], [[1, np.nan]]])
def test_counts_that_are_none_are_refused(counts):
    with pytest.raises(ValueError, match=r"label counts must be \[clients, classes\], >= 0 and not all 0"):
        heterogeneity(counts)


# ---- docs/heterogeneity.md

PAGE = (Path(__file__).parent.parent / "docs" / "heterogeneity.md").read_text(encoding="utf-8")


def settings_of(options: str) -> Config:
    """The config of `fedwsa partition` with these options."""
    words, values = shlex.split(options), {"cohort": 1, "evaluation-cohort": 0}
    for option, text in zip(words[::2], words[1::2], strict=True):
        key, value = text.split("=") if option == "--set" else (option.removeprefix("--"), text)
        assign(values, key, _value(value))
    return parse(values)


def test_the_table_of_the_page_is_what_the_code_finds():
    require_fashion_mnist()
    shared = re.search(r"^\| `(.*?)` and \|", PAGE, re.MULTILINE)[1]
    rows = re.findall(r"^\| `(--.*?)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 11
    for options, *written in rows:
        found = heterogeneity(federation(settings_of(f"{shared} {options}")).label_counts())
        assert written == [
            f"{found.total_variation:.3f}",
            f"{found.jensen_shannon:.3f}",
            f"{found.effective_classes:.2f}",
            f"{found.size_gini:.3f}",
        ], options


def test_the_page_names_every_partitioner_and_its_pictures_exist():
    assert set(re.findall(r"^\* `(\w+)`:", PAGE, re.MULTILINE)) == set(PARTITIONERS)
    pictures = re.findall(r'src="(.*?)"', PAGE)
    assert sorted(pictures) == sorted(re.findall(r"--out docs/(\S+)", PAGE))
    assert all((Path(__file__).parent.parent / "docs" / name).is_file() for name in pictures)
