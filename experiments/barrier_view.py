"""Loss and accuracy on the straight line between two models: measured, as numbers and as a picture."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from experiments import figures
from experiments.table import Cells
from fedwsa import data, merging, models, weights
from fedwsa.config import Config
from fedwsa.evaluation import BATCH, evaluate
from fedwsa.seeding import generator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAIN, ALIGNED = "plain", "aligned"  # B as it is, or with its hidden units permuted towards A's
SAME_LOSS = 1e-3  # relative, of a permuted network: rounding, since sums run in another order

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Curve:
    """One split along one path: losses in nats a sample, accuracies in [0, 1], one a point."""

    path: str
    split: str
    points: list[float]
    losses: list[float]
    accuracies: list[float]

    def barriers(self) -> dict[str, dict[str, merging.Barrier]]:
        """Of the loss in nats and of the accuracy as a share of the samples, each over both baselines."""
        return {
            "loss": {"line": merging.barrier(self.points, self.losses),
                     "mean": merging.barrier(self.points, self.losses, "mean")},
            "accuracy": {"line": merging.accuracy_drop(self.points, self.accuracies),
                         "mean": merging.accuracy_drop(self.points, self.accuracies, "mean")},
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models and the curves between them.

    recalibrated: whether BatchNorm's statistics were estimated anew at every point; False without BatchNorm.
    """

    a: Path
    b: Path
    model: str
    data: str
    train_samples: int
    test_samples: int
    recalibrated: bool
    curves: list[Curve]


def compare(
    a: Path, b: Path, config: Config, *, points: int, train_samples: int, align: bool, recalibrated: bool
) -> Comparison:
    """Evaluate (1 − t) A + t B at `points` values of t, on a part of the training split and on the test split.

    The part is drawn from each class in proportion to its size, by the config's seed; it is all of the split if that is
    smaller. With `recalibrated`, BatchNorm's statistics are those of this part at every point, the ends included.
    Raises ValueError, one line, for files that do not fit the config's model, what is no chain of layers with `align`,
    or a loss that is not finite.
    """
    dataset = data.of_config(config)
    model = models.of_config(config, dataset.input_shape, dataset.num_classes, seed=0)
    ends = [_state(model, config.model, path) for path in (a, b)]
    paths = {PLAIN: ends[1]} | ({ALIGNED: _aligned(ends[1], ends[0])} if align else {})
    train = dataset.train_tensors(_part(dataset.train_labels, train_samples, config.seed[0]))
    splits = {"train": train, "test": dataset.test_tensors()}
    recalibrated &= any(isinstance(module, _BatchNorm) for module in model.modules())
    batches = train[0].tensor_split(math.ceil(len(train[0]) / BATCH)) if recalibrated else ()
    model = models.placed(model, torch.device("cpu"))
    curves = [c for path, end in paths.items() for c in curves_of(path, model, (ends[0], end), points, splits, batches)]
    _check_function(curves, len(splits), config.model)
    sizes = [len(labels) for _, labels in splits.values()]
    return Comparison(a, b, config.model, dataset.name, sizes[0], sizes[1], recalibrated, curves)


def _state(model: nn.Module, name: str, path: Path) -> State:
    """The file's tensors in the model's order, which alignment reads, and in its types."""
    weights.fill(model, name, weights.read(path), str(path), "--model names the architecture of A and B")
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def _aligned(b: State, a: State) -> State:
    try:
        groups = merging.chain_permutations(a)
    except ValueError as error:
        reason = str(error).partition(";")[0]
        raise ValueError(f"--align: {reason}; allowed with this model is to leave it out") from error
    return merging.align(b, a, groups)


