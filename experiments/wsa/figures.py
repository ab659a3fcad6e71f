"""Two pictures of weight scopes: `python -m experiments.wsa.figures --out DIR`.

From a small pair of runs in `DIR/run`, FedAvg without and with alignment from the same start, which is made where it is
not there:

* `weights.svg`: histograms of the weights of the last round's clients, by layer, and the Gaussians of their scopes;
* `drift.svg`: σ of each layer, fused over the clients, by round.
"""

import argparse
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, from_numpy

import strategies
from clients.client_app import app as client_app
from experiments import figures, run
from experiments.results import Run, layer_numbers, read_run
from fedwsa import config as configuration
from fedwsa import data, messages, models
from fedwsa.arrays import pack, unpack
from fedwsa.config import Config
from fedwsa.data import DataError, fashion_mnist
from fedwsa.files import replace
from fedwsa.run_folder import CONFIG, StrategyFolder, read_checkpoint
from fedwsa.scope import is_layer, moments
from fedwsa.simulation import simulate
from fedwsa.simulation.grid import SimulationGrid
from fedwsa.simulation.states import ClientStates
from strategies.gate import Gate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 60
SHOWN = 4.5  # of the widest client's σ, to both sides; the bins go on to the last weight
VALUES: dict[str, Any] = {
    "name": "scopes",
    "strategies": ["fedavg", "fedavg-wsa"],
    "alpha": 0.1,
    "num-clients": 50,
    "cohort": 4,
    "evaluation-cohort": 0,
    "rounds": 20,
    "local-epochs": 5,
    "batch-size": 32,
    "learning-rate": 0.1,
    "init": "kaiming-normal",
    "server-samples": 0,
    "measure-every": 0,
    "wsa": {"strength": 5.0, "target": "initial"},
    "engine": "inprocess",
}

State = dict[str, Tensor]


def make(folder: Path) -> Config:
    """The pair of runs in a folder, now finished: as `VALUES` says on Fashion-MNIST or else digits, or as it began."""
    console = Console(file=StringIO())
    if (folder / CONFIG).exists():
        run.resume(folder, console)
    else:
        run.start(configuration.parse({**VALUES, "data": _data(), "out-dir": str(folder)}), console)
    return configuration.parse(configuration.read(folder / CONFIG))


def _data() -> str:
    try:
        fashion_mnist.find_files(None)
    except DataError:
        return "digits"
    return "fashion-mnist"


def clients_of(folder: Path, config: Config, name: str, server_round: int) -> list[State]:
    """The models that a round's clients sent, to the bit, in their order: each trains anew from the checkpoint before.

    folder: of the run. name: of a strategy of it that needs none of the server's samples.
    """
    before = StrategyFolder(folder / name).checkpoints / f"round-{server_round - 1:06d}.safetensors"
    checkpoint = read_checkpoint(before)
    dataset = data.of_config(config)
    model = models.of_config(config, dataset.input_shape, dataset.num_classes, seed=0)
    samples = dataset.train_tensors(np.arange(0))
    strategy = Gate(strategies.build(name, config, strategies.Holdout(model, *samples)))
    strategy.load_state(checkpoint.strategy_state)
    arrays = pack({key: checkpoint.model[key] for key in model.state_dict()})
    found: list[State] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, SimulationGrid)
        grid.keep_states(ClientStates(files=checkpoint.client_states))  # new ones are not written there
        settings = ConfigRecord({messages.STRATEGY: name})
        for reply in grid.send_and_receive(strategy.configure_train(server_round, arrays, settings, grid)):
            found.append(unpack(messages.arrays_of(reply)))

    simulate(app, client_app, config.num_clients, engine="inprocess", run_config=config.to_run_config())
    return found


