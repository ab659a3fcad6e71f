"""What a run left behind, read back: events, summaries, and what several seeds say together.

Everything that is shown of a run is drawn from these files alone, so that it can be drawn again.
"""

import inspect
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedwsa.config import ALIGNED, read
from fedwsa.run_folder import CONFIG, FINAL, METRICS, PARTITION, part_name, sha256
from partitions import PARTITIONERS

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Summary:
    """One finished (α, seed, strategy); a line of the run's own `metrics.jsonl` is `dataclasses.asdict` of it.

    rounds: the last round that has an event. final_accuracy, last5_accuracy, target_accuracy: in [0, 1]; the last
    server evaluation (not the best one) and the mean of the last five, among which the model before training, round 0,
    counts only if it is the sole one. rounds_to_target: the first evaluated round at or above the target, None if none
    is. seconds, bytes_down, bytes_up: summed over all phases. scope_distance: nats, the last round's sum over layers;
    None if there were no two clients' scopes then or a layer's distance is not finite.
    """

    alpha: float
    seed: int
    strategy: str
    rounds: int
    final_accuracy: float
    last5_accuracy: float
    rounds_to_target: int | None
    target_accuracy: float
    seconds: float
    bytes_down: int
    bytes_up: int
    scope_distance: float | None
    model_sha256: str


@dataclass(frozen=True, slots=True)
class StrategyResult:
    """What one strategy logged in one federation; `summary` is None as long as it is not finished."""

    events: tuple[Event, ...]
    summary: Summary | None

    @property
    def diverged(self) -> bool:
        """Whether the loss of the last server evaluation is not finite: null, or NaN as older runs wrote it."""
        losses = {e["round"]: e["metrics"].get("loss", 0.0) for e in self.events if e["phase"] == "evaluate-server"}
        return bool(losses) and not math.isfinite(_number(losses[max(losses)]))


@dataclass(frozen=True, slots=True)
class Federation:
    """One partition of the data, with what every strategy made of it; `partition` is None before it was drawn."""

    alpha: float
    seed: int
    partition: dict[str, Any] | None
    results: dict[str, StrategyResult]


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder: its config and one federation for every (α, seed), in the config's order."""

    name: str
    config: dict[str, Any]
    federations: tuple[Federation, ...]

    @property
    def strategies(self) -> list[str]:
        """The strategies in the config's order; the first is the one that others are compared with."""
        return as_list(self.config["strategies"])

    def uses(self, strategy: str) -> bool:
        """Whether a strategy is among them, by itself or aligned."""
        return any(name.removesuffix(ALIGNED) == strategy for name in self.strategies)

    @property
    def learns_on_server(self) -> bool:
        """Whether NP-Merge is among them, and takes a step: ours alone learn on the server's samples."""
        return self.uses("np-merge") and self.config.get("np-merge", {}).get("steps", 1) > 0

    @property
    def alphas(self) -> list[float]:
        """The distinct Dirichlet α, in the config's order."""
        return list(dict.fromkeys(federation.alpha for federation in self.federations))

    @property
    def seeds(self) -> list[int]:
        """The distinct seeds, in the config's order."""
        return list(dict.fromkeys(federation.seed for federation in self.federations))

    @property
    def split_without_alpha(self) -> str | None:
        """See the function of this name."""
        drawn = next((each.partition for each in self.federations if each.partition), {})
        return split_without_alpha(self.config, drawn.get("made_by"))

    def split(self, alpha: float) -> str:
        """How the data were divided, as a label: "α = 0.1", or what `split_without_alpha` says."""
        return self.split_without_alpha or f"α = {alpha:g}"

    def results(self, alpha: float, strategy: str) -> list[StrategyResult]:
        """What the strategy logged at this α, one result a seed."""
        return [federation.results[strategy] for federation in self.federations if federation.alpha == alpha]

    def summaries(self, strategy: str, alpha: float | None = None) -> list[Summary]:
        """The finished results of a strategy, of one α or of all."""
        alphas = self.alphas if alpha is None else [alpha]
        return [result.summary for a in alphas for result in self.results(a, strategy) if result.summary]


