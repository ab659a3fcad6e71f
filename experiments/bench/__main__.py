"""`make bench`: the contestants in turn, several times over; ratios, and RESULTS.md with the machine's description."""

import argparse
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from experiments.bench.measure import Contestant, ContestantError, Figure, Measurement, measure
from experiments.bench.rows import DESCRIPTIONS, ROWS, Row, repeats, spread
from experiments.bench.workloads import WORKLOADS

RESULTS = Path(__file__).parent / "RESULTS.md"

Measured = dict[Contestant, list[Measurement]]

STOCK = """\
Stock Flower is measured twice with the same app. As a script that calls `run_simulation` (the goals speak of it) the
app is `__main__`: Flower pickles it by value for every client, so that each loads the data set anew. As a module its
workers import it, and each loads the data set once. The unchanged app under our engine is the script."""


def machine() -> str:
    """What the figures depend on."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "flwr", "ray"))
    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{len(os.sched_getaffinity(0))} cores ({processor}), {memory:.0f} GiB{card}, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}, {packages}"
    )


def workloads_here() -> list[str]:
    """Those that this machine has the devices for."""
    with_cards = {name for name, workload in WORKLOADS.items() if workload.device == "cuda"}
    return [name for name in DESCRIPTIONS if torch.cuda.is_available() or name not in with_cards]


def run(rows: list[Row], count: int) -> tuple[Measured, set[Contestant]]:
    """Measure what the rows need, and say who failed.

    The contestants of a workload take turns, so that a machine whose speed drifts does so for all of them.
    """
    begin = time.monotonic()
    measured: Measured = {}
    failed: set[Contestant] = set()
    for workload in dict.fromkeys(row.workload for row in rows):
        contestants = list(dict.fromkeys(c for row in rows if row.workload == workload for c in row.contestants))
        for repeat in range(count):
            for contestant in contestants:
                if contestant in failed:
                    continue
                try:
                    result = measure(contestant)
                except ContestantError as error:
                    failed.add(contestant)
                    shown = f"failed: {error}"
                else:
                    measured.setdefault(contestant, []).append(result)
                    seconds = f"{spread([result.seconds])} s a round, " if result.seconds else ""
                    shown = f"{seconds}{result.start:.2f} s to the end of round 1"
                place = f"[{time.monotonic() - begin:4.0f} s] {workload} {repeat + 1}/{count} {contestant.name}"
                print(f"{place}: {shown}", flush=True)
    return measured, failed


def goal_table(rows: list[Row], measured: Measured, failed: set[Contestant]) -> list[str]:
    """A line a row."""
    lines = ["| workload | figure | goal | here | met |", "|---|---|---|---|---|"]
    for row in rows:
        here, met = "failed", "–"
        if failed.isdisjoint(row.contestants):
            figures = repeats(row, [measured[contestant] for contestant in row.contestants])
            here = spread(figures, row.goal.unit if row.goal else "")
            met = row.goal.verdict(figures) if row.goal else "–"
        lines.append(f"| {DESCRIPTIONS[row.workload]} | {row.label} | {row.goal or '–'} | {here} | {met} |")
    return lines


def seconds_table(rows: list[Row], measured: Measured, failed: set[Contestant]) -> list[str]:
    """A line a contestant."""
    lines = ["| workload | contestant | a round, s | to the end of round 1, s |", "|---|---|---|---|"]
    for workload, contestant in dict.fromkeys((row.workload, c) for row in rows for c in row.contestants):
        seconds, start = "failed", "failed"
        if contestant not in failed:
            results = measured[contestant]
            figures = [result.seconds for result in results if result.seconds]
            seconds = spread(figures) if figures else "–"
            start = spread([Figure(result.start) for result in results])
            if limits := [Figure(result.limit) for result in results if result.limit]:
                lines.append(f"| {workload} | {contestant.limit} | {spread(limits)} | – |")
        lines.append(f"| {workload} | {contestant.name} | {seconds} | {start} |")
    return lines


def main() -> None:
    """Exit status 1 if a contestant failed; a goal that is not met is no failure."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    able = workloads_here()
    parser.add_argument("--workloads", default=",".join(able), help=f"of {', '.join(DESCRIPTIONS)}")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name} here, if no workload is left out")
    options = parser.parse_args()
    workloads = options.workloads.split(",")
    if unknown := set(workloads) - DESCRIPTIONS.keys():
        parser.error(f"--workloads: {', '.join(sorted(unknown))}: allowed are {', '.join(DESCRIPTIONS)}")
    if unable := set(workloads) - set(able):
        parser.error(f"--workloads: {', '.join(sorted(unable))}: no CUDA device here; allowed are {', '.join(able)}")
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: allowed is a whole number ≥ 1")
    rows = [row for row in ROWS if row.workload in workloads]
    measured, failed = run(rows, options.repeats)
    lines = [
        "# Speed",
        "",
        f"Made by `make bench` on {machine()}.",
        f"Repeats: {options.repeats}, the contestants in turn. Figures are medians with the range over the repeats,",
        "and ratios are taken within each repeat. A round is the median one after the first; `>` stands where stock",
        "Flower was stopped before it had ended its second round.",
        "",
        *goal_table(rows, measured, failed),
        "",
        *([STOCK, ""] if any(each.argument == "stock" for row in rows for each in row.contestants) else []),
        *seconds_table(rows, measured, failed),
        "",
    ]
    out = options.out or (RESULTS if set(able) <= set(workloads) else None)
    if out is not None:
        out.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
