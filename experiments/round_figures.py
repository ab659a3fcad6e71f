"""What averaging did in each round, as SVG text in the manner of `experiments.figures`."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from experiments import figures
from experiments.results import Event, Run, layer_numbers, train_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Read = Callable[[Sequence[Event]], figures.Series]


def mean_spread(events: Sequence[Event]) -> dict[int, float]:
    """Round → mean over layers of the standard deviation of the clients' μ."""
    return {r: statistics.fmean(by.values()) for r, by in layer_numbers(events, "scope_mean_spread").items()}


def std_spread(events: Sequence[Event]) -> dict[int, float]:
    """Round → mean over layers of the standard deviation of the clients' σ."""
    return {r: statistics.fmean(by.values()) for r, by in layer_numbers(events, "scope_std_spread").items()}


def target_distance(events: Sequence[Event]) -> dict[int, float]:
    """Round → distance of the clients to the target, nats, summed over what is aligned; not where a layer has none."""
    distances = {event["round"]: event.get("target_distance") for event in events if event["phase"] == "train"}
    return {r: math.fsum(each) for r, each in distances.items() if each and None not in each}


PANELS: dict[str, Read] = {
    "cosine between updates": lambda events: train_metric(events, "update-cosine"),
    "norm of an update": lambda events: train_metric(events, "update-norm"),
    "barrier of the round (nats)": lambda events: train_metric(events, "round-barrier"),
    "share of the improvement lost": lambda events: train_metric(events, "improvement-lost"),
    "spread of μ": mean_spread,
    "spread of σ": std_spread,
    "distance to the target (nats)": target_distance,
}
"""Title → how to read it; see `strategies.measures` for the definitions. All are drawn with 0 in sight."""


def averaging_figure(run: Run, alpha: float) -> str | None:
    """A panel for each measure that the run's events at this α have, a line a strategy; None if there is none."""
    curves = {
        title: {name: [read(result.events) for result in run.results(alpha, name)] for name in run.strategies}
        for title, read in PANELS.items()
    }
    shown = {title: by for title, by in curves.items() if any(series for group in by.values() for series in group)}
    if not shown:
        return None
    with figures.style():
        figure, panels = _panels(len(shown))
        lines: dict[str, Line2D] = {}
        for axes, (title, by_name) in zip(panels, shown.items(), strict=True):
            for index, (name, seeds) in enumerate(by_name.items()):
                figures.draw_seeds(axes, seeds, index, name, lines)
            _show_zero(axes)
            axes.set_title(title if len(run.alphas) == 1 else f"{title}, {run.split(alpha)}")
            axes.set_xlabel("round")
        figures.legend(figure, lines, run)
        return figures.svg(figure)


def _show_zero(axes: "Axes") -> None:
    """As the bottom of the panel where nothing lies below it, else as a line."""
    if axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)
    else:
        axes.axhline(0, color=figures.MUTED, linewidth=0.8)


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