@dataclass(frozen=True, slots=True)
class Difference:
    """Final accuracy of `strategy` − `baseline` at one α, paired by seed: same partition, start and cohorts.

    mean, half_width: in accuracy (1 = 100 percentage points), 95 % Student-t interval over n seeds; None for n = 1.
    """

    alpha: float
    strategy: str
    baseline: str
    n: int
    mean: float
    half_width: float | None


def split_without_alpha(config: Mapping[str, Any], made_by: Mapping[str, Any] | None) -> str | None:
    """How the data were divided where α plays no part: "IID", the partitioner's name, the partition's file; or None.

    made_by: what the partition says of itself; None before it was drawn, when of a user's own partitioner α is named.
    """
    if file := config.get("partition-file"):
        return Path(file).name
    name = config.get("partitioner", "dirichlet")
    if made_by is None:
        made_by = inspect.signature(PARTITIONERS[name]).parameters if name in PARTITIONERS else {"alpha": None}
    if "alpha" in made_by:
        return None
    return "IID" if name == "iid" else str(name)


def as_list(value: Any) -> list[Any]:
    """A config value that may be one or a list of several."""
    return list(value) if isinstance(value, list) else [value]


def read_lines(path: Path) -> list[Event]:
    """All JSON objects of a .jsonl file; none if there is no file. A last line torn by a kill is left out."""
    if not path.exists():
        return []
    *lines, tail = path.read_bytes().split(b"\n")
    events = [_parse(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    try:
        return [*events, _parse(tail, path, len(lines) + 1)] if tail.strip() else events
    except ValueError:  # no newline at its end: the writer was stopped in the middle of it
        return events


def read_events(path: Path) -> list[Event]:
    """A strategy's events; of a (round, phase) logged again after a resume, the later line counts."""
    events = {}
    for event in read_lines(path):
        if not {"round", "phase"} <= event.keys():
            raise ValueError(f"{path}: {event} is no event: it needs a round and a phase; remove the line")
        events[event["round"], event["phase"]] = {"metrics": {}, **event}
    return list(events.values())


def read_summaries(path: Path) -> list[Summary]:
    """The lines of a run's own metrics.jsonl."""
    names = [field.name for field in fields(Summary)]
    lines = read_lines(path)
    for line in lines:
        if missing := [name for name in names if name not in line]:
            raise ValueError(f"{path}: a line lacks {', '.join(missing)}: {line}; remove it")
    return [Summary(**{name: line[name] for name in names}) for line in lines]


def server_accuracy(events: Sequence[Event]) -> dict[int, float]:
    """Round → accuracy of the global model on the server's test split, in [0, 1]."""
    evaluations = {e["round"]: e["metrics"] for e in events if e["phase"] == "evaluate-server"}
    return {number: metrics["accuracy"] for number, metrics in evaluations.items() if "accuracy" in metrics}


def scope_distances(events: Sequence[Event]) -> dict[int, dict[str, float]]:
    """Round → layer → Σ_k p_k KL(client k ‖ fused) in nats; see `between_clients`."""
    return between_clients(events, "scope_distance")


def train_metric(events: Sequence[Event], key: str) -> dict[int, float]:
    """Round → one of the metrics of its training; rounds without it are left out."""
    metrics = {event["round"]: event["metrics"] for event in events if event["phase"] == "train"}
    return {number: each[key] for number, each in metrics.items() if key in each}


def layer_numbers(events: Sequence[Event], key: str) -> dict[int, dict[str, float]]:
    """Round → layer → a number that training recorded by layer, NaN for null; rounds without it are left out."""
    trained = [event for event in events if event["phase"] == "train" and event.get(key)]
    return {e["round"]: dict(zip(e["layers"], map(_number, e[key]), strict=True)) for e in trained}


def between_clients(events: Sequence[Event], key: str) -> dict[int, dict[str, float]]:
    """`layer_numbers` of a difference between clients; left out too where fewer than two replies could be used."""
    return layer_numbers([e for e in events if e.get("num_clients", 2) - e.get("num_failed", 0) >= 2], key)


def summarize(
    strategy_dir: Path, *, alpha: float, seed: int, strategy: str, target_accuracy: float, model_sha256: str
) -> Summary:
    """Sum up what a finished strategy logged under `strategy_dir/metrics.jsonl`."""
    if not 0 < target_accuracy <= 1:
        raise ValueError(f"target accuracy must be in (0, 1], got {target_accuracy!r}; 0.8 means 80 %")
    events = read_events(strategy_dir / METRICS)
    accuracy = server_accuracy(events)
    if not accuracy:
        raise ValueError(f"{strategy_dir / METRICS} has no server evaluation; evaluate at least the last round")
    rounds = max(event["round"] for event in events)
    values = [accuracy[r] for r in sorted(accuracy) if r > 0] or [accuracy[0]]
    distance = math.fsum(scope_distances(events).get(rounds, {"": math.nan}).values())
    return Summary(
        alpha=alpha,
        seed=seed,
        strategy=strategy,
        rounds=rounds,
        final_accuracy=values[-1],
        last5_accuracy=statistics.fmean(values[-5:]),
        rounds_to_target=min((r for r, value in accuracy.items() if value >= target_accuracy), default=None),
        target_accuracy=target_accuracy,
        seconds=math.fsum(event.get("seconds", 0.0) for event in events),
        bytes_down=sum(event.get("bytes_down", 0) for event in events),
        bytes_up=sum(event.get("bytes_up", 0) for event in events),
        scope_distance=distance if math.isfinite(distance) else None,
        model_sha256=model_sha256,
    )


def read_run(run_dir: Path) -> Run:
    """Read a run folder, finished or not; a strategy that has not begun has no events and no summary."""
    config_file = run_dir / CONFIG
    if not config_file.is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no {CONFIG}; give the folder that a run wrote")
    config = read(config_file)
    for key in ("strategies", "alpha", "seed", "target-accuracy"):
        if key not in config:
            raise ValueError(f"{config_file} has no '{key}'; give the complete {CONFIG} that a run wrote")
    summaries = {(s.alpha, s.seed, s.strategy): s for s in read_summaries(run_dir / METRICS)}
    pairs = dict.fromkeys((float(a), int(s)) for a in as_list(config["alpha"]) for s in as_list(config["seed"]))
    federations = []
    for alpha, seed in pairs:
        folder = run_dir / part_name(alpha, seed) if len(pairs) > 1 else run_dir
        results = {}
        for name in as_list(config["strategies"]):
            summary = summaries.get((alpha, seed, name))
            if summary is None:  # the run has not written it yet, or a deployed one, which never does
                summary = _finished(folder / name, alpha, seed, config["target-accuracy"])
            results[name] = StrategyResult(tuple(read_events(folder / name / METRICS)), summary)
        federations.append(Federation(alpha, seed, _read_partition(folder / PARTITION), results))
    return Run(str(config.get("name") or run_dir.resolve().name), config, tuple(federations))


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % Student-t interval, t_{0.975, n−1} · s/√n; no interval (None) for one value."""
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"an interval needs at least one value and finite ones only, got {list(values)}")
    n = len(values)
    if n == 1:
        return float(values[0]), None
    from scipy.special import stdtrit  # not scipy.stats, which takes ten times as long to import

    return statistics.fmean(values), float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)


def paired_differences(run: Run) -> list[Difference]:
    """Every other strategy against the first, per α, over the seeds for which both are finished."""
    baseline, *others = run.strategies
    differences = []
    for alpha in run.alphas:
        reference = {summary.seed: summary.final_accuracy for summary in run.summaries(baseline, alpha)}
        for strategy in others:
            paired = [s for s in run.summaries(strategy, alpha) if s.seed in reference]
            if paired:
                mean, half_width = mean_interval([s.final_accuracy - reference[s.seed] for s in paired])
                differences.append(Difference(alpha, strategy, baseline, len(paired), mean, half_width))
    return differences


def _parse(line: bytes, path: Path, number: int) -> Event:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise ValueError(f"{path}, line {number} is not a JSON object: {line[:60]!r}; remove the line or run again")
    return event


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _finished(strategy_dir: Path, alpha: float, seed: int, target_accuracy: float) -> Summary | None:
    final = strategy_dir / FINAL
    if not final.is_file():
        return None
    return summarize(
        strategy_dir,
        alpha=alpha,
        seed=seed,
        strategy=strategy_dir.name,
        target_accuracy=target_accuracy,
        model_sha256=sha256(final),
    )


def _read_partition(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict) or "label_counts" not in content:
        raise ValueError(f"{path}: not the partition of a run, which has label_counts; remove it")
    return content
