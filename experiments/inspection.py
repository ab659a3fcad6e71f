"""The weight scopes of one model, as numbers and as a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

from experiments import figures
from experiments.table import NONE, Cells
from fedwsa.scope import is_layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PANELS = 60
COLUMNS = 4
SHOWN_STDS = 4.0  # to both sides of the mean
BINS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer's weights as one sample: its scope, and how far from a Gaussian it is.

    weights: float64 [n]. mean, std: population's, unitless. kurtosis: excess, m₄/σ⁴ − 3; 0 of a Gaussian, −1.2 of a
    uniform distribution. distance: Kolmogorov and Smirnov's, sup |F_n − Φ((w − μ)/σ)| in [0, 1]; that of n draws from
    a Gaussian is about 0.6/√n, of a uniform distribution 0.057. NaN both where σ is 0 or something is not finite.
    """

    name: str
    shape: tuple[int, ...]
    weights: NDArray[np.float64]
    mean: float
    std: float
    kurtosis: float
    distance: float


def layers_of(model: Mapping[str, Tensor]) -> list[Layer]:
    """All that has a weight scope (`fedwsa.scope.is_layer`), in the model's order; ValueError if nothing has."""
    layers = [_layer(name, tensor) for name, tensor in model.items() if is_layer(name, tensor) and tensor.numel()]
    if not layers:
        raise ValueError("no layers: no floating-point tensor has two dimensions or more; nothing has a weight scope")
    return layers


def _layer(name: str, tensor: Tensor) -> Layer:
    weights = tensor.double().reshape(-1).numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        mean, std = float(weights.mean()), float(weights.std())
    kurtosis = distance = math.nan
    if 0 < std < math.inf and weights.min() < weights.max():  # rounding can give a constant layer some σ
        standard = np.sort((weights - mean) / std)
        kurtosis = float((standard**4).mean()) - 3
        below, steps = ndtr(standard), np.arange(len(standard) + 1) / len(standard)
        distance = float(max((steps[1:] - below).max(), (below - steps[:-1]).max()))
    return Layer(name, tuple(tensor.shape), weights, mean, std, kurtosis, distance)


def layer_cells(layers: Sequence[Layer], title: str) -> Cells:
    """A row a layer."""
    rows = [
        (
            layer.name,
            "×".join(map(str, layer.shape)),
            f"{len(layer.weights):,}",
            _number(layer.mean, ".2e"),
            _number(layer.std, ".4f"),
            _number(layer.kurtosis, ".2f"),
            _number(layer.distance, ".4f"),
        )
        for layer in layers
    ]
    note = (
        "μ, σ: the layer's weight scope. Excess kurtosis is 0 for a Gaussian and −1.2 for a uniform distribution. KS: "
        "largest difference between the weights' distribution function and the Gaussian's with the same μ and σ, "
        "0 to 1; n draws from a Gaussian give about 0.6/√n."
    )
    return Cells(title, ("layer", "shape", "n", "μ", "σ", "excess kurtosis", "KS"), tuple(rows), note)


def _number(value: float, form: str) -> str:
    return f"{value:{form}}".replace("-", "−") if math.isfinite(value) else NONE


def draw_layers(layers: Sequence[Layer], title: str, form: str) -> bytes:
    """A histogram of each layer's weights with the Gaussian of its scope, as a whole file; form: "svg" or "png".

    A panel reaches four σ to both sides; of more than 60 layers the first 60 are drawn.
    """
    drawn = layers[:MAX_PANELS]
    if left_out := len(layers) - len(drawn):
        title += f"; the first {MAX_PANELS} layers, {left_out} are left out"
    with figures.style():
        from matplotlib.figure import Figure

        columns = min(COLUMNS, len(drawn))
        rows = math.ceil(len(drawn) / columns)
        figure = Figure(figsize=(figures.WIDTH, 1.5 * rows + 0.75), layout="constrained")
        panels: NDArray[Any] = figure.subplots(rows, columns, squeeze=False)
        for axes, layer in zip(panels.flat, drawn, strict=False):
            _draw_layer(axes, layer)
        for axes in panels.flat[len(drawn) :]:
            axes.remove()
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        figure.supxlabel("weight; the line is the Gaussian with the same mean and variance", fontsize=8.5,
                         color=figures.MUTED)  # fmt: skip
        return figures.encoded(figure, form)


def _draw_layer(axes: "Axes", layer: Layer) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(layer.name, fontsize=8)
    axes.set_yticks([])
    axes.tick_params(labelsize=7.5)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    if math.isnan(layer.distance):
        axes.set_xticks([])
        axes.text(0.5, 0.5, f"no Gaussian: σ = {layer.std:g}", ha="center", color=figures.MUTED,
                  transform=axes.transAxes)  # fmt: skip
        return
    low, high = layer.mean - SHOWN_STDS * layer.std, layer.mean + SHOWN_STDS * layer.std
    bins = min(BINS, max(8, round(2 * len(layer.weights) ** 0.5)))
    counts, edges = np.histogram(layer.weights, bins, (low, high))
    density = counts / (len(layer.weights) * (edges[1] - edges[0]))
    axes.stairs(density, edges, fill=True, color="#7fb8d8")
    points = np.linspace(low, high, 200)
    gaussian = np.exp(-0.5 * ((points - layer.mean) / layer.std) ** 2) / (layer.std * math.sqrt(2 * math.pi))
    axes.plot(points, gaussian, color=figures.COLOURS[2], linewidth=1.4)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
