"""Run folders are read back right: torn lines, summaries, intervals, tables; by cases worked out by hand."""

import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from experiments.figures import draw_partition
from experiments.partition_view import partition_table
from experiments.results import (
    Summary,
    mean_interval,
    paired_differences,
    read_events,
    read_run,
    summarize,
)
from experiments.table import decimal_column, detail_cells, difference_cells, summary_cells, summary_table


def evaluation(server_round: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"round": server_round, "phase": "evaluate-server", "metrics": {"accuracy": accuracy}, **more}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def summary(strategy: str, accuracy: float, *, alpha: float = 0.1, seed: int = 0, **changes: Any) -> Summary:
    fields: dict[str, Any] = {
        "alpha": alpha,
        "seed": seed,
        "strategy": strategy,
        "rounds": 3,
        "final_accuracy": accuracy,
        "last5_accuracy": accuracy,
        "rounds_to_target": None,
        "target_accuracy": 0.8,
        "seconds": 54.0,
        "bytes_down": 2_000_000,
        "bytes_up": 1_000_000,
        "scope_distance": 0.01234,
        "model_sha256": "0" * 64,
    }
    return Summary(**{**fields, **changes})


def write_run(folder: Path, summaries: list[Summary], strategies: list[str], alpha: str, seed: str) -> Path:
    folder.mkdir()
    lines = [f"strategies = {json.dumps(strategies)}", f"alpha = {alpha}", f"seed = {seed}", "target-accuracy = 0.8"]
    (folder / "config.toml").write_text("\n".join(lines))
    write_lines(folder / "metrics.jsonl", [asdict(one) for one in summaries])
    return folder


def rendered(table: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


# ---- events


def test_no_file_is_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "metrics.jsonl") == []


def test_a_last_line_torn_anywhere_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first, second = evaluation(0, 0.1), evaluation(1, 0.2, note="größer")
    last = json.dumps(second, ensure_ascii=False).encode()
    for cut in range(len(last)):  # in the middle of "ö", too
        path.write_bytes(json.dumps(first).encode() + b"\n" + last[:cut])
        assert read_events(path) == [first]
    path.write_bytes(json.dumps(first).encode() + b"\n" + last)
    assert read_events(path) == [first, second]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(evaluation(0, 0.1)) + '\n{"round": 1, "pha\n' + json.dumps(evaluation(2, 0.1)) + "\n")
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        read_events(path)


def test_a_round_logged_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [evaluation(1, 0.1), evaluation(2, 0.2), evaluation(2, 0.25), evaluation(3, 0.3)])
    assert [event["metrics"]["accuracy"] for event in read_events(path)] == [0.1, 0.25, 0.3]


# ---- summaries


def summed_up(folder: Path, events: list[dict[str, Any]], target: float = 0.8) -> Summary:
    write_lines(folder / "metrics.jsonl", events)
    return summarize(folder, alpha=0.1, seed=7, strategy="fedavg", target_accuracy=target, model_sha256="abc")


def test_a_summary_worked_out_by_hand(tmp_path: Path) -> None:
    train: dict[str, Any] = {"phase": "train", "num_clients": 10, "num_failed": 0, "layers": ["a", "b"]}
    asked = {"phase": "evaluate-clients", "bytes_down": 7, "bytes_up": 1, "seconds": 0.5}
    events = [
        evaluation(0, 0.1, seconds=0.25),
        {**train, "round": 1, "scope_distance": [3.0, 4.0], "bytes_down": 100, "bytes_up": 110, "seconds": 2.0},
        {**asked, "round": 1},
        evaluation(1, 0.5),
        {**train, "round": 2, "scope_distance": [0.25, 0.5], "bytes_down": 100, "bytes_up": 110, "seconds": 3.0},
        {**asked, "round": 2},
        evaluation(2, 0.75),
    ]
    assert asdict(summed_up(tmp_path, events)) == {
        "alpha": 0.1,
        "seed": 7,
        "strategy": "fedavg",
        "rounds": 2,
        "final_accuracy": 0.75,
        "last5_accuracy": 0.625,
        "rounds_to_target": None,
        "target_accuracy": 0.8,
        "seconds": 6.25,
        "bytes_down": 214,
        "bytes_up": 222,
        "scope_distance": 0.75,
        "model_sha256": "abc",
    }


