"""The curves between two models, against evaluations by hand; their table, picture and file."""

import json
import re
from io import StringIO

import numpy as np
import pytest
import torch
from federations import DIGITS
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from experiments.barrier_view import _part, barrier_cells, compare, draw_curves, to_json
from experiments.table import rich_table
from fedwsa import data, models
from fedwsa.config import Config
from fedwsa.evaluation import evaluate
from fedwsa.merging import average, recalibrate

TEST_SAMPLES = 359


class Shortcut(nn.Module):
    """Its shapes are those of a chain; its function is not."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        units = self.stem(images.flatten(1)).relu()
        return self.head(units + self.body(units).relu())


def states(name, seeds=(0, 1), gain=3.0):
    """Initial states with larger weights, so that the losses differ."""
    made = [models.build(name, *DIGITS, seed).state_dict() for seed in seeds]
    return [{key: gain * tensor if tensor.ndim > 1 else tensor.clone() for key, tensor in s.items()} for s in made]


def found(tmp_path, a, b, name="mlp", seed=0, **options):
    for path, state in (("a", a), ("b", b)):
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / path)
    chosen = {"points": 5, "train_samples": 200, "align": False, "recalibrated": True} | options
    return compare(tmp_path / "a", tmp_path / "b", Config(model=name, seed=seed), **chosen)


def permuted(state, seed=7):
    """Both hidden layers of the MLP in another order, by plain indexing."""
    first, second = (torch.randperm(200, generator=torch.Generator().manual_seed(seed + i)) for i in range(2))
    return {
        "layers.0.weight": state["layers.0.weight"][first],
        "layers.0.bias": state["layers.0.bias"][first],
        "layers.1.weight": state["layers.1.weight"][second][:, first],
        "layers.1.bias": state["layers.1.bias"][second],
        "layers.2.weight": state["layers.2.weight"][:, second],
        "layers.2.bias": state["layers.2.bias"],
    }


def test_curves_are_evaluations_of_the_models_and_their_average(tmp_path):
    a, b = states("mlp")
    train, test = found(tmp_path, a, b).curves
    assert (train.path, train.split, test.path, test.split) == ("plain", "train", "plain", "test")
    assert train.points == test.points == [0, 0.25, 0.5, 0.75, 1]
    model, digits = models.build("mlp", *DIGITS, 0), data.load("digits")
    for index, state in ((0, a), (2, average([a, b])), (4, b)):
        model.load_state_dict(state)
        assert (test.losses[index], test.accuracies[index]) == pytest.approx(evaluate(model, *digits.test_tensors()))
    assert train.losses != test.losses
    middle = test.losses[2] - (test.losses[0] + test.losses[4]) / 2
    assert test.barriers()["loss"]["line"].height >= middle
    assert test.barriers()["loss"]["mean"].height == max(test.losses) - (test.losses[0] + test.losses[4]) / 2


def test_training_samples_are_drawn_evenly_by_the_seed_or_are_all(tmp_path):
    a, b = states("mlp")
    drawn = [(200, 0), (200, 0), (100, 0), (99999, 0), (200, 1)]
    curves = [found(tmp_path, a, b, points=3, train_samples=size, seed=seed).curves[0] for size, seed in drawn]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]
    assert curves[0] != curves[4]
    model, digits = models.build("mlp", *DIGITS, 0), data.load("digits")
    model.load_state_dict(a)
    everything = evaluate(model, *digits.train_tensors(torch.arange(len(digits.train_labels)).numpy()))
    assert (curves[3].losses[0], curves[3].accuracies[0]) == pytest.approx(everything)


def test_each_class_is_drawn_by_its_share():
    labels = data.load("digits").train_labels
    shares = np.bincount(labels) / len(labels)
    for seed in range(3):
        assert np.abs(np.bincount(labels[_part(labels, 200, seed)]) - 200 * shares).max() <= 1


def test_alignment_undoes_a_permutation(tmp_path):
    (a,) = states("mlp", (0,))
    result = found(tmp_path, a, permuted(a), align=True)
    assert [(c.path, c.split) for c in result.curves] == [
        ("plain", "train"), ("plain", "test"), ("aligned", "train"), ("aligned", "test"),
    ]  # fmt: skip
    plain, aligned = result.curves[1].losses, result.curves[3].losses
    assert aligned == pytest.approx([plain[0]] * 5)
    assert plain[4] == pytest.approx(plain[0])
    assert abs(plain[2] - plain[0]) > 0.01


@pytest.mark.parametrize("recalibrated", [True, False])
def test_batch_norm_sees_the_training_samples_at_every_point(tmp_path, recalibrated):
    name = "federations:NormNet"
    a, b = states(name)
    train_size = 1 << 20
    result = found(tmp_path, a, b, name, recalibrated=recalibrated, train_samples=train_size)
    assert result.recalibrated is recalibrated
    model, digits = models.build(name, *DIGITS, 0), data.load("digits")
    images = digits.train_tensors(torch.arange(len(digits.train_labels)).numpy())[0]
    for index, state in ((0, a), (2, average([a, b])), (4, b)):
        model.load_state_dict(state)
        if recalibrated:
            half = (len(images) + 1) // 2
            recalibrate(model, [images[:half], images[half:]])
        expected = evaluate(model, *digits.test_tensors())
        assert (result.curves[1].losses[index], result.curves[1].accuracies[index]) == pytest.approx(expected)


def test_without_batch_norm_there_is_nothing_to_recalibrate(tmp_path):
    assert not found(tmp_path, *states("mlp")).recalibrated


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("federations:NormNet", r"--align: no plain chain of layers: 2\.weight .*; allowed with this model is to "),
        ("test_barrier_view:Shortcut", "--align: model 'test_barrier_view:Shortcut' is no plain chain of layers: with"),
    ],
)
def test_what_is_no_chain_is_not_aligned(tmp_path, name, message):
    with pytest.raises(ValueError, match=message) as error:
        found(tmp_path, *states(name), name, align=True)
    assert "\n" not in str(error.value)
    found(tmp_path, *states(name), name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layers.0.bias": torch.ones(3)},
            r"/b: shapes differ from those of model 'mlp': layers\.0\.bias \(3,\) .*; --model names ",
        ),
        (
            {"more": torch.ones(3)},
            "/b: tensor names differ from those of model 'mlp'; surplus: more; --model names the ",
        ),
        (
            {"layers.2.bias": torch.full((10,), torch.nan)},
            r"/b: NaN or infinite in layers\.2\.bias; allowed are finite",
        ),
        ({"layers.2.weight": torch.full((10, 200), 3e38)}, "the train loss is not finite at t = 0.25; 0 is A, 1 is B"),
    ],
)
def test_a_file_that_does_not_fit_is_said_in_a_line(tmp_path, change, message):
    a, b = states("mlp")
    with pytest.raises(ValueError, match=message):
        found(tmp_path, a, b | change)


@pytest.fixture
def both(tmp_path, monkeypatch):
    """A comparison with alignment, of files that are named as a user would."""
    monkeypatch.chdir(tmp_path)
    a, b = states("mlp")
    for path, state in (("a.safetensors", a), ("b.safetensors", permuted(b))):
        save_file(state, path)
    paths = (tmp_path / "a.safetensors").relative_to(tmp_path), (tmp_path / "b.safetensors").relative_to(tmp_path)
    return compare(*paths, Config(), points=5, train_samples=200, align=True, recalibrated=True)


def test_table(both):
    console = Console(width=80, record=True, file=StringIO())
    console.print(rich_table(barrier_cells(both)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    rows = [re.split(r"  +", line.strip()) for line in text.splitlines() if re.match(r"(plain|aligned), ", line)]
    assert [row[0] for row in rows] == [
        f"{path}, {split} {what}"
        for path in ("plain", "aligned")
        for split in ("train", "test")
        for what in ("loss (nats)", "accuracy (%)")
    ]
    curve = both.curves[3]
    (height, _), (over_mean, at) = curve.barriers()["loss"].values()
    numbers = [f"{value:.4f}" for value in (curve.losses[0], curve.losses[-1], height)]
    assert height == 0
    assert over_mean > 0
    assert rows[6][1:] == [*numbers, "–", f"{over_mean:.4f}", f"{at:.3g}"]
    assert rows[7][1] == f"{100 * curve.accuracies[0]:.2f}"
    assert f"200 training and {TEST_SAMPLES} test samples" in " ".join(text.split())
    assert "BatchNorm" not in text


def test_no_barrier_is_nowhere(tmp_path):
    model, _ = states("mlp")
    for row in barrier_cells(found(tmp_path, model, model)).rows:
        assert float(row[3]) == 0
        assert (row[4], row[6]) == ("–", "–")


def test_file_holds_all_that_was_measured(both):
    content = json.loads(to_json(both))
    assert {key: content[key] for key in content if key != "curves"} == {
        "a": "a.safetensors", "b": "b.safetensors", "model": "mlp", "data": "digits",
        "train_samples": 200, "test_samples": TEST_SAMPLES, "recalibrated": False,
    }  # fmt: skip
    for written, curve in zip(content["curves"], both.curves, strict=True):
        assert (written["path"], written["split"]) == (curve.path, curve.split)
        assert (written["points"], written["loss"], written["accuracy"]) == (
            curve.points, curve.losses, curve.accuracies,
        )  # fmt: skip
        line = curve.barriers()["accuracy"]["line"]
        assert written["barriers"]["accuracy"]["line"] == {"height": line.height, "t": line.t}


def test_picture_is_repeatable_and_names_what_it_shows(both):
    picture = draw_curves(both, "svg")
    assert picture == draw_curves(both, "svg")
    text = picture.decode()
    assert text.startswith("<svg")
    for words in ("A: a.safetensors", "B: b.safetensors", "test, B aligned to A", "loss (nats a sample)"):
        assert words in text
    assert draw_curves(both, "png").startswith(b"\x89PNG")
