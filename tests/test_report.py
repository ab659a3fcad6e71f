"""The report holds what it should, stands alone, and is drawn the same twice; from run folders made up here."""

import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import cli, figures
from experiments.figures import accuracy_figure, partition_figure, scope_figure
from experiments.report import write_report
from experiments.results import read_run, summarize
from experiments.table import difference_cells, summary_cells
from fedwsa.errors import UsageError

STRATEGIES = ("fedavg", "fedavg-wsa", "np-merge")
MLP = ("f1.weight", "f2.weight", "head.weight")


def fake_run(
    folder: Path,
    *,
    name: str = "main",
    alphas: tuple[float, ...] = (0.1,),
    seeds: tuple[int, ...] = (0,),
    rounds: int = 30,
    clients: int = 20,
    layers: tuple[str, ...] = MLP,
    strategies: tuple[str, ...] = STRATEGIES,
    stopped: dict[str, int] | None = None,
    failures: dict[int, int] | None = None,
) -> Path:
    """A run folder as the runner leaves it; `stopped` maps a strategy to the round at which it was killed."""
    folder.mkdir(parents=True)
    config = {
        "name": name,
        "data": "digits",
        "strategies": list(strategies),
        "alpha": list(alphas) if len(alphas) > 1 else alphas[0],
        "seed": list(seeds) if len(seeds) > 1 else seeds[0],
        "num-clients": clients,
        "cohort": clients // 2,
        "rounds": rounds,
        "target-accuracy": 0.8,
        "server-samples": 100,
        "model": "mlp",
    }
    (folder / "config.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
    for alpha in alphas:
        for seed in seeds:
            several = len(alphas) * len(seeds) > 1
            _fake_federation(
                folder / f"alpha-{alpha:g}_seed-{seed}" if several else folder,
                (alpha, seed),
                config,
                layers,
                stopped or {},
                failures or {},
                folder / "metrics.jsonl",
            )
    return folder


def _fake_federation(
    folder: Path,
    at: tuple[float, int],
    config: dict[str, Any],
    layers: tuple[str, ...],
    stopped: dict[str, int],
    failures: dict[int, int],
    summaries: Path,
) -> None:
    alpha, seed = at
    rng = np.random.default_rng([seed, int(1000 * alpha)])
    shares = rng.dirichlet([alpha] * config["num-clients"], size=10).T
    partition = {
        "data": "digits",
        "alpha": alpha,
        "seed": seed,
        "partitioner": "dirichlet",
        "label_counts": np.round(134 * shares).astype(int).tolist(),
        "num_classes": 10,
        "server_samples": 100,
        "server_origin": "training split of digits, held out from every client",
        "test_samples": 360,
    }
    folder.mkdir(exist_ok=True)
    (folder / "partition.json").write_text(json.dumps(partition))
    hard = 0.12 / (alpha + 0.3)
    for index, strategy in enumerate(config["strategies"]):
        last = stopped.get(strategy, config["rounds"])
        lines = []
        for r in range(last + 1):
            reached = (0.95 - hard + 0.02 * index) * (1 - np.exp(-r / (4 + 10 * hard - index)))
            accuracy = float(np.clip(0.1 + 0.9 * reached + rng.normal(0, 0.15 * hard / (1 + 0.1 * r)), 0, 1))
            answered = {"round": r, "num_clients": config["cohort"], "num_failed": failures.get(r, 0)}
            traffic = {"bytes_down": 3_200_000, "bytes_up": 3_200_400, "seconds": 0.2 + 0.4 * (strategy == "np-merge")}
            if r:
                level = 0.05 * hard * 0.3 ** (strategy == "fedavg-wsa") * np.exp(-r / 25)
                distance = [float(level * (1 + i / 2) * np.exp(rng.normal(0, 0.1))) for i in range(len(layers))]
                scope = {"layers": layers, "scope_distance": distance, "scope_means": [0.0] * len(layers)}
                lines.append({**answered, **traffic, **scope, "phase": "train", "metrics": {"loss": 1.0}})
                lines.append({**answered, **traffic, "phase": "evaluate-clients", "metrics": {"accuracy": accuracy}})
            evaluated = {"loss": 1 - accuracy, "accuracy": round(accuracy * 360) / 360}
            lines.append({"round": r, "phase": "evaluate-server", "metrics": evaluated, "num_examples": 360})
        (folder / strategy).mkdir()
        with (folder / strategy / "metrics.jsonl").open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        if strategy not in stopped:
            given: dict[str, Any] = {"alpha": alpha, "seed": seed, "target_accuracy": 0.8}
            given["model_sha256"] = rng.bytes(32).hex()
            with summaries.open("a") as file:
                file.write(json.dumps(asdict(summarize(folder / strategy, strategy=strategy, **given))) + "\n")


class Page(HTMLParser):
    """Tags, attributes, ids and text of a page; fails where tags do not nest."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def of(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def drawn(run_dir: Path) -> Page:
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fake_run(tmp_path_factory.mktemp("one") / "runs" / "main")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "runs" / "sweep"
    write_report(fake_run(folder, alphas=(0.1, 1.0), seeds=(0, 1), rounds=6))
    return folder


def test_the_report_has_the_numbers_of_the_terminal(one: Path, sweep: Path) -> None:
    for folder in (one, sweep):
        run = read_run(folder)
        tables = [cells for cells in (summary_cells(run), difference_cells(run)) if cells]
        shown = drawn(folder).of("td", "th")
        for cells in tables:
            assert cells.rows
            wanted = [*cells.header, *(cell for row in cells.rows for cell in row)]
            assert any(shown[i : i + len(wanted)] == wanted for i in range(len(shown)))
    assert len(tables) == 2  # the sweep has paired differences


def test_nothing_is_loaded_from_anywhere(sweep: Path) -> None:
    html = (sweep / "report.html").read_text()
    page = Page(html)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action", "data")]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not page.tags & {"script", "iframe", "link", "object", "embed", "base"}
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) == {"#"}
    assert set(re.findall(r"https?://[^\"\s]+", html)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_what_a_figure_refers_to_is_there(sweep: Path) -> None:
    html = (sweep / "report.html").read_text()
    referred = set(re.findall(r"url\(#([^)]+)\)", html)) | set(re.findall(r'href="#([^"]+)"', html))
    assert referred
    assert referred <= {value for name, value in Page(html).attributes if name == "id"}


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    name, strategy = """<script>alert("1")</script>&'$x^{""", "<b>$a_1$&\"'"
    page = page_of(fake_run(tmp_path / "run", name=name, strategies=("fedavg", strategy), rounds=2))
    assert page.of("h1") == [name]
    assert strategy in page.of("th")
    assert strategy in page.of("text")  # the legend
    assert not page.tags & {"script", "b"}


def test_drawing_again_gives_the_same_bytes_wherever_the_run_lies(one: Path, tmp_path: Path) -> None:
    first = (one / "report.html").read_bytes()
    assert write_report(one).read_bytes() == first
    elsewhere = write_report(fake_run(tmp_path / "runs" / "main"))
    assert elsewhere.read_text().replace(str(elsewhere.parent), str(one)).encode() == first
    assert sorted(path.name for path in one.iterdir() if path.is_file()) == [
        "config.toml",
        "metrics.jsonl",
        "partition.json",
        "report.html",
    ]


def test_the_report_says_what_was_run_and_how_to_repeat_it(one: Path) -> None:
    page = drawn(one)
    lead, *paragraphs = page.of("p")
    assert lead == (
        "fedavg, fedavg-wsa and np-merge on digits: 20 clients (Dirichlet partition, α = 0.1), 10 of them a round, "
        "30 rounds, model mlp, seed 0."
    )
    assert "No client failed in any round that was logged." in paragraphs
    command, config = page.of("pre")
    assert command == f"fedwsa run {one}/config.toml"
    assert config == (one / "config.toml").read_text().strip()
    assert all(s.model_sha256 in page.of("td") for name in STRATEGIES for s in read_run(one).summaries(name))


@pytest.mark.parametrize(
    ("given", "named"),
    [("mine", "mine/config.toml"), ("../here/mine", "../here/mine/config.toml"), ("a b", "'a b/config.toml'")],
)
def test_the_command_to_repeat_has_the_folder_as_it_was_given(
    given: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    command, _ = page_of(fake_run(Path(given), rounds=1)).of("pre")
    assert command == f"fedwsa run {named}"
    _, _, file = shlex.split(command)
    assert Path(file).is_file()


def test_one_is_no_plural(tmp_path: Path) -> None:
    lead, *_ = page_of(fake_run(tmp_path / "run", strategies=("fedavg",), clients=1, rounds=1)).of("p")
    assert lead == (
        "fedavg on digits: 1 client (Dirichlet partition, α = 0.1), 0 of them a round, 1 round, model mlp, seed 0."
    )


@pytest.mark.parametrize("name", ["central", "central-wsa", "local-only", "np-merge"])
def test_what_is_trained_otherwise_than_by_cohorts_is_said(name: str, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", strategies=("fedavg", name), seeds=(0, 1), rounds=1)
    page = " ".join(page_of(folder).of("p")).replace("\n", " ")
    central = name.startswith("central")
    every = "every strategy but central met" if central else "every strategy met"
    assert f"Beyond that, {every} the same partition, the same initial model and the same cohorts." in page
    assert (
        "central began with the same model and trained on the samples of all clients in one place" in page
    ) == central
    assert ("With local-only nothing is combined" in page) == (name == "local-only")
    assert ("same cohorts, of which central has none." in page) == central
    for note in (page, summary_cells(read_run(folder)).note):
        assert ("central trains on all clients' samples in one place and has no cohort." in note) == central


def test_a_picture_of_another_form_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", rounds=1)
    with pytest.raises(UsageError, match=r"^--picture .*/x\.png: allowed is a name that ends in \.svg$"):
        cli.report(folder, tmp_path / "x.png")
    assert not (folder / "report.html").exists()
    cli.report(folder, tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('partitioner = "iid"\n', "IID partition"),
        ('partitioner = "shards"\n', "partition shards"),
        ('partition-file = "somewhere/mine.json"\n', "partition mine.json"),
    ],
)
def test_alpha_is_not_named_where_it_plays_no_part(tmp_path: Path, lines: str, said: str) -> None:
    folder = fake_run(tmp_path / "run", rounds=2, failures={1: 1})
    with (folder / "config.toml").open("a") as file:
        file.write(lines)
    page = page_of(folder)
    assert f"20 clients ({said}), 10 of them" in page.of("p")[0]
    assert "α" not in "".join(text for _, text in page.texts)


def test_the_servers_samples_are_accounted_for(one: Path, tmp_path: Path) -> None:
    def given(page: Page) -> str:
        return " ".join(next(text for text in page.of("p") if "labelled samples" in text).split())

    with_np_merge = given(drawn(one))
    assert "100 labelled samples (origin: training split of digits, held out from every client)" in with_np_merge
    assert "No client trains on them" in with_np_merge
    assert "plain FedAvg needs no such data" in with_np_merge
    assert "NP-Merge was therefore given labelled data that the others never saw." in with_np_merge
    without = given(page_of(fake_run(tmp_path / "run", strategies=("fedavg", "fedavg-wsa"), rounds=2)))
    assert without.endswith("NP-Merge is not part of this run, and no barrier was measured: nothing of ours used them.")


def test_failures_are_listed(tmp_path: Path) -> None:
    page = page_of(fake_run(tmp_path / "run", strategies=("fedavg",), rounds=6, failures={2: 1, 5: 2}))
    assert "6 client replies are missing, were errors or were refused." in page.of("p")
    cells = page.of("td")
    assert [cells[i + 1 : i + 3] for i, cell in enumerate(cells) if cell == "training"] == [["3", "2, 5"]]
    assert [cells[i + 1 : i + 3] for i, cell in enumerate(cells) if cell == "evaluation on clients"] == [["3", "2, 5"]]


def test_a_run_that_was_stopped_is_shown_as_not_finished(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", stopped={"np-merge": 4}, rounds=9)
    with (folder / "np-merge" / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "phase": "tra')
    page = page_of(folder)
    assert page.of("li") == ["np-merge: round 4 of 9"]
    assert "not finished" in page.of("td")
    assert "np-merge (not finished)" in page.of("text")
    assert "fedavg (not finished)" not in page.of("text")


def test_a_run_that_has_only_a_config_has_a_report(one: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes((one / "config.toml").read_bytes())
    page = page_of(tmp_path)
    assert page.of("li") == [f"{name}: round none of 30" for name in STRATEGIES]
    assert {"No evaluation yet.", "In no round two clients sent a scope.", "No partition was drawn yet."} <= set(
        page.of("p")
    )
    assert "svg" not in page.tags


# ---- figures


def svg_texts(svg: str | None) -> list[str]:
    assert svg is not None
    return Page(svg).of("text")


def test_accuracy_has_a_panel_an_alpha_and_names_the_target(sweep: Path) -> None:
    texts = svg_texts(accuracy_figure(read_run(sweep)))
    assert {"α = 0.1", "α = 1", "target 80 %", *STRATEGIES} <= set(texts)
    assert texts.count("round") == 2


def drawn_line(*seeds: figures.Series) -> tuple[list[list[float]], list[tuple[float, ...]]]:
    """Points of the line, and the corners of each band, (left, bottom, right, top)."""
    axes = Figure().subplots()
    lines: dict[str, Any] = {}
    figures.draw_seeds(axes, seeds, 1, "wsa", lines)
    bands = [path.get_extents().extents for band in axes.collections for path in band.get_paths()]
    return lines["wsa"].get_xydata().tolist(), [tuple(corners.tolist()) for corners in bands]


def test_a_line_is_at_each_round_the_mean_over_the_seeds_that_have_a_value_there() -> None:
    points, bands = drawn_line({0: 0.0, 1: 10.0, 4: 20.0}, {0: 4.0, 1: 30.0, 2: math.nan}, {}, {2: 7.0})
    assert points == [[0.0, 2.0], [1.0, 20.0], [2.0, 7.0], [4.0, 20.0]]
    assert bands == [(0.0, 0.0, 4.0, 30.0)]


def test_a_line_has_a_gap_where_no_seed_has_a_finite_value() -> None:
    points, bands = drawn_line({0: 0.0, 1: 1.0, 2: math.nan, 3: 3.0, 4: 5.0}, {0: 2.0, 2: math.inf, 3: 5.0})
    assert np.array(points) == pytest.approx(np.array([[0, 1], [1, 1], [2, math.nan], [3, 4], [4, 5]]), nan_ok=True)
    assert bands == [(0.0, 0.0, 1.0, 2.0), (3.0, 3.0, 4.0, 5.0)]


def test_the_page_says_of_which_seeds_a_line_is_the_mean(one: Path, sweep: Path) -> None:
    words = "at each round the mean over the seeds that have a value there"
    assert [words in " ".join(drawn(folder).of("figcaption")) for folder in (one, sweep)] == [False, True]


@pytest.mark.parametrize("num_layers", [3, 9])
def test_scope_names_every_layer_and_every_strategy(num_layers: int, tmp_path: Path) -> None:
    layers = tuple(f"block{i}.weight" for i in range(num_layers))
    texts = svg_texts(scope_figure(read_run(fake_run(tmp_path / "run", layers=layers, rounds=3))))
    assert {"scope distance (nats)", *layers, *STRATEGIES} <= set(texts)


def test_a_map_of_many_layers_is_the_mean_over_the_seeds_that_have_a_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = tuple(f"w{i}" for i in range(7))
    folder = fake_run(tmp_path / "run", seeds=(0, 1), strategies=("fedavg",), rounds=1)
    for seed, first in enumerate([None, 3.0]):
        event = {"round": 1, "phase": "train", "metrics": {}, "layers": layers}
        event["scope_distance"] = [first, None, *(1.0 + 2 * seed for _ in layers[2:])]
        (folder / f"alpha-0.1_seed-{seed}" / "fedavg" / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "svg", lambda figure: drawn.append(figure) or "")
    scope_figure(read_run(folder))
    (image,) = drawn[0].axes[0].images
    cells = np.ma.filled(image.get_array(), math.nan)
    assert cells.ravel().tolist() == pytest.approx([3.0, math.nan, *[2.0] * 5], nan_ok=True)


def test_without_scopes_there_is_no_scope_figure(tmp_path: Path) -> None:
    assert scope_figure(read_run(fake_run(tmp_path / "run", layers=(), rounds=2))) is None


def test_scopes_that_all_agree_are_drawn_although_zero_has_no_logarithm(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", strategies=("fedavg",), rounds=2)
    log = folder / "fedavg" / "metrics.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    for layers in (3, 8):
        scope = {"layers": [f"w{i}" for i in range(layers)], "scope_distance": [0.0] * layers}
        log.write_text("".join(json.dumps(e | scope if e["phase"] == "train" else e) + "\n" for e in events))
        assert "w0" in svg_texts(scope_figure(read_run(folder)))


@pytest.mark.parametrize("clients", [3, 100])
def test_every_count_and_every_size_is_written(clients: int) -> None:
    counts = np.random.default_rng(0).integers(0, 3, (clients, 7)) * 1000
    texts = svg_texts(partition_figure(counts.tolist(), "α = 0.1"))
    written = [int(text) for text in texts if text.isdecimal() and len(text) > 3]  # not those of clients and classes
    assert sorted(written) == sorted([*counts[counts > 0], *counts.sum(1)[counts.sum(1) > 0]])


def test_more_clients_than_can_be_written_have_a_scale_instead() -> None:
    counts = np.full((300, 2), 7)
    counts[5, 1] = 1234
    texts = svg_texts(partition_figure(counts.tolist(), "many"))
    assert "class (full colour: 1,234)" in texts
    assert texts.count("7") == 0


@pytest.mark.parametrize("counts", [[], [[]], [1, 2]])
def test_counts_of_another_shape_are_refused(counts: Any) -> None:
    with pytest.raises(ValueError, match=r"\[clients\]\[classes\]"):
        partition_figure(counts, "none")


@pytest.mark.process
def test_a_report_needs_no_torch(one: Path) -> None:
    code = (
        "import sys, pathlib, experiments.report as report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "report.write_report(pathlib.Path(sys.argv[1]))\n"
        "assert not {'torch', 'flwr', 'ray', 'matplotlib.pyplot'} & set(sys.modules)\n"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(one)], cwd=root, check=True, timeout=100)
