"""Tables and figures of RESULTS.md from the json files beside it: `python -m experiments.wsa.results`.

The text there is written by hand; what stands between `<!-- name -->` and `<!-- end -->` is made here.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import figures
from experiments.results import mean_interval
from experiments.wsa.connectivity import INITIAL, POINTS, STAGED, TREATMENTS
from experiments.wsa.federated import ALPHAS, DECAYS, LEARNING_RATES, METHODS, SEEDS, STRENGTHS, last_mean
from fedwsa import merging
from fedwsa.files import replace

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
NAMES = {
    "fedavg": "FedAvg",
    "decay": "FedAvg, weight decay",
    "fixed": "WSA, fixed target",
    "fused": "WSA, fused target",
}

Content = dict[str, Any]
Record = dict[str, Any]


def tuning(content: Content) -> list[str]:
    """Validation accuracy of everything that was tried; what was chosen is bold."""
    lines = [
        f"| method | value | {' | '.join(f'α = {alpha:g}' for alpha in ALPHAS)} |",
        "|---|---|" + "---|" * len(ALPHAS),
    ]
    grids = {
        "fedavg": ("η", LEARNING_RATES),
        "decay": ("decay", DECAYS),
        "fixed": ("λ", STRENGTHS),
        "fused": ("λ", STRENGTHS),
    }
    for method, (symbol, values) in grids.items():
        key = "learning-rate" if method == "fedavg" else "value"
        for value in values:
            cells = []
            for alpha in ALPHAS:
                tried = [r for r in content["tuning"] if (r["method"], r["alpha"], r[key]) == (method, alpha, value)]
                accuracy = f"{100 * last_mean(tried[0]['validation']):.2f}" + (
                    " (failed)" if tried[0]["failed"] else ""
                )
                of_alpha = f"{alpha:g}"
                best = (
                    content["learning_rates"][of_alpha] if method == "fedavg" else content["chosen"][of_alpha][method]
                )
                cells.append(f"**{accuracy}**" if value == best else accuracy)
            lines.append(f"| {NAMES[method]} | {symbol} = {value:g} | {' | '.join(cells)} |")
    return lines


def comparison(content: Content) -> list[str]:
    """Test accuracy and the differences to FedAvg, paired by seed."""
    lines = ["| α | method | test accuracy, % | minus FedAvg, points | each seed |", "|---|---|---|---|---|"]
    for alpha in ALPHAS:
        found = {method: _by_seed(content["comparison"], method, alpha) for method in METHODS}
        for method, accuracies in found.items():
            chosen = content["chosen"][f"{alpha:g}"].get(method)
            name = NAMES[method] + ("" if chosen is None else f" {chosen:g}")
            differences = [accuracies[seed] - found["fedavg"][seed] for seed in SEEDS]
            if method == "fedavg":
                against, each = "–", [f"{accuracies[seed]:.2f}" for seed in SEEDS]
            else:
                against, each = _interval(differences, "+.2f"), [f"{difference:+.2f}" for difference in differences]
            mean = _interval(list(accuracies.values()), ".2f")
            lines.append(f"| {alpha:g} | {name} | {mean} | {against} | {', '.join(each)} |")
    return lines


def _by_seed(records: Iterable[Record], method: str, alpha: float) -> dict[int, float]:
    """Percent, by seed."""
    chosen = [record for record in records if (record["method"], record["alpha"]) == (method, alpha)]
    return {record["seed"]: 100 * last_mean(record["test"]) for record in chosen}


def _interval(values: Sequence[float], form: str) -> str:
    mean, half_width = mean_interval(values)
    return f"{mean:{form}}" + ("" if half_width is None else f" ± {half_width:.2f}")


def curves(content: Content) -> str:
    """Test accuracy by round for each α, and σ of each layer by round at the first α; a line for each method's mean."""
    from matplotlib.figure import Figure

    records = [record for record in content["comparison"] if record["test"]]
    layers = records[0]["layers"]
    with figures.style():
        rows = 1 + -(-len(layers) // 4)
        figure = Figure(figsize=(figures.WIDTH, 2.6 * rows), layout="constrained")
        grid = figure.add_gridspec(rows, 4)
        handles = {}
        for column, alpha in enumerate(ALPHAS):
            axes = figure.add_subplot(grid[0, 2 * column : 2 * column + 2])
            for index, method in enumerate(METHODS):
                series = [r["test"] for r in records if (r["method"], r["alpha"]) == (method, alpha)]
                rounds, values = _means(series)
                (handles[method],) = axes.plot(
                    rounds, [100 * v for v in values], color=figures.COLOURS[index], linewidth=1.4
                )
            axes.set_title(f"α = {alpha:g}")
            axes.set_ylabel("test accuracy (%)")
        for number, layer in enumerate(layers):
            axes = figure.add_subplot(grid[1 + number // 4, number % 4])
            for index, method in enumerate(METHODS):
                series = [
                    [[row[0], row[1 + number] ** 0.5] for row in record["scope_variances"]]
                    for record in records
                    if (record["method"], record["alpha"]) == (method, ALPHAS[0])
                ]
                axes.plot(*_means(series), color=figures.COLOURS[index], linewidth=1.4)
            axes.set_title(f"σ of {layer.removesuffix('.weight')}, α = {ALPHAS[0]:g}")
            axes.set_xlabel("round")
        figure.legend(list(handles.values()), [NAMES[m] for m in handles], loc="outside upper left", ncols=4)
        return figures.svg(figure)


def _means(series: Sequence[Sequence[Sequence[float]]]) -> tuple[list[float], list[float]]:
    """Rounds, and the mean over series of [round, value]."""
    return [at for at, _ in series[0]], [statistics.fmean(v for _, v in points) for points in zip(*series, strict=True)]


def _barrier(pair: Record, path: str) -> float:
    return merging.barrier(POINTS, pair["curves"][path]["loss"]).height


def _parents(pair: Record) -> float:
    """Mean accuracy of A and B, percent."""
    accuracies: list[float] = pair["curves"]["plain"]["accuracy"]
    return 50.0 * (accuracies[0] + accuracies[-1])


def pairs(content: Content) -> list[str]:
    """For each treatment: what becomes of scopes, parents and barriers; differences are paired with no term."""
    lines = [
        "| initial weights | term | divergence, mean (largest) | parents, % | barrier, nats | minus none "
        "| permuted: barrier | minus none | middle, % | rescaled, % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for initial in INITIAL:
        none = _pairs(content, initial, "none")
        for treatment in TREATMENTS:
            own = _pairs(content, initial, treatment)
            divergences = [pair["divergence"] for pair in own]
            cells = [
                f"{statistics.fmean(divergences):.4f} ({max(divergences):.4f})",
                f"{statistics.fmean(map(_parents, own)):.2f}",
            ]
            for path in ("plain", "permuted"):
                barriers, before = ([_barrier(pair, path) for pair in several] for several in (own, none))
                cells.append(f"{statistics.fmean(barriers):.2f}")
                changes = [one - other for one, other in zip(barriers, before, strict=True)]
                cells.append("–" if treatment == "none" else _interval(changes, "+.2f"))
            middle = [100 * pair["curves"]["permuted"]["accuracy"][len(POINTS) // 2] for pair in own]
            rescaled = [100 * pair["curves"]["permuted"]["rescaled"][1] for pair in own]
            cells += [f"{statistics.fmean(middle):.1f}", f"{statistics.fmean(rescaled):.1f}"]
            lines.append(f"| {initial} | {treatment} | {' | '.join(cells)} |")
    return lines


def _pairs(content: Content, initial: str, treatment: str) -> list[Record]:
    found = [p for p in content["pairs"] if (p["initial"], p["treatment"]) == (initial, treatment)]
    return sorted(found, key=lambda pair: (pair["repeat"], pair["difference"]))


def each_pair(content: Content) -> list[str]:
    """A line for each difference, means over the repeats: barrier (nats) without the term, and with it."""
    lines = [
        "| initial weights | B differs in | divergence, none → all epochs | parents, % | barrier, nats "
        "| permuted: barrier, nats |",
        "|---|---|---|---|---|---|",
    ]
    for initial in INITIAL:
        differences = list(dict.fromkeys(pair["difference"] for pair in content["pairs"]))
        for difference in differences:
            both = [
                [p for p in _pairs(content, initial, t) if p["difference"] == difference]
                for t in ("none", "all epochs")
            ]
            cells = []
            for value, form in (
                (lambda p: p["divergence"], ".4f"),
                (_parents, ".2f"),
                (lambda p: _barrier(p, "plain"), ".2f"),
                (lambda p: _barrier(p, "permuted"), ".2f"),
            ):
                cells.append(" → ".join(f"{statistics.fmean(map(value, several)):{form}}" for several in both))
            lines.append(f"| {initial} | {difference} | {' | '.join(cells)} |")
    return lines


def staged(content: Content) -> list[str]:
    """Accuracy in percent at each stage, means over the repeats."""
    columns = ["quarters", "averages of two", "halves", "result", "average of four"]
    lines = [f"| term | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for treatment in STAGED:
        own = [record for record in content["staged"] if record["treatment"] == treatment]
        cells = []
        for column in columns:
            values = [record[column] if isinstance(record[column][0], list) else [record[column]] for record in own]
            cells.append(
                _interval([100 * statistics.fmean(accuracy for _, accuracy in each) for each in values], ".2f")
            )
        lines.append(f"| {treatment} | {' | '.join(cells)} |")
    return lines


BLOCKS: dict[str, tuple[str, Callable[[Content], list[str]]]] = {
    "mlp tuning": ("mlp", tuning),
    "mlp comparison": ("mlp", comparison),
    "vgg8 tuning": ("vgg8", tuning),
    "vgg8 comparison": ("vgg8", comparison),
    "pairs": ("pairs", pairs),
    "each pair": ("pairs", each_pair),
    "staged": ("pairs", staged),
}


def main() -> None:
    """What has no json file yet is left as it is."""
    contents = {path.stem: json.loads(path.read_text()) for path in HERE.glob("*.json")}
    text = RESULTS.read_text(encoding="utf-8")
    for name, (source, make) in BLOCKS.items():
        if source in contents:
            before, found, rest = text.partition(f"<!-- {name} -->")
            table = "\n".join(make(contents[source]))
            text = f"{before}{found}\n{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}" if found else text
    replace(RESULTS, text.encode())
    for model in ("mlp", "vgg8"):
        if model in contents:
            replace(HERE / f"{model}.svg", curves(contents[model]).encode())


if __name__ == "__main__":
    main()