def test_last5_takes_the_last_five_evaluations_and_not_the_last_five_rounds(tmp_path: Path) -> None:
    every_third = [evaluation(3 * i, value) for i, value in enumerate([0.0, 1.0, 0.5, 0.5, 0.5, 0.5])]
    assert summed_up(tmp_path, every_third).last5_accuracy == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("accuracies", "mean"),
    [
        ({0: 0.1, 1: 0.5, 2: 0.7}, 0.6),
        ({0: 0.1, 5: 0.5}, 0.5),
        ({0: 0.1, 1: 0.2, 2: 0.2, 3: 0.2, 4: 0.2}, 0.2),
        ({0: 0.1}, 0.1),  # there is nothing else
    ],
)
def test_last5_leaves_out_the_model_before_training(accuracies: dict[int, float], mean: float, tmp_path: Path) -> None:
    events = [evaluation(server_round, value) for server_round, value in accuracies.items()]
    assert summed_up(tmp_path, events).last5_accuracy == pytest.approx(mean)


@pytest.mark.parametrize(
    ("accuracies", "reached"),
    [
        ({0: 0.1, 5: 0.79, 10: 0.8, 15: 0.7, 20: 0.9}, 10),  # exactly the target counts, falling below it later too
        ({0: 0.1, 5: 0.7999}, None),
        ({0: 0.9, 5: 0.95}, 0),
        ({0: 0.1, 30: 0.85}, 30),
    ],
)
def test_rounds_to_target(accuracies: dict[int, float], reached: int | None, tmp_path: Path) -> None:
    events = [evaluation(server_round, value) for server_round, value in accuracies.items()]
    assert summed_up(tmp_path, events).rounds_to_target == reached


@pytest.mark.parametrize(
    "last_train",
    [{}, {"layers": [], "scope_distance": []}, {"layers": ["a", "b"], "scope_distance": [0.5, math.nan]}],
)
def test_scope_distance_is_of_the_last_round_or_none(last_train: dict[str, Any], tmp_path: Path) -> None:
    first = {"round": 1, "phase": "train", "layers": ["a"], "scope_distance": [1.0]}
    events = [first, {"round": 2, "phase": "train", **last_train}, evaluation(2, 0.5)]
    assert summed_up(tmp_path, events).scope_distance is None


@pytest.mark.parametrize(("sent", "failed", "distance"), [(2, 1, None), (1, 0, None), (3, 1, 0.0)])
def test_one_client_has_no_scope_distance(sent: int, failed: int, distance: float | None, tmp_path: Path) -> None:
    train = {"round": 1, "phase": "train", "num_clients": sent, "num_failed": failed}
    events = [{**train, "layers": ["a"], "scope_distance": [0.0]}, evaluation(1, 0.5)]
    assert summed_up(tmp_path, events).scope_distance == distance


def test_without_a_server_evaluation_there_is_no_summary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no server evaluation"):
        summed_up(tmp_path, [{"round": 1, "phase": "train"}])


@pytest.mark.parametrize("target", [0.0, 80.0, math.nan])
def test_a_target_outside_its_range_is_refused(target: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        summed_up(tmp_path, [evaluation(0, 0.1)], target)


# ---- runs


def test_a_summary_survives_the_file(tmp_path: Path) -> None:
    written = [summary("fedavg", 0.1), summary("fedavg", 0.75)]  # finished twice: the later line counts
    run = read_run(write_run(tmp_path / "run", written, ["fedavg", "np-merge"], "0.1", "0"))
    assert run.name == "run"
    assert run.federations[0].results["fedavg"].summary == written[1]
    assert run.federations[0].results["np-merge"].summary is None
    assert run.federations[0].partition is None


def test_federations_are_found_by_their_numbers_and_kept_in_the_order_of_the_config(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], ["fedavg"], "[1, 0.1]", "[3, 0]")
    for alpha, seed in (("0.1", 0), ("1", 3), ("1", 0)):
        write_lines(folder / f"alpha-{alpha}_seed-{seed}" / "fedavg" / "metrics.jsonl", [evaluation(0, float(alpha))])
    run = read_run(folder)
    assert [(f.alpha, f.seed) for f in run.federations] == [(1.0, 3), (1.0, 0), (0.1, 3), (0.1, 0)]
    seen = [[event["metrics"]["accuracy"] for event in f.results["fedavg"].events] for f in run.federations]
    assert seen == [[1.0], [1.0], [], [0.1]]


