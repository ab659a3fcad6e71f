"""`make bench`: the contestants in turn, several times over; ratios, and RESULTS.md with the machine's description."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TIMEOUT = 600.0  # seconds for one contestant


@dataclass(frozen=True)
class Contestant:
    """A program of this folder; `arguments` follow the workload and the number of rounds."""

    module: str
    arguments: tuple[str, ...] = ()


BARE, OURS = Contestant("bare"), Contestant("ours")
UNCHANGED, STOCK = Contestant("unchanged", ("ours",)), Contestant("unchanged", ("stock",))


@dataclass(frozen=True)
class Comparison:
    """Median round of `one` ÷ that of `other`, and the goal for it."""

    workload: str
    one: Contestant
    other: Contestant
    label: str
    goal: str


COMPARISONS = (
    Comparison("mlp", OURS, BARE, "our app ÷ bare loop", "≤ 1.25"),
    Comparison("mlp", UNCHANGED, BARE, "unchanged Flower app ÷ bare loop", "≤ 1.6"),
    Comparison("mlp", STOCK, OURS, "stock Flower ÷ our app", "≥ 15"),
    Comparison("mlp", STOCK, UNCHANGED, "stock Flower ÷ unchanged app here", "≥ 12"),
    Comparison("cnn", OURS, BARE, "our app ÷ bare loop", "≤ 1.0"),
    Comparison("cnn", STOCK, OURS, "stock Flower ÷ our app", "≥ 1.5"),
    Comparison("tiny", OURS, BARE, "our app ÷ bare loop", "≤ 1.4"),
    Comparison("tiny", UNCHANGED, BARE, "unchanged Flower app ÷ bare loop", "≤ 2.5"),
    Comparison("tiny", STOCK, OURS, "stock Flower ÷ our app", "≥ 30"),
)
ROUNDS = {"mlp": 30, "cnn": 6, "tiny": 15}
STOCK_ROUNDS = {"mlp": 5, "cnn": 3, "tiny": 3}  # it takes seconds a round


def measure(contestant: Contestant, workload: str) -> tuple[float, float]:
    """Seconds of the median round after the first, and from the start of the process to the end of the first."""
    rounds = (STOCK_ROUNDS if contestant == STOCK else ROUNDS)[workload]
    command = [sys.executable, "-W", "ignore", "-m", f"experiments.bench.{contestant.module}", workload, str(rounds)]
    start = time.perf_counter()
    first, result = float("nan"), ""
    with subprocess.Popen(
        [*command, *contestant.arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("first round"):
                first = time.perf_counter() - start
            result = line if line.startswith("{") else result
        if process.wait(TIMEOUT) or not result:
            raise RuntimeError(f"{' '.join(command)} failed")
    return json.loads(result)["median_round_s"], first


def machine() -> str:
    """What the figures depend on."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "flwr", "ray"))
    processor = names[0] if names else platform.machine()
    return f"{len(os.sched_getaffinity(0))} cores ({processor}), Python {platform.python_version()}, {packages}"


def spread(values: list[float]) -> str:
    """Median (minimum to maximum)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Contestants take turns, so that a machine whose speed drifts does so for all of them."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workloads", default=",".join(ROUNDS))
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args()
    lines = [
        "# Speed",
        "",
        f"Made by `make bench` on {machine()}.",
        f"{options.repeats} repeats, the contestants in turn. Seconds are those of a median round after the first;",
        "every figure is a median with the range over the repeats.",
        "",
    ]
    for workload in options.workloads.split(","):
        comparisons = [comparison for comparison in COMPARISONS if comparison.workload == workload]
        contestants = list(dict.fromkeys(c for pair in comparisons for c in (pair.other, pair.one)))
        times: dict[Contestant, list[tuple[float, float]]] = {contestant: [] for contestant in contestants}
        for _ in range(options.repeats):
            for contestant in contestants:
                times[contestant].append(measure(contestant, workload))
                print(workload, contestant.module, *contestant.arguments, times[contestant][-1], flush=True)
        lines += [f"## {workload}", "", "| contestant | seconds a round | to the end of round 1, s |", "|---|---|---|"]
        lines += [
            f"| {contestant.module} {' '.join(contestant.arguments)} | {spread([t for t, _ in times[contestant]])} "
            f"| {spread([first for _, first in times[contestant]])} |"
            for contestant in contestants
        ]
        lines += ["", "| ratio | goal | here |", "|---|---|---|"]
        for pair in comparisons:
            ratios = [a / b for (a, _), (b, _) in zip(times[pair.one], times[pair.other], strict=True)]
            lines.append(f"| {pair.label} | {pair.goal} | {spread(ratios)} |")
        lines.append("")
    options.out.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
