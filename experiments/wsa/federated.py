"""The federated runs of PLAN.md: `python -m experiments.wsa.federated mlp` makes those that are missing.

Each is a run of `fedwsa run` in its own folder under `runs/wsa`, with its config.toml; what is shown of them is kept in
`<model>.json` beside this file.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.results import read_events, server_accuracy
from fedwsa import config as configuration
from fedwsa.errors import RunError
from fedwsa.files import replace

HERE = Path(__file__).parent
ALPHAS = (0.1, 0.5)
LEARNING_RATES = (0.02, 0.05, 0.1)
STRENGTHS = (0.1, 1.0, 5.0, 10.0, 50.0)
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)
TUNING_SEED, SEEDS = 100, (0, 1, 2)
LAST = 5  # evaluations that count

Values = dict[str, Any]
Record = dict[str, Any]

COMMON: Values = {
    "data": "fashion-mnist",
    "num-clients": 100,
    "cohort": 10,
    "evaluation-cohort": 100,
    "evaluate-every": 5,
    "checkpoint-every": 5,
    "local-epochs": 5,
    "batch-size": 50,
    "server-samples": 0,
    "engine": "inprocess",
}
MODELS: dict[str, Values] = {
    "mlp": {"model": "mlp", "rounds": 150},
    "vgg8": {"model": "vgg8", "width": 0.125, "init": "kaiming-normal", "clip-norm": 10.0, "rounds": 80},
}
METHODS: dict[str, Values] = {
    "fedavg": {"strategies": ["fedavg"]},
    "decay": {"strategies": ["fedavg"]},
    "fixed": {"strategies": ["fedavg-wsa"], "wsa": {"target": "initial"}},
    "fused": {"strategies": ["fedavg-wsa"], "wsa": {"target": "fused"}},
}


def settings(model: str, method: str, alpha: float, seed: int, learning_rate: float, value: float = 0.0) -> Values:
    """Values of a run's config. value: λ of WSA or the weight decay, as the method has it."""
    values: Values = {**COMMON, **MODELS[model], **METHODS[method]}
    values |= {"alpha": alpha, "seed": seed, "learning-rate": learning_rate}
    if method == "decay":
        values["weight-decay"] = value
    elif method != "fedavg":
        values["wsa"] = {**values["wsa"], "strength": value}
    return {**values, "name": f"{model}-{method}-{value:g}-lr-{learning_rate:g}-alpha-{alpha:g}-seed-{seed}"}


def tune(model: str, runs: Path) -> tuple[list[Record], dict[float, float], dict[float, dict[str, float]]]:
    """Stages 1 and 2: their records; for each α the learning rate, and for each method the value, that were chosen."""
    records = make([settings(model, "fedavg", a, TUNING_SEED, lr) for a in ALPHAS for lr in LEARNING_RATES], runs)
    rates = {a: _best([r for r in records if r["alpha"] == a], "learning-rate") for a in ALPHAS}
    grids = {"decay": DECAYS, "fixed": STRENGTHS, "fused": STRENGTHS}
    tried = make(
        [settings(model, m, a, TUNING_SEED, rates[a], v) for a in ALPHAS for m, grid in grids.items() for v in grid],
        runs,
    )
    chosen = {
        alpha: {
            method: _best([r for r in tried if r["alpha"] == alpha and r["method"] == method], "value")
            for method in grids
        }
        for alpha in ALPHAS
    }
    return records + tried, rates, chosen


def compare(
    model: str, runs: Path, rates: Mapping[float, float], chosen: Mapping[float, Mapping[str, float]]
) -> list[Record]:
    """Stage 3."""
    return make(
        [
            settings(model, method, alpha, seed, rates[alpha], chosen[alpha].get(method, 0.0))
            for seed in SEEDS
            for alpha in ALPHAS
            for method in METHODS
        ],
        runs,
    )


def _best(records: Iterable[Record], key: str) -> float:
    """The value with the best validation accuracy; of equals the smaller."""
    found = max(records, key=lambda record: (last_mean(record["validation"]), -record[key]))
    return float(found[key])


def last_mean(curve: list[list[float]] | None) -> float:
    """Mean of the last five evaluations of a curve of [round, accuracy]; 0 for a run that failed."""
    return statistics.fmean(value for _, value in curve[-LAST:]) if curve else 0.0


def make(jobs: list[Values], runs: Path) -> list[Record]:
    """The records of these runs, two at a time; those that are there are read."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        return list(pool.map(_run, jobs, [runs] * len(jobs)))


def _run(values: Values, runs: Path) -> Record:
    from experiments import run  # in the worker: PyTorch and Flower

    folder = runs / values["name"]
    console = Console(file=StringIO())
    failed = ""
    if not (folder / "metrics.jsonl").exists() and not (folder / "failed.txt").exists():
        try:
            if (folder / "config.toml").exists():
                run.resume(folder, console)
            else:
                run.start(configuration.parse({**values, "out-dir": str(folder)}), console)
        except RunError as error:  # numbers that are not finite leave no usable reply
            replace(folder / "failed.txt", str(error).encode())
    if (folder / "failed.txt").exists():
        failed = (folder / "failed.txt").read_text()
    return _record(values, folder, failed)


def _record(values: Values, folder: Path, failed: str) -> Record:
    """What is kept of a run; scopes by layer only of the last stage, where curves are drawn."""
    method = values["name"].split("-")[1]
    value = values.get("weight-decay", values.get("wsa", {}).get("strength", 0.0))
    record: Record = {key: values[key] for key in ("alpha", "seed", "learning-rate")} | {
        "method": method, "value": value, "failed": failed,
    }  # fmt: skip
    if failed:
        return {**record, "validation": None, "test": None}
    events = read_events(folder / values["strategies"][0] / "metrics.jsonl")
    validation = [[e["round"], round(e["metrics"]["accuracy"], 5)] for e in events if e["phase"] == "evaluate-clients"]
    record["validation"] = validation
    if values["seed"] == TUNING_SEED:  # its test accuracy is not looked at
        return record
    record["test"] = [[at, round(accuracy, 5)] for at, accuracy in sorted(server_accuracy(events).items()) if at]
    trained = [e for e in events if e["phase"] == "train" and e["round"] % COMMON["evaluate-every"] == 0]
    record["layers"] = trained[-1]["layers"]
    for key in ("scope_distance", "scope_means", "scope_variances"):
        record[key] = [[e["round"], *(float(f"{number:.4g}") for number in e[key])] for e in trained]
    return record


def main() -> None:
    """Make what is missing, then write the model's json file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--runs", type=Path, default=Path("runs/wsa"))
    arguments = parser.parse_args()
    tried, rates, chosen = tune(arguments.model, arguments.runs)
    compared = compare(arguments.model, arguments.runs, rates, chosen)
    content = {"learning_rates": rates, "chosen": chosen, "tuning": tried, "comparison": compared}
    replace(HERE / f"{arguments.model}.json", (json.dumps(content) + "\n").encode())


if __name__ == "__main__":
    main()