def test_an_alpha_of_many_digits_is_found_by_its_folders_shorter_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], ["fedavg"], "0.123456789", "[0, 1]")
    write_lines(folder / "alpha-0.123457_seed-1" / "fedavg" / "metrics.jsonl", [evaluation(0, 0.5)])
    assert [len(f.results["fedavg"].events) for f in read_run(folder).federations] == [0, 1]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.toml"):
        read_run(tmp_path)


def test_of_a_users_own_partitioner_the_partition_says_whether_alpha_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], ["fedavg"], "0.1", "0")
    with (folder / "config.toml").open("a") as file:
        file.write('\npartitioner = "my:split"')
    assert read_run(folder).split(0.1) == "α = 0.1"  # it is not known yet
    for options, label in (({"beta": 0.5}, "my:split"), ({"alpha": 0.1}, "α = 0.1")):
        made_by = {"partitioner": "my:split", **options}
        (folder / "partition.json").write_text(json.dumps({"label_counts": [[1]], "made_by": made_by}))
        assert read_run(folder).split(0.1) == label


@pytest.mark.parametrize("config", ["", "[np-merge]\nsteps = 0", "[np-merge]\nsteps = 3"])
def test_np_merge_learns_where_it_takes_a_step(config: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], ["fedavg", "np-merge"], "0.1", "0")
    with (folder / "config.toml").open("a") as file:
        file.write("\n" + config)
    assert read_run(folder).learns_on_server == ("= 0" not in config)


# ---- intervals


@pytest.mark.parametrize(("values", "t"), [([1.0, 3.0], 12.706205), ([1.0, 2.0, 3.0], 4.302653)])
def test_interval_by_hand(values: list[float], t: float) -> None:
    """t_{0.975} from a printed table; s = √2 for {1, 3} and 1 for {1, 2, 3}."""
    s = {2: math.sqrt(2), 3: 1.0}[len(values)]
    mean, half_width = mean_interval(values)
    assert mean == 2.0
    assert half_width == pytest.approx(t * s / math.sqrt(len(values)), rel=1e-7)


def test_one_value_has_no_interval() -> None:
    assert mean_interval([0.5]) == (0.5, None)


