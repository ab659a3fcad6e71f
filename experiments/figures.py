"""The figures of a run as SVG text: the same files give the same bytes.

Matplotlib is imported when something is drawn, because the import is slow, and without pyplot, which keeps global
state. Text, lines and background have one colour each (`INK`, `MUTED`, `GRID`, `PAPER`), so that a page may exchange
them for a dark background; data colours are Okabe and Ito's, which the colour-blind can tell apart.
"""

import io
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.results import Run, scope_distances, server_accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

INK, MUTED, GRID, PAPER, BLUE = "#1f2328", "#59636e", "#dfe3e8", "#ffffff", "#0072b2"
COLOURS = (INK, BLUE, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)))
WIDTH = 9.6  # inches
MAX_LAYER_PANELS = 6
_RC: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "text.parse_math": False,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedwsa",
}

Series = Mapping[int, float]  # round → value


def accuracy_figure(run: Run) -> str | None:
    """Server accuracy by round: a panel for every α, a line for every strategy; None before the first evaluation.

    Over several seeds it is as `draw_seeds` says.
    """
    curves = {
        (alpha, name): [server_accuracy(result.events) for result in run.results(alpha, name)]
        for alpha in run.alphas
        for name in run.strategies
    }
    if not any(series for group in curves.values() for series in group):
        return None
    with style():
        columns = min(3, len(run.alphas))
        figure, panels = _grid(math.ceil(len(run.alphas) / columns), columns, 3.6 if columns == 1 else 2.7)
        lines: dict[str, Line2D] = {}
        for axes, alpha in zip(panels.flat, run.alphas, strict=False):
            for index, name in enumerate(run.strategies):
                percent = [{r: 100 * value for r, value in series.items()} for series in curves[alpha, name]]
                draw_seeds(axes, percent, index, name, lines)
            if target := run.config.get("target-accuracy"):
                axes.axhline(100 * target, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
                axes.annotate(f"target {100 * target:g} %", (0, 100 * target), (3, 3), ("axes fraction", "data"),
                              "offset points", color=MUTED, fontsize=8)  # fmt: skip
            axes.set_title(run.split(alpha))
            axes.set_xlabel("round")
        for axes in panels[:, 0]:
            axes.set_ylabel("accuracy on the test split (%)")
        for axes in panels.flat[len(run.alphas) :]:
            axes.remove()
        legend(figure, lines, run)
        return svg(figure)


def scope_figure(run: Run) -> str | None:
    """Scope distance in nats by layer and round; None if no client sent a scope.

    Few layers: a panel for each, a line for every strategy, mean and range over seeds. Many: a heat map a strategy,
    mean over seeds. A row of panels for every α; the scale is logarithmic where there is anything above zero.
    """
    distances = {
        (alpha, name): [scope_distances(result.events) for result in run.results(alpha, name)]
        for alpha in run.alphas
        for name in run.strategies
    }
    by_round = [layers for group in distances.values() for seed in group for layers in seed.values()]
    layers = list(dict.fromkeys(layer for row in by_round for layer in row))
    if not layers:
        return None
    positive = [value for row in by_round for value in row.values() if value > 0 and math.isfinite(value)]
    with style():
        if len(layers) <= MAX_LAYER_PANELS:
            return svg(_scope_lines(run, distances, layers, positive))
        return svg(_scope_maps(run, distances, layers, positive))


def partition_figure(label_counts: Sequence[Sequence[int]], title: str) -> str:
    """Who holds which labels: clients × classes with counts, and every client's number of samples."""
    return draw_partition(label_counts, title, "svg").decode()


def draw_partition(label_counts: Sequence[Sequence[int]], title: str, form: str) -> bytes:
    """The picture of `partition_figure` as a whole file; `form` is "svg" or "png"."""
    counts = np.asarray(label_counts)
    if counts.ndim != 2 or 0 in counts.shape:
        raise ValueError(f"label counts must be [clients][classes] and not empty, got shape {counts.shape}")
    with style():
        return encoded(_partition(counts, title), form)


def encoded(figure: "Figure", form: str) -> bytes:
    """A figure as a whole file; `form` is "svg" or "png"."""
    if form == "svg":
        return svg(figure).encode()
    picture = io.BytesIO()
    figure.savefig(picture, format=form, dpi=150, metadata={"Software": None})
    return picture.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """Our settings on top of Matplotlib's own defaults, whatever the user's matplotlibrc says."""
    from matplotlib.style import context

    with context(["default", _RC]):
        yield


def _grid(rows: int, columns: int, row_height: float) -> "tuple[Figure, np.ndarray[Any, Any]]":
    """Panels [rows, columns] that share both axes, with room for a legend above."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, rows * row_height + 0.35), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels[0, 0].xaxis.set_major_locator(MaxNLocator(8 if columns == 1 else 5, integer=True, steps=[1, 2, 5, 10]))
    for axes in panels.flat:
        axes.xaxis.set_tick_params(labelbottom=True)
    return figure, panels


def draw_seeds(axes: "Axes", seeds: Sequence[Series], index: int, name: str, lines: "dict[str, Line2D]") -> None:
    """By round: mean over the seeds that have a finite value there, with a band from their lowest to their highest.

    index: of the strategy, whose name the line has in `lines`; without a round there is none.
    """
    begun = [series for series in seeds if series]
    if not begun:
        return
    rounds = sorted(set().union(*begun))
    values = np.ma.masked_invalid([[series.get(r, math.nan) for r in rounds] for series in begun])
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
    width = max(1.5, 2.4 - 0.5 * index)  # a line under another, equal one can still be seen
    (lines[name],) = axes.plot(rounds, values.mean(0), color=colour, linestyle=dash, linewidth=width, zorder=3)
    if len(rounds) == 1:
        lines[name].set(marker="o", clip_on=False)
    if len(begun) > 1:
        axes.fill_between(rounds, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def legend(figure: "Figure", lines: "dict[str, Line2D]", run: Run) -> None:
    """Above the panels: the strategies that have a line, and whether they are finished."""
    names = [name for name in run.strategies if name in lines]
    ended = {name: all(f.results[name].summary for f in run.federations) for name in names}
    labels = [name if ended[name] else f"{name} (not finished)" for name in names]
    figure.legend([lines[name] for name in names], labels, loc="outside upper left", ncols=4, borderaxespad=0.2)


def _scope_lines(
    run: Run, distances: Mapping[tuple[float, str], Any], layers: list[str], positive: list[float]
) -> "Figure":
    figure, panels = _grid(len(run.alphas), len(layers), 2.6 if len(run.alphas) == 1 else 2.2)
    lines: dict[str, Line2D] = {}
    for row, alpha in zip(panels, run.alphas, strict=True):
        for axes, layer in zip(row, layers, strict=True):
            for index, name in enumerate(run.strategies):
                seeds = [{r: by.get(layer, math.nan) for r, by in seed.items()} for seed in distances[alpha, name]]
                draw_seeds(axes, seeds, index, name, lines)
            axes.set_title(layer if len(run.alphas) == 1 else f"{layer}, {run.split(alpha)}")
            axes.set_xlabel("round")
        row[0].set_ylabel("scope distance (nats)")
    if positive:
        panels[0, 0].set_yscale("log", nonpositive="mask")
        _plain_numbers(panels[0, 0].yaxis, positive)
    legend(figure, lines, run)
    return figure


def _scope_maps(
    run: Run, distances: Mapping[tuple[float, str], Any], layers: list[str], positive: list[float]
) -> "Figure":
    from matplotlib.colors import LogNorm, Normalize

    names = [name for name in run.strategies if any(any(distances[alpha, name]) for alpha in run.alphas)]
    norm = LogNorm(min(positive), max(positive)) if positive else Normalize(0, 1)
    figure, panels = _grid(len(run.alphas), len(names), max(1.8, 0.13 * len(layers) + 0.6))
    last = max(r for group in distances.values() for seed in group for r in seed)
    for row, alpha in zip(panels, run.alphas, strict=True):
        for axes, name in zip(row, names, strict=True):
            cells = np.full((len(layers), last), np.nan)
            for r in range(1, last + 1):
                for i, layer in enumerate(layers):
                    found = [seed.get(r, {}).get(layer, math.nan) for seed in distances[alpha, name]]
                    finite = list(filter(math.isfinite, found))
                    cells[i, r - 1] = statistics.fmean(finite) if finite else math.nan
            extent = (0.5, last + 0.5, len(layers) - 0.5, -0.5)
            image = axes.imshow(cells, aspect="auto", extent=extent, norm=norm, cmap="viridis", interpolation="nearest")
            axes.grid(visible=False)
            axes.set_title(name if len(run.alphas) == 1 else f"{name}, {run.split(alpha)}")
            axes.set_xlabel("round")
    panels[0, 0].set_yticks(range(len(layers)), layers, fontsize=7)
    bar = figure.colorbar(image, ax=panels, label="scope distance (nats)", fraction=0.03, pad=0.01)
    if positive:
        _plain_numbers(bar.ax.yaxis, positive)
    return figure


def _plain_numbers(axis: "Axis", shown: list[float]) -> None:
    """0.01, 0.02, 0.05, 0.1 on a logarithmic axis; decades alone where there are many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(shown) < 300 * min(shown) else (1,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _partition(counts: "np.ndarray[Any, Any]", title: str) -> "Figure":
    """One row a client, so that counts stay readable for 100 of them; the darker, the more (square-root scale)."""
    from matplotlib.colors import ListedColormap, PowerNorm, to_rgba
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    clients, classes = counts.shape
    row = 0.2 if clients <= 40 else 0.14 if clients <= 100 else max(0.02, 14 / clients)
    height = clients * row + 0.85
    figure = Figure(figsize=(WIDTH, height))
    grid = figure.add_gridspec(1, 2, width_ratios=(5, 1), wspace=0.03, left=0.065, right=0.985,
                               bottom=0.1 / height, top=1 - 0.75 / height)  # fmt: skip
    axes = figure.add_subplot(grid[0])
    bars = figure.add_subplot(grid[1], sharey=axes)
    shades = ListedColormap([to_rgba(BLUE, share) for share in np.linspace(0, 1, 256)])
    axes.imshow(counts, aspect="auto", cmap=shades, norm=PowerNorm(0.5, 0, max(1, counts.max())))
    if written := clients <= 100 and classes <= 20:
        _write_counts(axes, bars, counts, 7.5 if clients <= 40 else 6.5)
    if clients <= 100:
        bars.barh(range(clients), counts.sum(1), height=0.7, color="#7fb8d8", linewidth=0)
    else:  # one shape: thousands of bars take seconds
        edges = np.arange(clients + 1) - 0.5
        bars.stairs(counts.sum(1), edges, orientation="horizontal", fill=True, color="#7fb8d8", linewidth=0)
    figure.suptitle(title, x=0.065, y=1 - 0.08 / height, ha="left", va="top", fontsize=10)
    axes.set_ylabel("client")
    axes.yaxis.set_major_locator(MaxNLocator(20, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(20, integer=True))
    bars.xaxis.set_major_locator(MaxNLocator(2, integer=True))
    for panel, label in ((axes, "class" if written else f"class (full colour: {counts.max():,})"), (bars, "samples")):
        panel.xaxis.tick_top()
        panel.xaxis.set_label_position("top")
        panel.set_xlabel(label)
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0, labelleft=panel is axes, labeltop=panel is axes or not written)
    return figure


def _write_counts(axes: "Axes", bars: "Axes", counts: "np.ndarray[Any, Any]", size: float) -> None:
    """Each count in its cell and each client's number of samples at the end of its bar."""
    dark = counts > 0.65 * counts.max()
    for client, label in zip(*np.nonzero(counts), strict=True):
        colour = "#fefefe" if dark[client, label] else INK
        text = f"{counts[client, label]}"
        axes.text(label, client, text, ha="center", va="center_baseline", fontsize=size, color=colour)
    sizes = counts.sum(1)
    bars.set_xlim(0, max(1, 1.35 * sizes.max()))
    for client, total in enumerate(sizes):
        bars.annotate(f"{total}", (total, client), (3, 0), textcoords="offset points", va="center_baseline",
                      fontsize=size, color=MUTED)  # fmt: skip


def svg(figure: "Figure") -> str:
    """The figure as one <svg> element without prolog, metadata or the ids that would clash with another figure's."""
    picture = io.StringIO()
    figure.savefig(picture, format="svg", dpi=200, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = picture.getvalue()
    return re.sub(r' id="[A-Za-z0-9.]+_[\w.]+"', "", text[text.index("<svg") :])