def weights_figure(clients: Mapping[str, Sequence[State]]) -> str:
    """A row of panels for each layer, a panel for each strategy's clients; a colour a client."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    layers = [name for name, tensor in next(iter(clients.values()))[0].items() if is_layer(name, tensor)]
    with figures.style():
        figure = Figure(figsize=(figures.WIDTH, 2.1 * len(layers) + 0.6), layout="constrained")
        panels = figure.subplots(len(layers), len(clients), squeeze=False, sharex="row", sharey="row")
        for row, layer in zip(panels, layers, strict=True):
            weights = {name: [_flat(state[layer]) for state in states] for name, states in clients.items()}
            every = [each for several in weights.values() for each in several]
            edges = np.linspace(min(each.min() for each in every), max(each.max() for each in every), BINS + 1)
            for axes, (name, several) in zip(row, weights.items(), strict=True):
                draw_weights(axes, several, edges)
                axes.set_title(f"{name}: {layer}")
            row[0].set_ylabel("density")
            centre, reach = np.mean([each.mean() for each in every]), SHOWN * max(each.std() for each in every)
            row[0].set_xlim(centre - reach, centre + reach)
        for axes in panels[-1]:
            axes.set_xlabel("weight")
        styles = ({"linewidth": 0.8}, {"linewidth": 1.4, "linestyle": figures.DASHES[1]})
        handles = [Line2D([], [], color=figures.MUTED, **each) for each in styles]
        labels = ["a client's weights", "the Gaussian of its scope"]
        figure.legend(handles, labels, loc="outside upper left", ncols=2, borderaxespad=0.2)
        return figures.svg(figure)


def draw_weights(axes: "Axes", clients: Sequence[NDArray[np.float64]], edges: NDArray[np.float64]) -> None:
    """For each client the histogram of its weights, as a density, and the Gaussian of their mean and variance.

    edges: of bins that hold every weight.
    """
    scopes = [moments(from_numpy(weights)) for weights in clients]
    x = np.linspace(edges[0], edges[-1], 10 * BINS)
    for index, (weights, scope) in enumerate(zip(clients, scopes, strict=True)):
        colour = figures.COLOURS[1 + index % (len(figures.COLOURS) - 1)]
        density, _ = np.histogram(weights, edges, density=True)
        axes.stairs(density, edges, color=colour, linewidth=0.8, alpha=0.7)
        axes.plot(x, gaussian(x, *scope), color=colour, linewidth=1.4, linestyle=figures.DASHES[1])
    widths = [variance**0.5 for _, variance in scopes]
    axes.text(0.98, 0.95, f"σ {min(widths):.4f} to {max(widths):.4f}", transform=axes.transAxes, ha="right", va="top",
              fontsize=8, color=figures.MUTED)  # fmt: skip


def gaussian(x: NDArray[np.float64], mean: float, variance: float) -> NDArray[np.float64]:
    """Density of N(mean, variance)."""
    found: NDArray[np.float64] = np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
    return found


def _flat(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.double().reshape(-1).numpy()


def drift_figure(of: Run) -> str:
    """A panel for each layer, a line for each strategy: √ of the clients' fused variance, by round."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    (alpha,) = of.alphas
    curves = {name: [stds(result.events) for result in of.results(alpha, name)] for name in of.strategies}
    layers = list(next(iter(next(iter(curves.values()))[0].values())))
    with figures.style():
        columns = min(4, len(layers))
        rows = -(-len(layers) // columns)
        figure = Figure(figsize=(figures.WIDTH, 2.6 * rows + 0.35), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat[len(layers) :]:
            axes.remove()
        lines: dict[str, Any] = {}
        for axes, layer in zip(panels.flat, layers, strict=False):
            for index, name in enumerate(of.strategies):
                seeds = [{r: by[layer] for r, by in rounds.items()} for rounds in curves[name]]
                figures.draw_seeds(axes, seeds, index, name, lines)
            axes.set_title(layer)
            axes.set_xlabel("round")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for row in panels:
            row[0].set_ylabel("σ, fused over the clients")
        figures.legend(figure, lines, of)
        return figures.svg(figure)


def stds(events: Sequence[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Round → layer → σ."""
    variances = layer_numbers(events, "scope_variances")
    return {r: {layer: value**0.5 for layer, value in by.items()} for r, by in variances.items()}


def main() -> None:
    """Make what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    out = parser.parse_args().out
    config = make(out / "run")
    clients = {name: clients_of(out / "run", config, name, config.rounds) for name in config.strategies}
    pictures = {"weights.svg": weights_figure(clients), "drift.svg": drift_figure(read_run(out / "run"))}
    for name, svg in pictures.items():
        replace(out / name, svg.encode())
        print(out / name)


if __name__ == "__main__":
    main()