@pytest.mark.parametrize("values", [[], [0.5, math.nan]])
def test_no_interval_of_nothing_or_nan(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one value and finite ones only"):
        mean_interval(values)


def test_95_percent_intervals_cover_95_percent() -> None:
    rng = np.random.default_rng(0)
    draws = [mean_interval(list(rng.normal(size=4))) for _ in range(4000)]
    covered = np.mean([abs(mean) <= half for mean, half in draws if half is not None])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """Seeds differ by 0.3 and strategies by 0.02 and 0.04: only pairing finds 0.03 ± 12.7062 · 0.0141421/√2."""
    summaries = [
        summary("wsa", 0.52, seed=0),
        summary("fedavg", 0.80, seed=1),
        summary("fedavg", 0.50, seed=0),
        summary("wsa", 0.84, seed=1),
        summary("fedavg", 0.10, seed=2),  # without a partner
        summary("np-merge", 0.0996, seed=2),
        *(summary("trimmed", accuracy, seed=seed) for seed, accuracy in enumerate([0.40, 0.70, 0.0])),
    ]
    run = read_run(
        write_run(tmp_path / "run", summaries, ["fedavg", "wsa", "cart", "np-merge", "trimmed"], "0.1", "[0, 1, 2]")
    )
    difference, *_ = paired_differences(run)
    assert (difference.strategy, difference.baseline, difference.n) == ("wsa", "fedavg", 2)
    assert difference.mean == pytest.approx(0.03)
    assert difference.half_width == pytest.approx(0.12706205, rel=1e-6)
    cells = difference_cells(run)
    assert cells is not None
    assert cells.rows == (
        ("wsa", "+3.0 ± 12.7 (n=2)"),
        ("cart", "not finished"),
        ("np-merge", "+0.0 (n=1)"),
        ("trimmed", "−10.0 ± 0.0"),
    )


# ---- tables


def test_decimals_follow_the_largest_of_a_column() -> None:
    assert decimal_column([1234.5, 0.2, None]) == ["1,234", "0", "–"]
    assert decimal_column([54.21, 9.0]) == ["54.2", "9.0"]
    assert decimal_column([9.994, 1.0]) == ["9.99", "1.00"]
    assert decimal_column([0.0123]) == ["0.012"]
    assert decimal_column([None]) == ["–"]


def test_one_federation_has_a_row_a_strategy(tmp_path: Path) -> None:
    summaries = [summary("fedavg", 0.71234, rounds_to_target=0), summary("wsa", 0.8, seconds=7.26)]
    run = read_run(write_run(tmp_path / "run", summaries, ["fedavg", "wsa", "cart"], "0.1", "0"))
    assert summary_cells(run).rows == (
        ("fedavg", "71.2", "71.2", "0", "54.0", "1.00", "2.00", "0.0123"),
        ("wsa", "80.0", "80.0", "–", "7.3", "1.00", "2.00", "0.0123"),
        ("cart", "not finished", "–", "–", "–", "–", "–", "–"),
    )


@pytest.mark.parametrize("policy", ["", "aggregate", "local"])
def test_a_table_says_where_clients_use_other_models_than_the_one_it_is_of(policy: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [summary("fedavg", 0.7)], ["fedavg"], "0.1", "0")
    if policy:
        (folder / "config.toml").write_text(f'batch-norm = "{policy}"\n' + (folder / "config.toml").read_text())
    assert ("their own accuracy is in metrics.jsonl" in summary_cells(read_run(folder)).note) == (policy == "local")


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("loss", [None, math.nan, math.inf, 2.0])
def test_a_loss_that_is_not_finite_is_said_beside_the_accuracy(loss: float | None, seeds: int, tmp_path: Path) -> None:
    written = [summary("fedavg", 0.1, seed=seed) for seed in range(seeds)]
    folder = write_run(tmp_path / "run", written, ["fedavg"], "0.1", str(list(range(seeds))))
    for seed in range(seeds):
        part = folder / f"alpha-0.1_seed-{seed}" if seeds > 1 else folder
        losses = {0: 2.0, 1: math.nan, 2: loss if seed == 0 else 2.0}  # that of the last round counts
        events = [{**evaluation(r, 0.1), "metrics": {"loss": each, "accuracy": 0.1}} for r, each in losses.items()]
        write_lines(part / "fedavg" / "metrics.jsonl", events)
    ((_, final, *_),) = summary_cells(read_run(folder)).rows
    accuracy, words = ("10.0", "loss not finite") if seeds == 1 else ("10.0 ± 0.0", "loss not finite in 1 of 3")
    assert final == (accuracy if loss == 2.0 else f"{accuracy} ({words})")


def test_several_federations_have_the_other_numbers_by_alpha(tmp_path: Path) -> None:
    summaries = [
        summary("fedavg", 0.5, seed=0, last5_accuracy=0.4, rounds_to_target=3, scope_distance=1.0),
        summary("fedavg", 0.5, seed=1, last5_accuracy=0.6, rounds_to_target=6, scope_distance=None),
        summary("fedavg", 0.5, seed=2, last5_accuracy=0.5, scope_distance=4.0),
        summary("fedavg", 0.5, alpha=1.0, seed=0, last5_accuracy=0.7, scope_distance=None),
    ]
    run = read_run(write_run(tmp_path / "run", summaries, ["fedavg", "wsa"], "[0.1, 1]", "[0, 1, 2]"))
    cells = detail_cells(run)
    assert cells is not None
    assert cells.header[3] == "rounds to 80 %"
    assert cells.rows == (  # t = 4.302653, s = 0.1
        ("fedavg", "α = 0.1", "50.0 ± 24.8", "4.5 (2 of 3)", "2.5"),
        ("fedavg", "α = 1", "70.0 (n=1)", "–", "–"),
    )
    one = read_run(write_run(tmp_path / "one", summaries[:1], ["fedavg"], "0.1", "0"))
    assert detail_cells(one) is None


def test_several_federations_have_a_column_an_alpha(tmp_path: Path) -> None:
    summaries = [
        *(summary("fedavg", a, alpha=0.1, seed=seed) for seed, a in enumerate([0.4, 0.5, 0.6])),
        *(summary("fedavg", a, alpha=1.0, seed=seed, seconds=30.0) for seed, a in enumerate([0.8, 0.8])),
    ]
    run = read_run(write_run(tmp_path / "run", summaries, ["fedavg", "wsa"], "[0.1, 1.0]", "[0, 1, 2]"))
    cells = summary_cells(run)
    assert "n = 3 seeds" in cells.title
    assert cells.header == ("strategy", "α = 0.1", "α = 1", "seconds", "MB up", "MB down")
    assert cells.rows == (
        ("fedavg", "50.0 ± 24.8", "80.0 ± 0.0 (n=2)", "44.4", "1.00", "2.00"),  # 4.3027 · 0.1/√3; (3·54 + 2·30)/5
        ("wsa", "not finished", "not finished", "–", "–", "–"),
    )


def test_nothing_is_cut_off_at_80_columns(tmp_path: Path) -> None:
    costs: dict[str, Any] = {"seconds": 123456.0, "bytes_up": 98_765_000_000, "bytes_down": 87_654_000_000}
    costs["rounds_to_target"] = 1234
    names = ["fedavg", "fedavg-wsa-proximal", "np-merge"]
    summaries = [summary(name, 0.987, alpha=alpha, **costs) for name in names for alpha in (0.1, 0.3, 1.0, 10.0)]
    many = read_run(write_run(tmp_path / "many", summaries, names, "[0.1, 0.3, 1.0, 10.0]", "[0, 1]"))
    one = read_run(write_run(tmp_path / "one", summaries, names, "0.1", "0"))
    for run in (many, one):
        text = rendered(summary_table(run))
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 80
        cells = [cell for row in summary_cells(run).rows for cell in row[1:]]
        assert all(word in text for cell in cells for word in cell.split())
        assert "last round" in " ".join(text.split())


def test_markup_in_a_name_is_text(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "[red]run", [summary("[b]x", 0.5)], ["[b]x"], "0.1", "0"))
    text = rendered(summary_table(run))
    assert "[red]run" in text
    assert "[b]x" in text