def _part(labels: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    if size >= len(labels):
        return np.arange(len(labels))
    return data.server_split(labels, size, generator(seed, "barrier"))[0]


def curves_of(
    path: str,
    model: nn.Module,
    ends: tuple[State, State],
    points: int,
    splits: Mapping[str, tuple[Tensor, Tensor]],
    batches: Sequence[Tensor],
) -> list[Curve]:
    """A curve a split, on the line between two models of the module's architecture.

    batches: of images, by which BatchNorm's statistics are estimated anew at every place; none: they are interpolated.
    Raises ValueError for a loss that is not finite.
    """
    places = [index / (points - 1) for index in range(points)]
    curves = [Curve(path, split, places, [], []) for split in splits]
    for t in places:
        model.load_state_dict(merging.interpolate(*ends, t))
        if batches:
            merging.recalibrate(model, batches)
        for curve, (images, labels) in zip(curves, splits.values(), strict=True):
            loss, accuracy = evaluate(model, images, labels)
            curve.losses.append(loss)
            curve.accuracies.append(accuracy)
    for curve in curves:
        if odd := [t for t, loss in zip(places, curve.losses, strict=True) if not math.isfinite(loss)]:
            raise ValueError(f"the {curve.split} loss is not finite at t = {odd[0]:g}; 0 is A, 1 is B")
    return curves


def _check_function(curves: Sequence[Curve], splits: int, model: str) -> None:
    """Shapes alone cannot tell a chain from a network with shortcuts; the permuted B's loss can."""
    for plain, aligned in zip(curves[:splits], curves[splits:], strict=False):
        if not math.isclose(plain.losses[-1], aligned.losses[-1], rel_tol=SAME_LOSS, abs_tol=SAME_LOSS):
            raise ValueError(
                f"--align: model {model!r} is no plain chain of layers: with its hidden units permuted it computes "
                "something else; allowed with this model is to leave it out"
            )


def barrier_cells(found: Comparison) -> Cells:
    """A row for the loss and one for the accuracy of each curve."""
    several = len({curve.path for curve in found.curves}) > 1
    rows = []
    for curve in found.curves:
        name = f"{curve.path}, {curve.split}" if several else curve.split
        barriers = curve.barriers()
        for what, unit, values, factor, form in (
            ("loss", "nats", curve.losses, 1, ".4f"),
            ("accuracy", "%", curve.accuracies, 100, ".2f"),
        ):
            over = [_height_and_place(f"{factor * each.height:{form}}", each.t) for each in barriers[what].values()]
            row = [f"{factor * value:{form}}" for value in (values[0], values[-1])]
            rows.append((f"{name} {what} ({unit})", *row, *over[0], *over[1]))
    statistics = " BatchNorm's statistics are estimated anew at every t." if found.recalibrated else ""
    note = (
        f"{found.model} on {found.data}: {found.train_samples:,} training and {found.test_samples:,} test samples. "
        "Barrier: how far loss rises (accuracy falls) on the line between A and B, at most, over the straight line "
        "between its two values; over the mean: over the mean of the two. At t: where, A being 0 and B 1." + statistics
    )
    header = ("", "A", "B", "barrier", "at t", "over the mean", "at t")
    return Cells(f"A: {found.a}\nB: {found.b}", header, tuple(rows), note)


def _height_and_place(height: str, t: float) -> tuple[str, str]:
    """What is 0 is so everywhere."""
    return height, f"{t:.3g}" if float(height) else "–"


def to_json(found: Comparison) -> bytes:
    """Everything measured; losses in nats a sample, accuracies and their drops as shares of the samples."""
    curves = [
        {
            "path": curve.path,
            "split": curve.split,
            "points": curve.points,
            "loss": curve.losses,
            "accuracy": curve.accuracies,
            "barriers": {
                what: {baseline: each._asdict() for baseline, each in over.items()}
                for what, over in curve.barriers().items()
            },
        }
        for curve in found.curves
    ]
    content: dict[str, Any] = {
        "a": str(found.a),
        "b": str(found.b),
        "model": found.model,
        "data": found.data,
        "train_samples": found.train_samples,
        "test_samples": found.test_samples,
        "recalibrated": found.recalibrated,
        "curves": curves,
    }
    return json.dumps(content, indent=1).encode() + b"\n"


def draw_curves(found: Comparison, form: str) -> bytes:
    """Loss and accuracy by t, a panel each, as a whole file; form: "svg" or "png".

    A colour a path, dashes for the training part; the dotted lines are the baseline of the first barrier.
    """
    with figures.style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(figures.WIDTH, 3.9), layout="constrained")
        losses, accuracies = figure.subplots(1, 2)
        _draw(losses, found.curves, [curve.losses for curve in found.curves])
        _draw(accuracies, found.curves, [[100 * share for share in curve.accuracies] for curve in found.curves])
        losses.set_ylabel("loss (nats a sample)")
        accuracies.set_ylabel("accuracy (%)")
        for axes in (losses, accuracies):
            axes.set_xlabel("t of (1 − t) A + t B")
            axes.set_xlim(0, 1)
        figure.suptitle(f"A: {found.a}\nB: {found.b}", x=0.01, ha="left", fontsize=10)
        lines, labels = losses.get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower left", ncols=5, borderaxespad=0.2)
        return figures.encoded(figure, form)


def _draw(axes: "Axes", curves: Sequence[Curve], values: Sequence[Sequence[float]]) -> None:
    for curve, line in zip(curves, values, strict=True):
        colour = figures.COLOURS[0 if curve.path == PLAIN else 1]
        dash = figures.DASHES[0 if curve.split == "test" else 1]
        label = f"{curve.split}, B aligned to A" if curve.path == ALIGNED else curve.split
        axes.plot(curve.points, line, color=colour, linestyle=dash, linewidth=1.8, label=label, zorder=3)
    label = "between the ends"
    for curve, line in zip(curves, values, strict=True):
        if curve.path == PLAIN:  # the ends of the other paths have the same values
            axes.plot((0, 1), (line[0], line[-1]), color=figures.MUTED, linestyle=figures.DASHES[2], linewidth=1.0,
                      label=label)  # fmt: skip
            label = ""
