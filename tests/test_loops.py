"""The compiled loops, against exact arithmetic and NumPy."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from federations import client_app, grid_of, initial_model, one_round, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fedwsa import loops, warmup
from fedwsa.arrays import pack
from fedwsa.scope import LANES, _sums, moments
from strategies.fedavg import FedAvg

ODD = pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
quick = settings(max_examples=100)


def both_ways(function: Callable[..., Any], argument: Any) -> tuple[Any, Any]:
    """What it says with the compiled loop, and with NumPy's."""
    found = []
    for loaded in (loops, None):
        with patch("fedwsa.warmup._loops", loaded):
            found.append(function(argument))
    return found[0], found[1]


@quick
@given(st.integers(1, 5 * LANES), st.integers(0, 2**32), st.sampled_from([0.0, 1e-3, 1.0, 1e4]))
def test_sums_of_moments_are_numpys_to_the_last_bit(length, seed, shift):
    rng = np.random.default_rng(seed)
    row = (rng.normal(size=length) * 10.0 ** rng.integers(-9, 9) + shift).astype(np.float32)
    compiled, plain = both_ways(_sums, row)
    assert compiled == plain


@quick
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40), st.sampled_from([0.0, 1.0, 1e4]))
def test_moments_agree_with_exact_arithmetic(numbers, shift):
    row = (np.array(numbers) + shift).astype(np.float32)
    exact = [Fraction(number) for number in row.tolist()]
    mean = sum(exact) / len(exact)
    variance = sum((number - mean) ** 2 for number in exact) / len(exact)
    for found in both_ways(moments, torch.from_numpy(row)):
        assert found == pytest.approx((float(mean), float(variance)), rel=1e-9, abs=1e-9 * float(mean) ** 2)
        assert (found[1] == 0) == (variance == 0)


@pytest.mark.filterwarnings("error")
@ODD
@pytest.mark.parametrize("length", [3, 5000])
def test_moments_of_what_is_not_finite_are_not(odd, length):
    row = np.ones(length, np.float32)
    row[:2] = -math.inf, odd
    for found in both_ways(moments, torch.from_numpy(row)):
        assert not all(math.isfinite(number) for number in found)


@pytest.mark.filterwarnings("error")
def test_moments_of_signalling_nans_come_without_a_warning():
    """As damaged bytes may hold them: turning them into doubles is an invalid operation."""
    row = np.full(3000, 0x7FA00000, np.uint32).view(np.float32)
    for found in both_ways(moments, torch.from_numpy(row)):
        assert all(map(math.isnan, found))


@quick
@given(st.data(), st.sampled_from([(2, loops.sum_of_2), (4, loops.sum_of_4), (8, loops.sum_of_8)]), st.integers(0, 70))
def test_sums_are_numpys_to_the_last_bit(data, some, length):
    count, add = some
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows = tuple(
        (rng.normal(size=length) * 10.0 ** rng.integers(-20, 20, length)).astype(np.float32) for _ in range(count)
    )
    weights = rng.uniform(0.1, 1e6, count)
    terms = [row.astype(np.float64) * weight for row, weight in zip(rows, weights, strict=True)]
    while len(terms) > 1:
        terms = [one + other for one, other in zip(terms[::2], terms[1::2], strict=True)]
    total = np.empty(length)
    for row in rows:
        row.flags.writeable = False  # as what comes through a socket is
    add(total, rows, weights)
    assert total.tobytes() == terms[0].tobytes()


@ODD
@given(st.integers(1, 100), st.data())
@quick
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(odd, length, data):
    row = np.full(length, np.finfo(np.float32).max)
    assert loops.all_finite(row)
    row[data.draw(st.integers(0, length - 1))] = odd
    assert not loops.all_finite(row)


@pytest.mark.process
def test_they_compile_where_no_folder_takes_the_machine_code(tmp_path: Path) -> None:
    """An installation that is read-only, and a user without a home."""
    package = tmp_path / "fedwsa"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "loops.py").write_text(Path(loops.__file__).read_text())
    (package / "__pycache__").touch()  # a file, so that not even root can write into a folder of this name
    home = tmp_path / "home"
    home.touch()
    program = "import numpy as np; from fedwsa import loops; print(loops.all_finite(np.ones(3, np.float32)))"
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    for name in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


@pytest.mark.process
def test_damaged_machine_code_is_done_without(tmp_path: Path) -> None:
    """As a machine that lost its power may leave it."""
    program = "import numpy as np; from fedwsa import loops; print(loops.all_finite(np.ones(3, np.float32)))"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for damage in (None, "*.nbi", "*.nbc"):
        for path in tmp_path.rglob(damage) if damage else ():
            path.write_bytes(b"")
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
    assert list(tmp_path.rglob("*.nbi"))


@pytest.mark.process
def test_a_process_that_trains_little_loads_no_compiler() -> None:
    """Then it takes the loops for plain float32."""
    program = """
import sys
import numpy as np
from fedwsa import warmup
row = np.ones(10, np.float32)
for numbers in (warmup.ENOUGH // 2, *1000 * [warmup.SMALL], warmup.ENOUGH // 2):
    warmup.trained(numbers)
    if numbers > warmup.SMALL:
        print(warmup.loops_for(row) is not None, "numba" in sys.modules)
others = row.astype(float), row[::2], np.frombuffer(bytes(9), np.float32, 2, 1), row.astype(">f4")
print([warmup.loops_for(row, other) for other in others], warmup.loops_for(row, row) is not None)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    expected = ["False False", "True True", "[None, None, None, None] True"]
    assert done.stdout.splitlines() == expected


def test_clients_say_what_they_trained() -> None:
    start = initial_model()
    with patch("fedwsa.warmup._trained", 0), patch("fedwsa.warmup.SMALL", 0):
        one_round(FedAvg(2, seed=0), grid_of(client_app, 4, tiny(num_clients=4).to_run_config()), pack(start))
        assert warmup._trained == 2 * sum(tensor.numel() for tensor in start.values())