# ---- partitions


def test_partition_rows_have_size_classes_and_counts() -> None:
    lines = rendered(partition_table([[5, 0, 7], [0, 1, 0]])).splitlines()
    assert ["0", "12", "2", "5", "·", "7"] in [line.split() for line in lines]
    assert ["1", "1", "1", "·", "1", "·"] in [line.split() for line in lines]


def test_a_partition_of_ten_classes_and_large_counts_fits_80_columns() -> None:
    text = rendered(partition_table(np.full((40, 10), 6000).tolist()))
    assert "…" not in text
    assert sum(line.split()[3:] == ["6000"] * 10 for line in text.splitlines()) == 40


def test_beyond_40_clients_and_ten_classes_what_is_left_out_is_said() -> None:
    counts = np.zeros((100, 12), int)
    counts[:, [1, 3, 5, 7, 11]] = [10, 40, 30, 20, 50]
    text = rendered(partition_table(counts.tolist()))
    rows = [line for line in text.splitlines() if "11: 50, 3: 40, 5: 30, 7: 20 and 1 more" in line]
    assert len(rows) == 40
    assert "60 are left out" in " ".join(text.split())


@pytest.mark.parametrize(("form", "magic"), [("svg", b"<svg "), ("png", b"\x89PNG")])
def test_a_partition_picture_is_the_same_bytes_each_time(form: str, magic: bytes) -> None:
    first, second = (draw_partition([[5, 0], [1, 9]], "α = 0.1", form) for _ in range(2))
    assert first.startswith(magic)
    assert first == second
