"""The `fedwsa` command, in this process: what it writes; what is wrong is said in a line, and nothing written."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import require_fashion_mnist
from rich.console import Console

from clients.federation import federation
from experiments import cli, display, run
from experiments.results import read_run
from fedwsa import config, files
from fedwsa.config import Config
from fedwsa.data import fashion_mnist
from fedwsa.errors import RunError
from fedwsa.run_folder import claim, sha256
from partitions import heterogeneity

SMALL = (
    "--engine=inprocess",
    "--num-clients=6",
    "--set=cohort=3",
    "--set=evaluation-cohort=3",
    "--set=local-epochs=1",
    "--rounds=2",
)
STRATEGIES = ("fedavg", "fedavg-wsa", "np-merge")
BY_ALPHA = {"partitioner": "dirichlet", "alpha": 0.1, "seed": 0}  # what a partition says of itself


@dataclass
class Outcome:
    status: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def with_report() -> None:
    """For tests that look at the report of a run, which takes most of the time of a small one."""


@pytest.fixture
def fedwsa(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Command:
    """The command as its console script runs it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
    if "with_report" not in request.fixturenames:
        monkeypatch.setattr("experiments.run.write_report", lambda folder: folder / "report.html")

    def command(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fedwsa", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return Outcome(int(ended.value.code or 0), out, err)

    return command


def models(folder: Path) -> dict[str, str]:
    return {path.parent.name: sha256(path) for path in folder.glob("*/final.safetensors")}


def first_event(folder: Path) -> dict[str, Any]:
    event: dict[str, Any] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    return event


def said(outcome: Outcome) -> list[str]:
    """The lines of a refusal, without the command's name."""
    lines = outcome.err.splitlines()
    assert all(line.startswith("fedwsa: ") for line in lines), outcome.err
    return [line.removeprefix("fedwsa: ") for line in lines]


def test_version(fedwsa: Command) -> None:
    outcome = fedwsa("version")
    assert outcome.status == 0
    assert re.fullmatch(r"fedwsa \S+\nflwr 1\.41\.\d+\ntorch \S+\nray \S+\nnumpy \S+\n", outcome.out)


def test_help_names_the_commands(fedwsa: Command) -> None:
    outcome = fedwsa("--help")
    assert outcome.status == 0
    assert all(f" {name} " in outcome.out for name in ("run", "partition", "report", "inspect", "barrier", "version"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run", "CONFIG.toml: values that differ from the defaults. .* fedwsa/config.py"),
        ("partition", "CONFIG.toml: values that differ from the defaults"),
        ("report", "FOLDER: a run folder, finished or not"),
        ("inspect", "CHECKPOINT: a model in a safetensors file"),
        ("barrier", "A, B: models of one kind in safetensors files.* CONFIG.toml: their model and data"),
    ],
)
def test_help_says_what_the_arguments_are(fedwsa: Command, command: str, words: str) -> None:
    outcome = fedwsa(command, "--help")
    assert outcome.status == 0
    assert re.search(words, " ".join(outcome.out.split()))


@pytest.mark.usefixtures("with_report")
def test_run(fedwsa: Command, tmp_path: Path) -> None:
    outcome = fedwsa("run", *SMALL, "--out=first")
    assert outcome.status == 0
    assert outcome.err == ""
    folder = tmp_path / "first"
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "config.toml",
        "metrics.jsonl",
        "partition.json",
        "report.html",
        *STRATEGIES,
    }
    summaries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["strategy"] for line in summaries] == list(STRATEGIES)
    assert {line["strategy"]: line["model_sha256"] for line in summaries} == models(folder)
    lines = outcome.out.splitlines()
    assert "\x1b" not in outcome.out
    assert lines[0] == "run folder: first"
    assert lines[-1] == "report: first/report.html"
    progress = [line for line in lines if re.fullmatch(r"\S+ round \d/2 accuracy \d+\.\d% ETA (–|\d+ s)", line)]
    assert [line.split()[:3] for line in progress] == [
        [name, "round", f"{number}/2"] for name in STRATEGIES for number in (0, 1, 2)
    ]
    assert max(map(len, lines)) <= 80
    table = [line.split()[:2] for line in lines if line.startswith(STRATEGIES)][-3:]
    assert table == [[line["strategy"], f"{100 * line['final_accuracy']:.1f}"] for line in summaries]


def test_config_of_a_run_repeats_it(fedwsa: Command, tmp_path: Path) -> None:
    fedwsa("run", *SMALL, "--set=wsa.strength=5", "--out=first")
    written = tomllib.loads((tmp_path / "first/config.toml").read_text())
    assert written.keys() == tomllib.loads(Config().to_toml()).keys()
    assert (written["wsa"]["strength"], written["rounds"], written["out-dir"]) == (5.0, 2, "")
    outcome = fedwsa("run", "first/config.toml")
    assert outcome.status == 0
    (second,) = (tmp_path / "runs").iterdir()
    assert len(models(second)) == 3
    assert models(second) == models(tmp_path / "first")
    assert (second / "config.toml").read_bytes() == (tmp_path / "first/config.toml").read_bytes()


def test_values_are_taken_from_defaults_file_set_and_options_in_this_order(fedwsa: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        "num_clients = 30\nrounds = 9\nseed = 4\nname = 'file'\n[wsa]\nstrength = 2\nmode = 'proximal'\n"
    )
    given = cli._config(
        tmp_path / "mine.toml", ["num-clients=40", "rounds=8", "wsa.strength=5", 'strategies=["fedavg"]'], {"rounds": 7}
    )
    assert given == Config(
        num_clients=40,
        rounds=7,
        seed=(4,),
        name="file",
        strategies=("fedavg",),
        wsa=Config().wsa.model_copy(update={"strength": 5.0, "mode": "proximal"}),
    )


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("alpha=0.1,1", "alpha", (0.1, 1.0)),
        ("alpha=[0.1, 1]", "alpha", (0.1, 1.0)),
        ("seed = 3", "seed", (3,)),
        ("strategies=fedavg,np-merge", "strategies", ("fedavg", "np-merge")),
        ("data_dir=/some/where=else", "data_dir", "/some/where=else"),
        ("name=2026-01-31", "name", "2026-01-31"),
        ('name="2026"', "name", "2026"),
    ],
)
def test_set(assignment: str, key: str, value: Any) -> None:
    assert getattr(cli._config(None, [assignment], {}), key) == value


