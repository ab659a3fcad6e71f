import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers import require_fashion_mnist

from experiments.bench import __main__ as program
from experiments.bench.measure import Contestant, ContestantError, Figure, Measurement, measure
from experiments.bench.rows import (
    DESCRIPTIONS,
    ROWS,
    Goal,
    Row,
    first_over_limit,
    later,
    over_limit,
    repeats,
    rounds,
    spread,
    start,
    starts,
)
from experiments.bench.unequal import limit
from experiments.bench.workloads import LARGEST, WORKLOADS, client_sizes, equal, unequal
from fedwsa.seeding import generator

# ---- figures


def figures(*values, at_least=False):
    return [Figure(value, at_least) for value in values]


def test_the_round_of_a_measurement_is_the_median_without_the_first():
    assert Measurement(9.0, (8.0, 1.0, 3.0, 2.0)).seconds == Figure(2.0)
    assert Measurement(9.0, (8.0, 1.0), unfinished=5.0).seconds == Figure(1.0)
    assert Measurement(9.0, (8.0,), unfinished=5.0).seconds == Figure(5.0, at_least=True)
    assert Measurement(9.0, (8.0,)).seconds is None


def test_ratios_are_taken_within_each_repeat():
    one, other = Contestant("one", "x", "mlp", 2), Contestant("other", "y", "mlp", 2)
    row = Row("mlp", "one ÷ other", None, rounds, (one, other))
    of_one = [Measurement(1.0, (5.0, 2.0)), Measurement(1.0, (5.0, 9.0))]
    of_other = [Measurement(1.0, (5.0, 1.0)), Measurement(1.0, (5.0, 3.0))]
    assert repeats(row, [of_one, of_other]) == figures(2.0, 3.0)


def test_a_round_that_was_not_waited_for_makes_the_ratio_a_lower_bound():
    stopped, other = Measurement(1.0, (5.0,), unfinished=20.0), Measurement(1.0, (5.0, 0.5))
    assert rounds(stopped, other) == Figure(40.0, at_least=True)


def test_starts_are_shown_divided_and_subtracted():
    one, other = Measurement(6.0, (1.0,)), Measurement(4.0, (1.0,))
    assert start(one) == Figure(6.0)
    assert starts(one, other) == Figure(1.5)
    assert later(one, other) == Figure(2.0)


def test_rounds_of_unequal_clients_are_compared_with_the_least_possible():
    assert limit([1.0, 2.0, 3.0]) == 3.0
    assert limit([1.0, 2.0, 3.0, 2.0]) == 4.0
    one = Measurement(9.0, (4.0, 2.2, 2.4), limit=2.0)
    assert over_limit(one).value == pytest.approx(1.15)
    assert first_over_limit(one).value == 2.0


def test_a_spread_is_median_minimum_and_maximum():
    assert spread(figures(3.0, 1.0, 2.5)) == "2.50 (1.00 to 3.00)"
    assert spread(figures(3.0, 1.0), " s") == "2.00 s (1.00 to 3.00)"
    assert spread([Figure(3.0), Figure(1.0, at_least=True)]).startswith("> 2.00")


@pytest.mark.parametrize(
    ("goal", "values", "at_least", "verdict"),
    [
        (Goal("≤", 1.25), (1.0, 1.25, 9.0), False, "yes"),
        (Goal("≤", 1.25), (1.0, 1.26, 1.27), False, "no"),
        (Goal("≥", 15), (15.0, 15.0, 1.0), False, "yes"),
        (Goal("≥", 15), (14.9,), False, "no"),
        (Goal("≥", 15), (16.0,), True, "yes"),
        (Goal("≥", 15), (14.0,), True, "not known"),
        (Goal("≤", 15), (14.0,), True, "not known"),
        (Goal("≤", 15), (16.0,), True, "no"),
    ],
)
def test_a_goal_is_for_the_median(goal, values, at_least, verdict):
    assert goal.verdict(figures(*values, at_least=at_least)) == verdict


def test_a_goal_reads_as_in_the_table():
    assert str(Goal("≤", 1.0)) == "≤ 1"
    assert str(Goal("≤", 5, " s")) == "≤ 5 s"


