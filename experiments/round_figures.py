"""What averaging did in each round, as SVG text in the manner of `experiments.figures`."""

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from experiments import figures
from experiments.results import Event, Run, between_clients, train_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Read = Callable[[Sequence[Event]], figures.Series]


def mean_spread(events: Sequence[Event]) -> dict[int, float]:
    """Round → mean over layers of the standard deviation of the clients' μ."""
    return {r: statistics.fmean(by.values()) for r, by in between_clients(events, "scope_mean_spread").items()}


def std_spread(events: Sequence[Event]) -> dict[int, float]:
    """Round → mean over layers of the standard deviation of the clients' σ."""
    return {r: statistics.fmean(by.values()) for r, by in between_clients(events, "scope_std_spread").items()}


def target_distance(events: Sequence[Event]) -> dict[int, float]:
    """Round → distance of the clients to the target, nats, summed over what is aligned; not where a layer has none."""
    distances = {event["round"]: event.get("target_distance") for event in events if event["phase"] == "train"}
    return {r: math.fsum(each) for r, each in distances.items() if each and None not in each}


@dataclass(frozen=True, slots=True)
class Panel:
    """One measure by round; `name` is what a sentence calls it, `missing` why there may be nothing of it in a run.

    shown: the range at whose edges values outside are drawn; None: all are drawn where they are.
    """

    title: str
    name: str
    read: Read
    meaning: str
    missing: str
    shown: tuple[float, float] | None = None


LOST_SHOWN = (-1, 2)  # of a share; a single round of −80 would make a flat line of all others
COSINE = Panel(
    "cosine between updates",
    "cosine",
    lambda events: train_metric(events, "update-cosine"),
    "between the updates of two clients of a round, over all parameters that train, mean over all pairs; 1 if all go "
    "the same way",
    "in no measured round two clients moved the model",
)
NORM = Panel(
    "norm of an update",
    "norm",
    lambda events: train_metric(events, "update-norm"),
    "length of a client's update, over all parameters that train, mean over clients",
    "no round was measured",
)
BARRIER = Panel(
    "barrier of the round (nats)",
    "barrier",
    lambda events: train_metric(events, "round-barrier"),
    "loss of the new global model less the mean loss of the clients' models that it was made of, on the samples that "
    "the server holds; above 0 averaging destroys, below 0 the average is better than its parts",
    'it takes samples that the server holds, and batch-norm = "aggregate"',
)
LOST = Panel(
    "share of the improvement lost",
    "share lost",
    lambda events: train_metric(events, "improvement-lost"),
    "the barrier as a part of what the clients gained; rounds in which that is a thousandth of the loss or less have "
    f"none, and what lies below −{-LOST_SHOWN[0]} or above {LOST_SHOWN[1]} is drawn at that edge",
    "in no measured round the clients gained more than a thousandth of the loss on the server's samples",
    LOST_SHOWN,
)
MEAN_SPREAD = Panel(
    "spread of μ",
    "spread of μ",
    mean_spread,
    "standard deviation over clients of the mean of a layer's weights, mean over layers",
    "in no round two clients sent a scope",
)
STD_SPREAD = Panel(
    "spread of σ",
    "spread of σ",
    std_spread,
    "standard deviation over clients of the width of a layer's weights, mean over layers",
    MEAN_SPREAD.missing,
)
TARGET = Panel(
    "distance to the target (nats)",
    "distance to the target",
    target_distance,
    "Σₖ pₖ KL(client k ‖ target), summed over layers, where a target was sent",
    "no target was sent, or a layer's distance to it is not defined",
)
MEASURED = (COSINE, NORM, BARRIER, LOST)  # every `measure-every` rounds; the others are of every round
PANELS = (*MEASURED, MEAN_SPREAD, STD_SPREAD, TARGET)
"""As they are drawn, with 0 in sight; see `strategies.measures` for the definitions."""

Curves = dict[str, dict[str, list[figures.Series]]]  # title of the panel → strategy → a series each seed


def read_curves(run: Run, alpha: float) -> Curves:
    """What the run's events at this α have; panels of which they have nothing are left out."""
    curves = {
        panel.title: {name: [panel.read(r.events) for r in run.results(alpha, name)] for name in run.strategies}
        for panel in PANELS
    }
    return {title: by for title, by in curves.items() if any(series for group in by.values() for series in group)}


def averaging_figure(run: Run, alpha: float) -> str | None:
    """A panel for each measure that the run's events at this α have, a line a strategy; None if there is none."""
    if not (shown := read_curves(run, alpha)):
        return None
    with figures.style():
        figure, panels = _panels(len(shown))
        lines: dict[str, Line2D] = {}
        for axes, panel in zip(panels, [each for each in PANELS if each.title in shown], strict=True):
            for index, (name, seeds) in enumerate(shown[panel.title].items()):
                figures.draw_seeds(axes, seeds, index, name, lines)
            _show_zero(axes)
            if panel.shown:
                _keep_within(axes, *panel.shown)
            axes.set_title(panel.title if len(run.alphas) == 1 else f"{panel.title}, {run.split(alpha)}")
            axes.set_xlabel("round")
        figures.legend(figure, lines, run)
        return figures.svg(figure)


def shown_panels(run: Run) -> list[Panel]:
    """Those that a figure of the run has, at any α."""
    shown = {title for alpha in run.alphas for title in read_curves(run, alpha)}
    return [panel for panel in PANELS if panel.title in shown]


def missing_panels(run: Run) -> dict[str, list[str]]:
    """Why a figure of the run lacks a panel → the names of these panels, with the split if another figure has them."""
    shown = {alpha: titles for alpha in run.alphas if (titles := set(read_curves(run, alpha)))}
    missing: dict[str, list[str]] = {}
    for panel in PANELS:
        without = [alpha for alpha, titles in shown.items() if panel.title not in titles]
        everywhere = len(without) == len(shown)
        for alpha in without[:1] if everywhere else without:
            name = panel.name if everywhere else f"{panel.name} at {run.split(alpha)}"
            missing.setdefault(_why_missing(panel, shown[alpha], run), []).append(name)
    return missing


def _why_missing(panel: Panel, shown: Collection[str], run: Run) -> str:
    if panel in MEASURED and NORM.title not in shown:
        return f"{NORM.missing}, as measure-every is {run.config.get('measure-every', 0)}"
    return (BARRIER if panel is LOST and BARRIER.title not in shown else panel).missing


def _show_zero(axes: "Axes") -> None:
    """As the bottom of the panel where nothing lies below it, else as a line."""
    if axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)
    else:
        axes.axhline(0, color=figures.MUTED, linewidth=0.8)


def _keep_within(axes: "Axes", low: float, high: float) -> None:
    """Draw lines that leave this range at its edge, a little of which is left free; bands are cut off there."""
    for line in axes.lines:
        line.set_ydata(np.clip(line.get_ydata(), low, high))
    bottom, top = axes.get_ylim()
    free = 0.03 * (high - low)
    axes.set_ylim(max(bottom, low - free), min(top, high + free))


def _panels(number: int) -> "tuple[Figure, list[Axes]]":
    """So many, two in a row, over the same rounds, with room for a legend above."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = (number + 1) // 2
    figure = Figure(figsize=(figures.WIDTH, 2.4 * rows + 0.35), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False, sharex=True)
    panels[0, 0].xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    for axes in panels.flat[number:]:
        axes.remove()
    for axes in panels.flat[:number]:
        axes.xaxis.set_tick_params(labelbottom=True)
    return figure, list(panels.flat[:number])