@pytest.mark.usefixtures("with_report")
def test_several_alphas_and_seeds(fedwsa: Command, tmp_path: Path) -> None:
    outcome = fedwsa("run", *SMALL, "--alpha=0.1,1", "--seed=0,1", "--strategies=fedavg,fedavg-wsa", "--out=grid")
    assert outcome.status == 0
    folder = tmp_path / "grid"
    parts = [f"alpha-{alpha}_seed-{seed}" for alpha in ("0.1", "1") for seed in (0, 1)]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == parts
    lines = outcome.out.splitlines()
    assert "α = 1, seed 1: fedavg-wsa round 2/2 accuracy" in outcome.out
    title = next(number for number, line in enumerate(lines) if "final accuracy (%)" in line)
    header = next(line for line in lines[title:] if line.startswith("strategy"))
    assert re.match(r"strategy +α = 0.1 +α = 1 +seconds +MB up +MB down", header)
    assert all(len(line) <= 80 for line in lines)
    assert (folder / "report.html").stat().st_size > 10_000
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 8
    losses = {}  # of the model to begin with
    for part in parts:
        first, other = [first_event(folder / part / name) for name in STRATEGIES[:2]]
        assert first["metrics"] == other["metrics"]
        losses[part] = first["metrics"]["loss"]
    assert losses[parts[0]] == losses[parts[2]] != losses[parts[1]]  # the seed decides it, and α does not
    shares = [json.loads((folder / part / "partition.json").read_text())["label_counts"] for part in parts]
    assert len({json.dumps(share) for share in shares}) == 4