def test_every_row_has_a_description_and_a_workload_that_exists():
    assert {row.workload for row in ROWS} == DESCRIPTIONS.keys()
    assert all(contestant.workload in WORKLOADS for row in ROWS for contestant in row.contestants)


# ---- workloads


@pytest.mark.parametrize("name", ["mlp", "cnn", "tiny", "few", "many"])
def test_equal_shards_are_disjoint_and_of_the_right_size(name):
    workload = WORKLOADS[name]
    parts = equal(np.zeros(60_000, np.int64), workload.clients, workload.samples, rng=np.random.default_rng(0))
    assert [len(part) for part in parts] == [workload.samples] * workload.clients
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    assert together.max() < 60_000
    for client in (0, workload.clients - 1):
        assert np.array_equal(parts[client], np.arange(60_000)[workload.shard(client)])


def test_the_bare_loop_counts_on_and_uses_shards_again():
    workload = WORKLOADS["tiny"]
    assert workload.shard(1000) == workload.shard(0)
    assert workload.shard(999).stop == 60_000


def test_unequal_sizes_follow_from_the_generator_and_lie_in_their_range():
    for seed in range(20):
        sizes = client_sizes(20, 600, np.random.default_rng(seed))
        assert np.array_equal(sizes, client_sizes(20, 600, np.random.default_rng(seed)))
        assert sizes.min() >= 1
        assert sizes.max() <= LARGEST
    assert not np.array_equal(sizes, client_sizes(20, 600, np.random.default_rng(0)))


def test_unequal_shards_are_disjoint_and_really_unequal():
    parts = unequal(np.zeros(60_000, np.int64), 20, rng=generator(0, "partition"))
    sizes = [len(part) for part in parts]
    assert sizes == client_sizes(20, 600, generator(0, "partition")).tolist()
    assert max(sizes) > 2000
    assert min(sizes) < 10
    assert np.array_equal(np.concatenate(parts), np.arange(sum(sizes)))


# ---- what is written


@pytest.mark.parametrize(
    ("options", "written"),
    [([], "RESULTS.md"), (["--workloads", "mlp"], None), (["--workloads", "mlp", "--out"], "own")],
)
def test_a_part_of_the_workloads_does_not_replace_the_results_of_all(options, written, tmp_path, monkeypatch, capsys):
    measured = {contestant: [Measurement(9.0, (8.0, 1.0), limit=1.0)] for row in ROWS for contestant in row.contestants}
    monkeypatch.setattr(program, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(program, "run", lambda rows, count: (measured, set()))
    if options[-1:] == ["--out"]:
        options = [*options, str(tmp_path / "own")]
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    with pytest.raises(SystemExit, match="0"):
        program.main()
    assert [path.name for path in tmp_path.iterdir()] == ([] if written is None else [written])
    shown = capsys.readouterr().out
    assert "| MLP, 10 × 600 samples | our app ÷ bare loop | ≤ 1.25 | 1.00 (1.00 to 1.00) | yes |" in shown
    assert written is None or (tmp_path / written).read_text(encoding="utf-8") == shown.removesuffix("\n")


# ---- the contestants themselves

OURS = [
    each
    for row in ROWS
    for each in row.contestants
    if WORKLOADS[each.workload].device == "cpu" and each.workload not in {"tiny", "cnn"} and each.argument != "stock"
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "contestant",
    {(each.module, each.argument): each for each in OURS}.values(),
    ids=lambda each: f"{each.module} {each.argument}",
)
def test_every_contestant_runs(contestant):
    require_fashion_mnist()
    number = min(contestant.rounds, 2)
    found = measure(replace(contestant, rounds=number, stop_after=0.0))
    assert len(found.laps) == number
    assert (found.limit is not None) == bool(contestant.limit)


@pytest.mark.process
def test_what_fails_is_said_with_what_it_printed_last():
    with pytest.raises(ContestantError, match=r"(?s)exit status 1, 0 of 2 rounds.*KeyError: 'nothing'"):
        measure(Contestant("x", "ours", "nothing", 2, "inprocess"))
