"""The report holds what it should, stands alone, and is drawn the same twice; from run folders made up here."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.results import summarize

STRATEGIES = ("fedavg", "fedavg-wsa", "np-merge")
MLP = ("f1.weight", "f2.weight", "head.weight")


def fake_run(
    folder: Path,
    *,
    name: str = "main",
    alphas: tuple[float, ...] = (0.1,),
    seeds: tuple[int, ...] = (0,),
    rounds: int = 30,
    clients: int = 20,
    layers: tuple[str, ...] = MLP,
    strategies: tuple[str, ...] = STRATEGIES,
    stopped: dict[str, int] | None = None,
    failures: dict[int, int] | None = None,
) -> Path:
    """A run folder as the runner leaves it; `stopped` maps a strategy to the round at which it was killed."""
    folder.mkdir(parents=True)
    config = {
        "name": name,
        "data": "digits",
        "strategies": list(strategies),
        "alpha": list(alphas) if len(alphas) > 1 else alphas[0],
        "seed": list(seeds) if len(seeds) > 1 else seeds[0],
        "num-clients": clients,
        "cohort": clients // 2,
        "rounds": rounds,
        "target-accuracy": 0.8,
        "server-samples": 100,
        "model": "mlp",
    }
    (folder / "config.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
    for alpha in alphas:
        for seed in seeds:
            several = len(alphas) * len(seeds) > 1
            _fake_federation(
                folder / f"alpha-{alpha}_seed-{seed}" if several else folder,
                (alpha, seed),
                config,
                layers,
                stopped or {},
                failures or {},
                folder / "metrics.jsonl",
            )
    return folder


def _fake_federation(
    folder: Path,
    at: tuple[float, int],
    config: dict[str, Any],
    layers: tuple[str, ...],
    stopped: dict[str, int],
    failures: dict[int, int],
    summaries: Path,
) -> None:
    alpha, seed = at
    rng = np.random.default_rng([seed, int(1000 * alpha)])
    shares = rng.dirichlet([alpha] * config["num-clients"], size=10).T
    partition = {
        "data": "digits",
        "alpha": alpha,
        "seed": seed,
        "partitioner": "dirichlet",
        "label_counts": np.round(134 * shares).astype(int).tolist(),
        "num_classes": 10,
        "server_samples": 100,
        "server_origin": "training split of digits, held out from every client",
        "test_samples": 360,
    }
    folder.mkdir(exist_ok=True)
    (folder / "partition.json").write_text(json.dumps(partition))
    hard = 0.12 / (alpha + 0.3)
    for index, strategy in enumerate(config["strategies"]):
        last = stopped.get(strategy, config["rounds"])
        lines = []
        for r in range(last + 1):
            reached = (0.95 - hard + 0.02 * index) * (1 - np.exp(-r / (4 + 10 * hard - index)))
            accuracy = float(np.clip(0.1 + 0.9 * reached + rng.normal(0, 0.15 * hard / (1 + 0.1 * r)), 0, 1))
            answered = {"round": r, "num_clients": config["cohort"], "num_failed": failures.get(r, 0)}
            traffic = {"bytes_down": 3_200_000, "bytes_up": 3_200_400, "seconds": 0.2 + 0.4 * (strategy == "np-merge")}
            if r:
                level = 0.05 * hard * 0.3 ** (strategy == "fedavg-wsa") * np.exp(-r / 25)
                distance = [float(level * (1 + i / 2) * np.exp(rng.normal(0, 0.1))) for i in range(len(layers))]
                scope = {"layers": layers, "scope_distance": distance, "scope_means": [0.0] * len(layers)}
                lines.append({**answered, **traffic, **scope, "phase": "train", "metrics": {"loss": 1.0}})
                lines.append({**answered, **traffic, "phase": "evaluate-clients", "metrics": {"accuracy": accuracy}})
            evaluated = {"loss": 1 - accuracy, "accuracy": round(accuracy * 360) / 360}
            lines.append({"round": r, "phase": "evaluate-server", "metrics": evaluated, "num_examples": 360})
        (folder / strategy).mkdir()
        with (folder / strategy / "metrics.jsonl").open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        if strategy not in stopped:
            given = {"alpha": alpha, "seed": seed, "target_accuracy": 0.8, "model_sha256": rng.bytes(32).hex()}
            with summaries.open("a") as file:
                file.write(json.dumps(asdict(summarize(folder / strategy, strategy=strategy, **given))) + "\n")
