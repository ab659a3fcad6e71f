"""The figures of what averaging does: each measure that the events hold, and nothing where they hold none."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from test_report import STRATEGIES, fake_run, page_of, svg_texts

from experiments import figures
from experiments.results import layer_numbers, read_run, train_metric
from experiments.round_figures import LOST, NORM, PANELS, averaging_figure, mean_spread, std_spread, target_distance

METRICS = {"update-cosine": 0.1, "update-norm": 2.0, "round-barrier": -0.5, "improvement-lost": -0.25}


def measured(folder: Path, every: int = 2, **changes: Any) -> Path:
    """The folder of a run whose training events have measures in every so many rounds, and spreads in all."""
    fake_run(folder, rounds=6, **changes)
    for path in folder.rglob("*/metrics.jsonl"):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        for event in events:
            if event["phase"] == "train":
                event["scope_std_spread"] = [0.01 * event["round"], 0.0, 0.02]
                event["scope_mean_spread"] = [0.001 * event["round"], 0.0, 0.002]
                event["target_distance"] = [0.5, 0.25, 0.125 * event["round"]]
                if every and event["round"] % every == 0:
                    event["metrics"] |= METRICS
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
    with (folder / "config.toml").open("a") as file:
        file.write(f"measure-every = {every}\n")
    return folder


def lines_of(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[list[float]]]]:
    """Panel → the points of its lines, as they are drawn."""
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "svg", lambda figure: drawn.append(figure) or "")
    averaging_figure(read_run(run_dir), 0.1)
    (figure,) = drawn
    return {axes.get_title(loc="left"): [line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes}


def test_each_line_holds_the_numbers_of_the_events(tmp_path, monkeypatch):
    panels = lines_of(measured(tmp_path / "run"), monkeypatch)
    assert list(panels) == [panel.title for panel in PANELS]
    for panel, value in zip(PANELS, METRICS.values(), strict=False):
        assert panels[panel.title][: len(STRATEGIES)] == [[[r, value] for r in (2.0, 4.0, 6.0)]] * len(STRATEGIES)
    mean_over_layers = [[r, pytest.approx((0.01 * r + 0.02) / 3)] for r in range(1, 7)]
    assert panels["spread of σ"] == [mean_over_layers] * len(STRATEGIES)
    tenth = [[r, pytest.approx((0.001 * r + 0.002) / 3)] for r in range(1, 7)]
    assert panels["spread of μ"] == [tenth] * len(STRATEGIES)
    summed = [[r, 0.75 + 0.125 * r] for r in range(1, 7)]
    assert panels["distance to the target (nats)"] == [summed] * len(STRATEGIES)


def test_zero_is_drawn_where_something_lies_below_it(tmp_path, monkeypatch):
    panels = lines_of(measured(tmp_path / "run", strategies=("fedavg",)), monkeypatch)
    assert {title: len(points) for title, points in panels.items()} == {
        "cosine between updates": 1,
        "norm of an update": 1,
        "barrier of the round (nats)": 2,
        "share of the improvement lost": 2,
        "spread of μ": 1,
        "spread of σ": 1,
        "distance to the target (nats)": 1,
    }


def test_a_share_far_outside_is_drawn_at_the_edge(tmp_path, monkeypatch):
    folder = measured(tmp_path / "run", every=1, strategies=("fedavg",))
    log, shares = folder / "fedavg" / "metrics.jsonl", [0.5, -80.0, -1.0, 0.25, 7.0, 2.0]
    events = [json.loads(line) for line in log.read_text().splitlines()]
    for event in events:
        if event["phase"] == "train":
            event["metrics"] |= {"improvement-lost": shares[event["round"] - 1], "round-barrier": -80.0}
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "svg", lambda figure: drawn.append(figure) or "")
    averaging_figure(read_run(folder), 0.1)
    by_title = {axes.get_title(loc="left"): axes for axes in drawn[0].axes}
    lost, barrier = by_title[LOST.title], by_title["barrier of the round (nats)"]
    assert lost.lines[0].get_ydata().tolist() == [0.5, -1, -1, 0.25, 2, 2]
    assert -1.2 < lost.get_ylim()[0] < -1 < 2 < lost.get_ylim()[1] < 2.2
    assert barrier.lines[0].get_ydata().tolist() == [-80] * 6  # of nothing else
    assert "what lies below −1 or above 2 is drawn at that edge" in LOST.meaning


def test_a_run_without_measures_has_what_the_scopes_say_alone(tmp_path):
    texts = svg_texts(averaging_figure(read_run(measured(tmp_path / "run", every=99)), 0.1))
    assert {"spread of μ", "spread of σ", "distance to the target (nats)", *STRATEGIES} <= set(texts)
    assert not {"cosine between updates", "norm of an update", "barrier of the round (nats)"} & set(texts)
    assert "share of the improvement lost" not in texts


def test_a_strategy_that_measured_nothing_has_no_line(tmp_path):
    folder = measured(tmp_path / "run")
    fake = fake_run(tmp_path / "other", rounds=6)
    (folder / "np-merge" / "metrics.jsonl").write_bytes((fake / "np-merge" / "metrics.jsonl").read_bytes())
    texts = svg_texts(averaging_figure(read_run(folder), 0.1))
    assert "fedavg-wsa" in texts
    assert "np-merge" not in texts


def test_an_older_run_has_no_figure_and_a_report_all_the_same(tmp_path):
    folder = fake_run(tmp_path / "run", rounds=2)
    assert averaging_figure(read_run(folder), 0.1) is None
    assert "Nothing of it was measured." in page_of(folder).of("p")


def test_the_report_has_a_figure_for_every_alpha_and_says_what_it_shows(tmp_path):
    page = page_of(measured(tmp_path / "run", alphas=(0.1, 1.0), seeds=(0, 1)))
    texts = page.of("text")
    assert {f"cosine between updates, α = {alpha}" for alpha in ("0.1", "1")} <= set(texts)
    said = " ".join(" ".join(text for _, text in page.texts).split())
    assert "All but spreads and distances are measured every 2 rounds." in said
    assert "NP-Merge has learnt on these samples" in said
    assert "Nothing of it was measured." not in said


def without(run_dir: Path, *keys: str) -> Path:
    """The run, whose events lack these numbers."""
    for path in run_dir.rglob("*/metrics.jsonl"):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        for event in events:
            for key in keys:
                event.pop(key, None)
                event["metrics"].pop(key, None)
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return run_dir


def note(run_dir: Path) -> tuple[set[str], str]:
    """What is defined under the figures of averaging, and the line on what is not drawn."""
    page = page_of(run_dir)
    defined = {name for name in page.of("strong") if name.lower() in {panel.name for panel in PANELS}}
    after = [text for (_, name), (_, text) in itertools.pairwise(page.texts) if name == "Not drawn"]
    return defined, " ".join(" ".join(after).split())


NAMES = {"Cosine", "Norm", "Barrier", "Share lost", "Spread of μ", "Spread of σ", "Distance to the target"}


@pytest.mark.parametrize("every", [1, 2])
def test_of_a_run_that_has_everything_everything_is_defined(every, tmp_path):
    folder = measured(tmp_path / "run", every=every)
    assert note(folder) == (NAMES, "")
    assert ("are measured every" in folder.joinpath("report.html").read_text()) == (every > 1)


@pytest.mark.parametrize("every", [0, 99])
def test_without_a_measured_round_only_what_scopes_say_is_defined(every, tmp_path):
    folder = measured(tmp_path / "run", every=every)
    why = f": cosine, norm, barrier, share lost (no round was measured, as measure-every is {every})."
    assert note(folder) == ({"Spread of μ", "Spread of σ", "Distance to the target"}, why)
    assert "are measured every" not in folder.joinpath("report.html").read_text()


@pytest.mark.parametrize(
    ("keys", "gone", "why"),
    [
        (["improvement-lost"], {"Share lost"}, "share lost (in no measured round the clients gained more than"),
        (
            ["improvement-lost", "round-barrier"],
            {"Share lost", "Barrier"},
            "barrier, share lost (it takes samples that the server holds, and batch-norm",
        ),
        (["update-cosine"], {"Cosine"}, "cosine (in no measured round two clients moved the model)."),
        (
            ["update-cosine", "target_distance"],
            {"Cosine", "Distance to the target"},
            "cosine (in no measured round two clients moved the model); distance to the target (no target was sent, or",
        ),
        (
            ["scope_mean_spread", "scope_std_spread"],
            {"Spread of μ", "Spread of σ"},
            "spread of μ, spread of σ (in no round two clients sent a scope).",
        ),
    ],
    ids=["no share", "no barrier", "no cosine", "two reasons", "no scope"],
)
def test_what_is_not_drawn_is_not_defined_and_the_page_says_why(keys, gone, why, tmp_path):
    defined, missing = note(without(measured(tmp_path / "run"), *keys))
    assert defined == NAMES - gone
    assert missing.startswith(f": {why}")
    assert missing.endswith(").")


def test_a_panel_that_one_alpha_lacks_is_defined_and_the_alpha_named(tmp_path):
    folder = measured(tmp_path / "run", alphas=(0.1, 1.0), seeds=(0, 1))
    for federation in folder.glob("alpha-0.1_*"):
        without(federation, "improvement-lost")
    defined, missing = note(folder)
    assert defined == NAMES
    assert missing.startswith(": share lost at α = 0.1 (in no measured round")


@pytest.mark.parametrize("strategies", [("fedavg", "np-merge"), ("fedavg", "np-merge-wsa"), ("fedavg", "local-only")])
@pytest.mark.parametrize("barrier", [True, False])
def test_the_page_says_what_the_servers_samples_were_used_for(strategies, barrier, tmp_path):
    folder = measured(tmp_path / "run", strategies=strategies, every=2 if barrier else 99)
    page = page_of(folder)
    said = " ".join(next(text for text in page.of("p") if "labelled samples" in text).split())
    learnt = strategies[1] != "local-only"
    assert ("was therefore given labelled data that the others never saw." in said) == learnt
    assert ("100, to learn its merging coefficients" in page.of("td")) == learnt
    for words, true in {
        "The barrier above is a loss on them too, whatever the strategy; no model learns from it.": learnt and barrier,
        "not part of this run: of ours only the barrier above used them, from which no": not learnt and barrier,
        "not part of this run, and no barrier was measured: nothing of ours used them.": not learnt and not barrier,
    }.items():
        assert (words in said) == true, words
    assert ("has learnt on these samples" in " ".join(page.of("p"))) == (learnt and barrier)


def test_drawing_again_gives_the_same_bytes(tmp_path):
    run = read_run(measured(tmp_path / "run"))
    assert averaging_figure(run, 0.1) == averaging_figure(run, 0.1)
    assert not re.search(r"\d{4}-\d\d-\d\d", averaging_figure(run, 0.1))


def test_what_is_read_from_events():
    events = [
        {"round": 0, "phase": "evaluate-server", "metrics": {"update-norm": 9.0}},
        {"round": 1, "phase": "train", "metrics": {}, "layers": ["a", "b"], "scope_std_spread": [1.0, 3.0]},
        {"round": 2, "phase": "train", "metrics": {"update-norm": 5.0}, "layers": ["a"], "layer_update_norms": [None]},
    ]
    assert train_metric(events, "update-norm") == {2: 5.0}
    assert std_spread(events) == {1: 2.0}
    assert layer_numbers(events, "layer_update_norms") == {2: {"a": pytest.approx(float("nan"), nan_ok=True)}}
    assert NORM.read(events) == {2: 5.0}


@pytest.mark.parametrize("read", [mean_spread, std_spread])
def test_one_client_has_no_spread(read):
    event = {"phase": "train", "metrics": {}, "layers": ["a"], "scope_mean_spread": [0.5], "scope_std_spread": [0.5]}
    events = [{**event, "round": r, "num_clients": 2, "num_failed": r % 2} for r in (1, 2)]
    assert read(events) == {2: 0.5}


def test_distance_to_the_target_is_read_whatever_is_aligned():
    def event(server_round, **lists):
        return {"round": server_round, "phase": "train", "metrics": {}, "layers": ["a", "b"], **lists}

    events = [event(1, target_distance=[0.5, 0.25]), event(2, target_distance=[0.125]), event(3)]
    events.append(event(4, target_distance=[0.5, None]))
    assert target_distance(events) == {1: 0.75, 2: 0.125}