def test_one_folder_of_several_repeats_alone(fedwsa: Command, tmp_path: Path) -> None:
    """A federation does not depend on those before it."""
    fedwsa("run", *SMALL, "--alpha=0.1,1", "--seed=0,1", "--strategies=fedavg-wsa", "--out=grid")
    fedwsa("run", *SMALL, "--alpha=1", "--seed=1", "--strategies=fedavg-wsa", "--out=alone")
    assert models(tmp_path / "grid/alpha-1_seed-1") == models(tmp_path / "alone") != {}


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown key": (("run", "--set=cohrt=3"), r"cohrt: unknown key; did you mean cohort\? allowed are name, .*"),
    "no key": (("run", "--set==5"), r'"" = 5: the key is missing; allowed is key = value'),
    "no layer": (
        ("run", "--set=wsa.layers=nosuch*"),
        r"wsa\.layers = 'nosuch\*': matches none of the model's layers.*",
    ),
    "data dir that is none": (
        ("run", "--data=fashion-mnist", "--data-dir=/nonexist"),
        r"data-dir = /nonexist: there is no such folder",
    ),
    "data dir of digits": (("partition", "--data-dir=."), r"data-dir = \.: digits has no files of its own; allowed .*"),
    "barrier in no data dir": (
        ("barrier", "a", "b", "--data=mnist", "--data-dir=x"),
        r"data-dir = x: there is no such .*",
    ),
    "strength of no shift": (("run", "--set=shift-strength=0.5"), r"shift-strength = 0.5: without a feature-shift .*"),
    "alphas of a split without": (
        ("run", "--partitioner=iid", "--alpha=0.1,1"),
        r"alpha = \[0\.1, 1\.0\]: with partitioner 'iid' it decides nothing; allowed is one value",
    ),
    "device": (("partition", "--json=/dev/null"), r"--json /dev/null: is a device or a pipe; allowed is a file"),
    "json over picture": (("partition", "--out=a.svg", "--json=./a.svg"), r"--json a\.svg: is read, or written as .*"),
    "json over model": (("barrier", "a", "b", "--json=b"), r"--json b: is read, or written as another, by this .*"),
    "json over config": (("barrier", "a", "b", "c.toml", "--json=c.toml"), r"--json c\.toml: is read, or written .*"),
    "number as name": (("run", "--set=name=2026"), r"name = 2026: allowed is text in quotes, up to 80 letters, .*"),
    "wrong type": (("run", "--set=rounds=1.5"), r"rounds = 1.5: allowed is a whole number ≥ 1"),
    "impossible value": (("run", "--alpha=nan"), r"alpha = NaN: allowed is a finite number > 0, or a list of such, .*"),
    "no value": (("run", "--set=rounds"), r"--set rounds: allowed is key=value"),
    "section as value": (("run", "--set=wsa=3"), r"wsa = 3: allowed is a section with keys of its own"),
    "into a value": (("run", "--set=rounds=3", "--set=rounds.x=3"), r"rounds.x: rounds is given as a single value .*"),
    "too few clients": (("run", "--num-clients=3", "--set=evaluation-cohort=0"), r"cohort = 10: allowed is at most .*"),
    "missing file": (("run", "none.toml"), r"none.toml: no such config file"),
    "folder as file": (("run", "."), r"\.: cannot be read: Is a directory"),
    "unknown data": (
        ("run", "--data=mnits"),
        r"unknown data set 'mnits': did you mean mnist\? registered are cifar10, .*",
    ),
    "unknown model": (
        ("run", "--set=model=vgg"),
        r"unknown model 'vgg': did you mean vgg8\? registered are cnn, mlp, .*",
    ),
    "option of another model": (
        ("run", "--set=width=2"),
        r"width = 2.0: model 'mlp' has no such option; allowed is 1.0",
    ),
    "colour model": (
        ("run", "--set=model=torchvision.models:mobilenet_v2"),
        r"model 'torchvision.models:mobilenet_v2' takes images of 3 channels, these have 1; allowed are .*",
    ),
    "model that cannot be aligned": (
        ("run", "--set=model=resnet8"),
        r"np-merge.align = true: no plain chain of layers: .*; allowed with this model is false",
    ),
    "no initial model": (("run", "--set=initial-model=none"), r"none: cannot be read: No such file or directory"),
    "inspect nothing": (("inspect", "none"), r"none: cannot be read: No such file or directory"),
    "inspect a folder": (("inspect", "."), r"\.: cannot be read: Is a directory"),
    "inspect as pdf": (("inspect", "none", "--out=a.pdf"), r"--out a.pdf: allowed is a name that ends in .svg or .png"),
    "barrier of one": (("barrier", "none", "nothing"), r"none: cannot be read: No such file or directory"),
    "barrier as pdf": (("barrier", "a", "b", "--out=a.pdf"), r"--out a.pdf: allowed is a name that ends in .*"),
    "barrier at two": (("barrier", "a", "b", "--points=2"), r"--points 2: allowed is a whole number ≥ 3"),
    "barrier on nothing": (
        ("barrier", "a", "b", "--train-samples=0"),
        r"--train-samples 0: allowed is a whole number ≥ 1",
    ),
    "barrier of no model": (("barrier", "a", "b", "--model=x"), r"unknown model 'x': registered are cnn, .*"),
    "barrier on no data": (("barrier", "a", "b", "--data=x"), r"unknown data set 'x': .*"),
    "barrier of no key": (("barrier", "a", "b", "--set=widht=2"), r"widht: unknown key; .*"),
    "unknown shift": (("run", "--set=feature-shift=x"), r"unknown feature shift 'x': registered are contrast, .*"),
    "unknown augmentation": (("run", "--set=augmentation=x"), r"unknown augmentation 'x': registered are crop-.*"),
    "size of digits": (("run", "--set=image-size=9"), r"image-size = 9: the images of digits have one size; .*"),
    "unknown strategy": (("run", "--strategies=fedavgg"), r"unknown strategy 'fedavgg': did you mean fedavg\? .*"),
    "aligned twice": (("run", "--strategies=fedavg-wsa-wsa"), r"unknown strategy 'fedavg-wsa-wsa': did you mean .*"),
    "strategy that is none": (("run", "--strategies=os:path"), r"strategy 'os:path' does not take \(config, .*"),
    "optimizer that is none": (("run", "--set=optimizer=os:path"), r"optimizer 'os:path' does not take \(param.*"),
    "partitioner that is none": (("run", "--partitioner=os:path"), r"partitioner 'os:path' does not take \(labels.*"),
    "partition by none": (("partition", "--partitioner=os:path"), r"partitioner 'os:path' does not take \(labels.*"),
    "samples held twice": (
        ("run", "--partitioner=test_users_own:twice"),
        r"partitioner 'test_users_own:twice': sample 0 is held 20 times; allowed is once",
    ),
    "model of other classes": (
        ("run", "--set=model=test_users_own:of_seven", "--strategies=fedavg"),
        r"model 'test_users_own:of_seven' makes \(1, 7\) of 1 images; allowed is .*",
    ),
    "partition's picture nowhere": (
        ("partition", "--out=none/a.svg"),
        r"--out none/a\.svg: there is no folder none; allowed is a file in one that there is",
    ),
    "partition nowhere": (("partition", "--json=none/a.json"), r"--json none/a\.json: there is no folder none; .*"),
    "partition as a folder": (("partition", "--json=."), r"--json \.: is a folder; allowed is a file"),
    "inspect nowhere": (("inspect", "a", "--out=none/a.svg"), r"--out none/a\.svg: there is no folder none; .*"),
    "barrier nowhere": (("barrier", "a", "b", "--out=none/a.svg"), r"--out none/a\.svg: there is no folder none; .*"),
    "curves nowhere": (("barrier", "a", "b", "--json=none/a"), r"--json none/a: there is no folder none; .*"),
    "accuracy nowhere": (
        ("report", "a", "--picture=none/a.svg"),
        r"--picture none/a\.svg: there is no folder .*",
    ),
    "unknown partitioner": (("run", "--set=partitioner=x"), r"unknown partitioner 'x': registered are dirichlet, .*"),
    "path to nowhere": (("run", "--set=model=torch:nothing"), r"unknown model 'torch:nothing' \(.*\): registered .*"),
    "no such split": (
        ("run", "--set=num-clients=900"),
        r"partitioner 'dirichlet': 900 clients with min-size=2 need 1800 samples, got 1338; use a smaller min-size .*",
    ),
    "server's split": (("run", "--set=server-samples=2000"), r"server-samples = 2000: allowed is less than .*"),
    "no run to resume": (("run", "--resume=."), r"\.: no run to resume, config.toml is missing"),
    "resume and options": (("run", "--resume=.", "--rounds=3"), r"--resume takes the config of the run folder; .*"),
    "resume and set": (("run", "--resume=.", "--set=rounds=3"), r"--resume takes the config of the run folder; .*"),
    "resume and file": (("run", "my.toml", "--resume=."), r"--resume takes the config of the run folder; .*"),
    "partition of several": (("partition", "--alpha=0.1,1"), r"partition shows one federation; .*"),
    "partition as pdf": (("partition", "--out=a.pdf"), r"--out a.pdf: allowed is a name that ends in .svg or .png"),
    "partition of nothing": (("partition", "--data=x"), r"unknown data set 'x': .*"),
    "partition of no file": (("partition", "--partition=x.json"), r"x\.json: cannot be read: No such file .*"),
    "run with no file": (("run", "--partition=x.json"), r"x\.json: cannot be read: No such file .*"),
    "file and alphas": (("run", "--partition=x", "--alpha=1,2"), r"alpha = \[1.0, 2.0\]: with a partition-file .*"),
    "no groups": (("run", "--partitioner=natural"), r"partitioner 'natural': data set 'digits' has no train_.*"),
    "shards of nothing": (
        ("partition", "--partitioner=shards", "--set=shards-per-client=90"),
        r"partitioner 'shards': 20 clients with shards-per-client=90 need 1800 samples, got 1338; use fewer shards .*",
    ),
    "partition impossible": (("partition", "--num-clients=900"), r".* 900 clients with min-size=2 need 1800 .*"),
    "report of no run": (("report", "."), r"\. is not a run folder: it has no config.toml; .*"),
    "report of nothing": (("report", "none"), r"none is not a run folder: .*"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(fedwsa: Command, tmp_path: Path, case: str) -> None:
    arguments, expected = WRONG[case]
    outcome = fedwsa(*arguments)
    assert outcome.status == 2
    assert outcome.out == ""
    (line,) = said(outcome)
    assert re.fullmatch(expected, line), line
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_not_toml(fedwsa: Command, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("rounds: 3\n")
    outcome = fedwsa("run", "my.toml")
    assert outcome.status == 2
    (line,) = said(outcome)
    assert re.fullmatch(r"my.toml: not valid TOML: .*line 1, column 7.*", line)
    assert [path.name for path in tmp_path.iterdir()] == ["my.toml"]


@pytest.mark.parametrize("option", ["--bogus", "--rounds=x"])
def test_unknown_option(fedwsa: Command, tmp_path: Path, option: str) -> None:
    outcome = fedwsa("run", option)
    assert outcome.status == 2
    assert option.partition("=")[0] in outcome.err
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_wrong_is_said_at_once(fedwsa: Command, tmp_path: Path) -> None:
    names = fedwsa("run", "--strategies=a,b", "--set=model=c", "--data=d")
    assert names.status == 2
    assert [line.partition(":")[0] for line in said(names)] == [
        "unknown strategy 'a'",
        "unknown strategy 'b'",
        "unknown model 'c'",
        "unknown data set 'd'",
    ]
    values = fedwsa("run", "--rounds=0", "--set=wsa.mode=x", "--set=cohort=30")
    assert values.status == 2
    assert [line.partition(":")[0] for line in said(values)] == ["rounds = 0", 'wsa.mode = "x"', "cohort = 30"]
    assert list(tmp_path.iterdir()) == []


def test_data_that_are_not_there(fedwsa: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIR", tmp_path / "system")
    (tmp_path / "empty").mkdir()
    outcome = fedwsa("run", "--data=fashion-mnist", "--data-dir=empty")
    assert outcome.status == 2
    (line,) = said(outcome)
    assert f"looked in empty, empty/FashionMNIST/raw, {tmp_path / 'system'}; get them by `apt-get install " in line
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_folder_that_holds_a_run(fedwsa: Command, tmp_path: Path) -> None:
    fedwsa("run", *SMALL, "--strategies=fedavg", "--out=my run")
    before = {path: path.read_bytes() for path in (tmp_path / "my run").rglob("*") if path.is_file()}
    outcome = fedwsa("run", *SMALL, "--out=my run")
    assert outcome.status == 2
    assert said(outcome) == [
        "my run: holds a run already; go on with it by fedwsa run --resume 'my run', or choose another folder"
    ]
    assert {path: path.read_bytes() for path in (tmp_path / "my run").rglob("*") if path.is_file()} == before


def test_folder_that_holds_something_else(fedwsa: Command, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    outcome = fedwsa("run", *SMALL, "--out=.")
    assert outcome.status == 2
    assert said(outcome) == [".: holds other files; allowed is a folder that is empty or not yet there"]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_folder_in_use(fedwsa: Command, tmp_path: Path) -> None:
    fedwsa("run", *SMALL, "--strategies=fedavg", "--out=mine")
    release = claim(tmp_path / "mine")
    outcome = fedwsa("run", "--resume=mine")
    assert outcome.status == 2
    assert said(outcome) == ["mine: in use by another run; wait for it or choose another folder"]
    release()
    assert fedwsa("run", "--resume=mine").status == 0


def test_place_where_no_folder_can_be(fedwsa: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for option in ("--out=file", "--out=file/run", "--set=runs-dir=file"):
        outcome = fedwsa("run", *SMALL, option)
        assert outcome.status == 2
        (line,) = said(outcome)
        assert re.fullmatch(r"file.*: cannot be used as a run folder: (File exists|Not a directory)", line)


def test_finished_run_is_shown_again_and_not_run_again(
    fedwsa: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fedwsa("run", *SMALL, "--out=mine")
    before = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    monkeypatch.setattr("experiments.run.open_engine", None)
    again = fedwsa("run", "--resume=mine")
    assert again.status == 0
    assert again.out.splitlines()[1:] == first.out.splitlines()[-len(again.out.splitlines()) + 1 :]
    assert {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("lost", ["a line of the summary", "the summary", "the final model", "a strategy"])
def test_resume_makes_up_for_what_is_missing(fedwsa: Command, tmp_path: Path, lost: str) -> None:
    """As if killed after the last checkpoint, after the final model, or between two strategies."""
    fedwsa("run", *SMALL, "--out=mine")
    before, summary = models(tmp_path / "mine"), tmp_path / "mine/metrics.jsonl"
    summaries = [json.loads(line) for line in summary.read_text().splitlines()]
    if lost == "a line of the summary":
        summary.write_text("".join(summary.read_text().splitlines(keepends=True)[:-1]))
    else:
        summary.unlink()
    if lost in ("the final model", "a strategy"):
        (tmp_path / "mine/np-merge/final.safetensors").unlink()
    if lost == "a strategy":
        for path in (tmp_path / "mine/np-merge/checkpoints").iterdir():
            path.unlink()
    outcome = fedwsa("run", "--resume=mine")
    assert outcome.status == 0
    assert models(tmp_path / "mine") == before
    again = [json.loads(line) for line in summary.read_text().splitlines()]
    if lost == "a strategy":
        for line in (*again, *summaries):
            del line["seconds"]
    assert again == summaries


def stop_after(monkeypatch: pytest.MonkeyPatch, error: BaseException, writes: int) -> None:
    """`error` comes in the place of the (writes + 1)-th file that is synced as a whole."""
    real, count = os.fsync, iter(range(10**6))

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".tmp") and next(count) >= writes:
            raise error
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The final models of `SMALL`."""
    from experiments import run

    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    values: dict[str, Any] = {"engine": "inprocess", "num-clients": 6, "cohort": 3, "evaluation-cohort": 3}
    settings = config.parse({**values, "local-epochs": 1, "rounds": 2, "out-dir": str(folder)})
    run.start(settings, Console(quiet=True))
    return models(folder)


@pytest.mark.parametrize("writes", range(2, 12))
def test_run_that_stops_at_any_write_is_resumed(
    fedwsa: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str], writes: int
) -> None:
    """After config and partition: two checkpoints and a model for each of three strategies, then the summary."""
    with monkeypatch.context() as patch:
        stop_after(patch, KeyboardInterrupt(), writes)
        outcome = fedwsa("run", *SMALL, "--out=mine")
    assert outcome.status == 130
    assert said(outcome) == ["interrupted; go on with: fedwsa run --resume mine"]
    found = read_run(tmp_path / "mine").federations[0].results
    assert {name for name in STRATEGIES if found[name].summary} == models(tmp_path / "mine").keys()
    assert len(models(tmp_path / "mine")) == (writes - 2) // 3
    assert not (tmp_path / "mine/metrics.jsonl").exists()
    resumed = fedwsa("run", "--resume=mine")
    assert resumed.status == 0
    assert models(tmp_path / "mine") == undisturbed
    for name in STRATEGIES:
        events = [json.loads(line) for line in (tmp_path / "mine" / name / "metrics.jsonl").read_text().splitlines()]
        assert [(event["round"], event["phase"]) for event in events] == [
            (0, "evaluate-server"),
            *((number, phase) for number in (1, 2) for phase in ("train", "evaluate-clients", "evaluate-server")),
        ]


def test_full_disk_at_a_checkpoint(
    fedwsa: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 3)
        outcome = fedwsa("run", *SMALL, "--out=mine")
    assert outcome.status == 1
    assert said(outcome) == [
        "mine/fedavg/checkpoints/round-000002.safetensors: cannot be written: No space left on device; "
        "once this is mended, go on with: fedwsa run --resume mine"
    ]
    assert [path.name for path in (tmp_path / "mine/fedavg/checkpoints").iterdir()] == ["round-000001.safetensors"]
    assert fedwsa("run", "--resume=mine").status == 0
    assert models(tmp_path / "mine") == undisturbed


@pytest.mark.parametrize("option", ["--out", "--resume"])
def test_a_folder_that_the_system_refuses(option: str, fedwsa: Command) -> None:
    outcome = fedwsa("run", f"{option}={'a' * 300}")
    assert outcome.status == 2
    assert said(outcome)[0].endswith(": cannot be used as a run folder: File name too long")


def test_metrics_that_are_damaged_before_resume(fedwsa: Command, tmp_path: Path) -> None:
    assert fedwsa("run", *SMALL, "--strategies=fedavg", "--out=mine").status == 0
    (tmp_path / "mine/metrics.jsonl").write_text("{\n{}\n")
    outcome = fedwsa("run", "--resume=mine")
    assert outcome.status == 1
    (line,) = said(outcome)
    assert line.startswith("mine/metrics.jsonl, line 1 is not a JSON object: b'{'; remove the line or run again; once ")


def test_what_a_strategy_that_is_begun_anew_had_reached_is_forgotten(fedwsa: Command, tmp_path: Path) -> None:
    assert fedwsa("run", *SMALL, "--strategies=fedavg", "--out=mine").status == 0
    summaries, before = tmp_path / "mine/metrics.jsonl", models(tmp_path / "mine")
    first = json.loads(summaries.read_text())
    summaries.write_text(json.dumps({**first, "final_accuracy": 0.999}) + "\n")
    shutil.rmtree(tmp_path / "mine/fedavg")
    assert fedwsa("run", "--resume=mine").status == 0
    assert models(tmp_path / "mine") == before
    assert json.loads(summaries.read_text())["final_accuracy"] == first["final_accuracy"] != 0.999


@pytest.mark.parametrize(
    ("file", "content", "said_of_it"),
    [
        (
            "fedavg/metrics.jsonl",
            b"{}\n",
            r"mine/fedavg/metrics\.jsonl: \{\} is no event: it needs a round and a phase; .*",
        ),
        ("metrics.jsonl", b"{}\n", r"mine/metrics\.jsonl: a line lacks alpha, .*: \{\}; remove it"),
        (
            "partition.json",
            b"[",
            r"mine/partition\.json: not the partition of a run, which has label_counts; remove it",
        ),
        ("partition.json", b"{}", r"mine/partition\.json: not the partition of a run, .*"),
        ("config.toml", b"x = [", r"mine/config\.toml: not valid TOML: .*"),
        ("config.toml", b"\xff", r"mine/config\.toml: not a text file in UTF-8: .*"),
    ],
)
def test_damage_is_said_of_its_file(
    fedwsa: Command, tmp_path: Path, file: str, content: bytes, said_of_it: str
) -> None:
    assert fedwsa("run", *SMALL, "--strategies=fedavg", "--out=mine").status == 0
    (tmp_path / "mine" / file).write_bytes(content)
    outcome = fedwsa("report", "mine")
    assert outcome.status == 2
    (line,) = said(outcome)
    assert re.fullmatch(said_of_it, line), line


def test_what_cannot_be_read_is_said(fedwsa: Command, tmp_path: Path) -> None:
    assert fedwsa("run", *SMALL, "--strategies=fedavg", "--out=mine").status == 0
    (tmp_path / "mine/metrics.jsonl").unlink()
    (tmp_path / "mine/metrics.jsonl").mkdir()
    outcome = fedwsa("report", "mine")
    assert (outcome.status, said(outcome)) == (1, ["mine/metrics.jsonl: cannot be read: Is a directory"])


def test_each_problem_of_two_strategies_is_said_once(fedwsa: Command) -> None:
    outcome = fedwsa("run", "--strategies=nope,neither")
    assert outcome.status == 2
    assert [line.partition(":")[0] for line in said(outcome)] == [
        "unknown strategy 'nope'",
        "unknown strategy 'neither'",
    ]


@pytest.mark.process
def test_folders_of_our_names_and_a_terminal_without_unicode(tmp_path: Path) -> None:
    for name in ("partitions", "strategies", "clients", "fedwsa", "experiments"):
        (tmp_path / name).mkdir()
    (tmp_path / "strategies.py").write_text("raise ImportError('somebody else')")
    command = [Path(sys.executable).parent / "fedwsa", "partition", "--json=partitions/mine.json"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Jensen?Shannon" in done.stdout
    assert (tmp_path / "partitions/mine.json").exists()


def test_the_engines_options_reach_it(fedwsa: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def open_engine(name: str, **options: Any) -> None:
        given.update(options, name=name)
        raise RunError("enough")

    monkeypatch.setattr(run, "open_engine", open_engine)
    options = {"workers": 3, "threads-per-client": 2, "cpus-per-client": 0.5, "gpus-per-client": 0.25}
    outcome = fedwsa("run", *(f"--set={key}={value}" for key, value in options.items()), "--set=ray-address=auto")
    assert outcome.status == 1
    expected = {key.replace("-", "_"): value for key, value in options.items()}
    assert given == {**expected, "name": "ray", "ray_address": "auto", "start_here": True}


@pytest.mark.parametrize(("values", "own"), [({}, False), ({"model": "my:net"}, True), ({"strategies": "my:s"}, False)])
def test_clients_with_a_users_own_code_do_not_run_beside_the_server(values: dict[str, str], own: bool) -> None:
    assert run._brings_own_code(config.parse(values)) == own


@pytest.mark.usefixtures("with_report")
def test_full_disk_at_the_report(fedwsa: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = files.replace

    def write(path: Path, content: bytes) -> None:
        if path.name == "report.html":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "replace", write)
        outcome = fedwsa("run", *SMALL, "--strategies=fedavg", "--out=mine")
        (line,) = said(outcome)
        assert outcome.status == 1
        assert line.startswith("mine/report.html: cannot be written: No space left on device; once this is mended, ")
        again = fedwsa("report", "mine")
        assert again.status == 1
        assert said(again) == ["mine/report.html: cannot be written: No space left on device"]
    assert fedwsa("report", "mine").status == 0
    assert (tmp_path / "mine/report.html").exists()


def test_damaged_checkpoint_costs_a_round_and_not_the_run(
    fedwsa: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, KeyboardInterrupt(), 7)  # after the second checkpoint of fedavg-wsa
        fedwsa("run", *SMALL, "--out=mine")
    newest = tmp_path / "mine/fedavg-wsa/checkpoints/round-000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    outcome = fedwsa("run", "--resume=mine")
    assert outcome.status == 0
    assert models(tmp_path / "mine") == undisturbed


def test_config_changed_before_resume(fedwsa: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, KeyboardInterrupt(), 3)
        fedwsa("run", *SMALL, "--out=mine")
    path = tmp_path / "mine/config.toml"
    path.write_text(path.read_text().replace('model = "mlp"', 'model = "cnn"'))
    outcome = fedwsa("run", "--resume=mine")
    assert outcome.status == 1
    (line,) = said(outcome)
    assert line.startswith("mine/fedavg/checkpoints: of another model than cnn, [")


def test_width_changed_before_resume(fedwsa: Command, tmp_path: Path) -> None:
    fedwsa("run", *SMALL, "--strategies=fedavg", "--set=model=resnet8", "--set=width=0.25", "--out=mine")
    (tmp_path / "mine/fedavg/final.safetensors").unlink()
    path = tmp_path / "mine/config.toml"
    path.write_text(path.read_text().replace("width = 0.25", "width = 0.5"))
    outcome = fedwsa("run", "--resume=mine")
    assert outcome.status == 1
    (line,) = said(outcome)
    assert line.startswith("mine/fedavg/checkpoints: of another model than resnet8, [")


def test_run_from_a_model_in_a_file_is_repeatable(fedwsa: Command, tmp_path: Path) -> None:
    start = tmp_path / "first/fedavg/final.safetensors"
    fedwsa("run", *SMALL, "--strategies=fedavg", "--out=first")
    from_first = ("--set=initial-model=first/fedavg/final.safetensors", "--strategies=fedavg")
    assert fedwsa("run", *SMALL, *from_first, "--out=second").status == 0
    written = tomllib.loads((tmp_path / "second/config.toml").read_text())
    assert written["initial-model-sha256"] == sha256(start)
    assert fedwsa("run", "second/config.toml", "--out=third").status == 0
    assert models(tmp_path / "third") == models(tmp_path / "second") != models(tmp_path / "first")

    original = start.read_bytes()
    start.write_bytes((tmp_path / "second/fedavg/final.safetensors").read_bytes())
    (tmp_path / "third/fedavg/final.safetensors").unlink()
    for refused in (("--resume=third",), ("second/config.toml", "--out=fourth")):
        outcome = fedwsa("run", *refused)
        assert outcome.status == 2
        (line,) = said(outcome)
        assert line.startswith("first/fedavg/final.safetensors: its SHA-256 is ")
    assert not (tmp_path / "fourth").exists()
    start.write_bytes(original)
    assert fedwsa("run", "--resume=third").status == 0
    assert models(tmp_path / "third") == models(tmp_path / "second")


def test_inspect(fedwsa: Command, tmp_path: Path) -> None:
    fedwsa("run", *SMALL, "--strategies=fedavg", "--out=mine")
    outcome = fedwsa("inspect", "mine/fedavg/final.safetensors")
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line.startswith("layers.")]
    assert [row[:3] for row in rows] == [
        ["layers.0.weight", "200×64", "12,800"],
        ["layers.1.weight", "200×200", "40,000"],
        ["layers.2.weight", "10×200", "2,000"],
    ]
    assert lines[-1] == "picture: inspect.svg"
    assert (tmp_path / "inspect.svg").read_text().startswith("<svg")
    checkpoint = fedwsa("inspect", "mine/fedavg/checkpoints/round-000002.safetensors", "--out=mine.png")
    assert [line.split() for line in checkpoint.out.splitlines() if line.startswith("layers.")] == rows
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")


def test_barrier(fedwsa: Command, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        fedwsa("run", *SMALL, "--strategies=fedavg", f"--seed={seed}", f"--out={name}")
    a, b = "a/fedavg/final.safetensors", "b/fedavg/final.safetensors"
    options = ("--points=3", "--train-samples=100")
    outcome = fedwsa("barrier", a, b, "a/config.toml", *options, "--align", "--out=mine.png", "--json=mine.json")
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.strip() for line in lines[:2]] == [f"A: {a}", f"B: {b}"]
    assert lines[-2:] == ["curves: mine.json", "picture: mine.png"]
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
    curves = json.loads((tmp_path / "mine.json").read_text())["curves"]
    events = map(json.loads, (tmp_path / "a/fedavg/metrics.jsonl").read_text().splitlines())
    final = [event["metrics"] for event in events if event["phase"] == "evaluate-server"][-1]
    assert (curves[1]["loss"][0], curves[1]["accuracy"][0]) == pytest.approx((final["loss"], final["accuracy"]))
    assert [line.split()[4] for line in lines if line.startswith("aligned, test accuracy")] == [
        f"{100 * final['accuracy']:.2f}"
    ]

    assert fedwsa("barrier", a, b, *options).status == 0
    assert (tmp_path / "barrier.svg").read_text().startswith("<svg")
    misfit = fedwsa("barrier", a, b, *options, "--model=cnn", "--out=other.svg")
    assert misfit.status == 2
    (line,) = said(misfit)
    assert line.startswith(f"{a}: tensor names differ from those of model 'cnn'; missing: conv1.bias, ")
    assert line.endswith("; --model names the architecture of A and B")
    assert not (tmp_path / "other.svg").exists()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    return clock


def lines_of(shown: display.Display, clock: Clock, rounds: range, *, strategy: str, seconds: float) -> list[str]:
    """What a display says of rounds that take this long."""
    with shown.console.capture() as captured:
        for number in rounds:
            clock.now += seconds
            shown.event(strategy, {"round": number, "phase": "train", "metrics": {}})
            event = {"round": number, "phase": "evaluate-server", "metrics": {"accuracy": 0.8765}}
            shown.event(strategy, event)
    return captured.get().splitlines()


def test_time_left(clock: Clock) -> None:
    """By the mean of the rounds so far, less the first one; over all strategies."""
    shown = display.Display(config.parse({"strategies": "fedavg,np-merge", "rounds": 4}), Console(width=80))
    shown.begin(Config(), BY_ALPHA)
    assert lines_of(shown, clock, range(1, 2), strategy="fedavg", seconds=500) == [
        "fedavg round 1/4 accuracy 87.6% ETA –"
    ]
    assert lines_of(shown, clock, range(2, 5), strategy="fedavg", seconds=10) == [
        "fedavg round 2/4 accuracy 87.6% ETA 1:00 min",
        "fedavg round 3/4 accuracy 87.6% ETA 50 s",
        "fedavg round 4/4 accuracy 87.6% ETA 40 s",
    ]
    shown.finished("fedavg")
    assert lines_of(shown, clock, range(1, 5), strategy="np-merge", seconds=30) == [
        "np-merge round 1/4 accuracy 87.6% ETA 45 s",
        "np-merge round 2/4 accuracy 87.6% ETA 36 s",
        "np-merge round 3/4 accuracy 87.6% ETA 20 s",
        "np-merge round 4/4 accuracy 87.6% ETA 0 s",
    ]


def test_time_left_of_a_long_run(clock: Clock) -> None:
    shown = display.Display(config.parse({"strategies": "fedavg", "rounds": 302}), Console(width=80))
    shown.begin(Config(), BY_ALPHA)
    assert lines_of(shown, clock, range(1, 3), strategy="fedavg", seconds=60)[-1].endswith("ETA 5:00 h")
    clock.now += 3600
    assert shown.remaining() == "4:00 h"  # also between two rounds
    clock.now += 3600 * 5
    assert shown.remaining() == "0 s"


def test_time_left_after_resume(clock: Clock) -> None:
    """Rounds of an earlier start took no time of this one."""
    settings = config.parse({"strategies": "fedavg,np-merge", "rounds": 100, "seed": [3, 4]})
    shown = display.Display(settings, Console(width=80))
    shown.begin(settings.federations()[0], BY_ALPHA)
    shown.finished("fedavg")
    assert lines_of(shown, clock, range(91, 93), strategy="np-merge", seconds=2) == [
        "α = 0.1, seed 3: np-merge round 91/100 accuracy 87.6% ETA –",
        "α = 0.1, seed 3: np-merge round 92/100 accuracy 87.6% ETA 6:56 min",  # 208 rounds
    ]
    shown.begin(settings.federations()[1], BY_ALPHA)
    assert lines_of(shown, clock, range(1, 2), strategy="fedavg", seconds=2) == [
        "α = 0.1, seed 4: fedavg round 1/100 accuracy 87.6% ETA 6:54 min"
    ]


@pytest.mark.parametrize(("split", "name"), [("label_skew", "label_skew"), ("iid", "IID"), ("my:split", "my:split")])
def test_lines_of_several_seeds_name_a_split_without_alpha(split: str, name: str, clock: Clock) -> None:
    settings = config.parse({"strategies": "fedavg", "partitioner": split, "seed": [3, 4]})
    shown = display.Display(settings, Console(width=80))
    shown.begin(settings.federations()[1], {"partitioner": split, "seed": 4})
    assert lines_of(shown, clock, range(1, 2), strategy="fedavg", seconds=2)[0].startswith(f"{name}, seed 4: fedavg ")


def test_clients_that_were_left_out_are_named(clock: Clock) -> None:
    shown = display.Display(config.parse({"rounds": 2}), Console(width=40))
    shown.begin(Config(), BY_ALPHA)
    failure = "node 1003: error 2: ValueError: [oops] and what makes it longer than the width"
    with shown.console.capture() as captured:
        shown.event("fedavg", {"round": 1, "phase": "train", "metrics": {}, "failures": [failure]})
    assert captured.get() == f"fedavg round 1: left out {failure}\n"


def test_partition(fedwsa: Command, tmp_path: Path) -> None:
    outcome = fedwsa("partition", "--num-clients=6", "--out=mine.png")
    assert outcome.status == 0
    assert "\x1b" not in outcome.out
    lines = outcome.out.splitlines()
    assert lines[-2:] == ["partition: partition.json", "picture: mine.png"]
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if re.match(r" +\d", line)]
    assert [row[0] for row in rows] == [str(client) for client in range(6)]
    counts = [[0 if cell == "·" else int(cell) for cell in row[3:]] for row in rows]
    assert [sum(row) for row in counts] == [int(row[1]) for row in rows]
    assert sum(map(sum, counts)) == 1438 - 100  # digits' training split less the server's
    found = heterogeneity(counts)
    numbers = (found.total_variation, found.jensen_shannon, found.effective_classes, found.size_gini)
    names = ("total variation", "Jensen–Shannon distance", "effective classes", "Gini of the sizes")
    for name, value in zip(names, numbers, strict=True):
        assert any(re.match(rf"{name} +{value:.3f} ", line) for line in lines), name
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")


def test_partition_is_what_a_run_uses(fedwsa: Command, tmp_path: Path) -> None:
    options = ("--num-clients=6", "--alpha=0.3", "--seed=5")
    fedwsa("run", *SMALL, *options, "--strategies=fedavg", "--out=mine")
    used = json.loads((tmp_path / "mine/partition.json").read_text())["label_counts"]
    outcome = fedwsa("partition", *options)
    rows = [line.split()[3:] for line in outcome.out.splitlines() if re.match(r" +\d", line)]
    assert [[0 if cell == "·" else int(cell) for cell in row] for row in rows] == used
    assert (tmp_path / "partition.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    "config", ['strategies = ["local-only"]', 'strategies = ["krum"]', "min-replies = 5", "cohort = 20"]
)
def test_partition_takes_any_config_of_a_run(config: str, fedwsa: Command, tmp_path: Path) -> None:
    """What decides nothing about who holds what need not fit the values that the command leaves aside."""
    (tmp_path / "mine.toml").write_text(f"{config}\n")
    assert fedwsa("partition", "mine.toml").status == 0


def without_files(data_dir: Path | None) -> None:
    raise FileNotFoundError("a file of the loader's own")


@pytest.mark.parametrize("command", ["partition", "barrier"])
def test_what_a_users_loader_raises_is_not_said_of_the_picture(command: str, fedwsa: Command) -> None:
    models = ("a.safetensors", "b.safetensors") if command == "barrier" else ()
    with pytest.raises(FileNotFoundError, match="a file of the loader's own"):
        fedwsa(command, *models, "--data=test_cli:without_files")


def test_a_run_reads_a_partition_back(fedwsa: Command, tmp_path: Path) -> None:
    """A run with the file, its own copy of it too, ends as the run that makes the partition itself, bit for bit."""
    options = ("--seed=5", "--strategies=fedavg,np-merge")
    fedwsa("run", *SMALL, *options, "--alpha=0.3", "--out=itself")
    shown = fedwsa("partition", "--num-clients=6", "--alpha=0.3", "--seed=5", "--json=mine.json")
    assert (tmp_path / "mine.json").read_bytes() == (tmp_path / "itself/partition.json").read_bytes()
    assert fedwsa("run", *SMALL, *options, "--partition=mine.json", "--alpha=9", "--out=read").status == 0
    assert models(tmp_path / "read") == models(tmp_path / "itself") != {}
    assert (tmp_path / "mine.json").read_bytes() == (tmp_path / "read/partition.json").read_bytes()
    assert fedwsa("run", "read/config.toml", "--out=again").status == 0
    assert models(tmp_path / "again") == models(tmp_path / "itself")
    fedwsa("run", *SMALL, *options, "--alpha=9", "--out=other")
    assert all(models(tmp_path / "other")[name] != model for name, model in models(tmp_path / "read").items())
    again = fedwsa("partition", "--num-clients=6", "--partition=itself/partition.json")
    assert again.out.splitlines()[:-2] == shown.out.splitlines()[:-2]
    refused = fedwsa("run", *SMALL, "--num-clients=7", "--partition=mine.json", "--out=seven")
    assert (refused.status, said(refused)) == (2, ["mine.json: has 6 clients; allowed with it is num-clients = 6"])
    assert not (tmp_path / "seven").exists()


def test_a_run_does_not_go_on_with_another_partition(fedwsa: Command, tmp_path: Path) -> None:
    fedwsa("partition", "--num-clients=6", "--json=mine.json")
    fedwsa("run", *SMALL, "--partition=mine.json", "--strategies=fedavg", "--out=run")
    (tmp_path / "run/fedavg/final.safetensors").unlink()
    fedwsa("partition", "--num-clients=6", "--alpha=9", "--json=mine.json")
    federation.cache_clear()  # as in another process
    for goes_on in (["--resume=run"], ["run/config.toml", "--out=again"]):
        outcome = fedwsa("run", *goes_on)
        assert outcome.status == 2
        assert said(outcome) == [
            "mine.json: not the partition that the config means, by its partition-sha256; what a run read is in its "
            "partition.json"
        ]
    as_it_was = ["--partition=run/partition.json", "--out=again"]
    assert fedwsa("run", "run/config.toml", *as_it_was).status == 0
    assert (tmp_path / "again/partition.json").read_bytes() == (tmp_path / "run/partition.json").read_bytes()


def test_a_run_with_a_partitioner_that_knows_no_alpha(fedwsa: Command, tmp_path: Path) -> None:
    outcome = fedwsa("run", *SMALL, "--partitioner=label_skew", "--strategies=fedavg", "--out=mine")
    assert outcome.status == 0
    assert "main: label_skew, seed 0" in outcome.out
    stored = json.loads((tmp_path / "mine/partition.json").read_text())
    assert stored["made_by"] == {"partitioner": "label_skew", "classes_per_client": 2, "seed": 0}
    assert [sum(count > 0 for count in row) for row in stored["label_counts"]] == [2] * 6


def test_partition_of_a_hundred_clients(fedwsa: Command) -> None:
    require_fashion_mnist()
    outcome = fedwsa("partition", "--num-clients=100", "--data=fashion-mnist", "--alpha=0.1")
    assert outcome.status == 0
    assert "the first 40 are shown, 60 are left out" in " ".join(outcome.out.split())


@pytest.mark.usefixtures("with_report")
def test_report_again(fedwsa: Command, tmp_path: Path) -> None:
    fedwsa("run", *SMALL, "--strategies=fedavg", "--out=mine")
    report = (tmp_path / "mine/report.html").read_bytes()
    (tmp_path / "mine/report.html").unlink()
    outcome = fedwsa("report", "mine")
    assert (outcome.status, outcome.out) == (0, "report: mine/report.html\n")
    assert (tmp_path / "mine/report.html").read_bytes() == report


def test_strategy_of_the_users_own(fedwsa: Command, tmp_path: Path) -> None:
    """An import path may name a module in the current folder."""
    (tmp_path / "mine_alone.py").write_text(
        "from strategies import FedAvg\ndef build(config, holdout):\n    return FedAvg.from_config(config, holdout)\n"
    )
    outcome = fedwsa("run", *SMALL, "--strategies=fedavg,mine_alone:build", "--out=mine")
    assert outcome.status == 0
    found = models(tmp_path / "mine")
    assert found["mine_alone:build"] == found["fedavg"]
