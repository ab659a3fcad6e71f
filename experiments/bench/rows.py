"""What is measured: rows of contestants, a figure of theirs, and the goal for it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from experiments.bench.measure import Contestant, Figure, Measurement

DESCRIPTIONS = {
    "mlp": "MLP, 10 × 600 samples",
    "cnn": "CNN, 10 × 600 samples",
    "tiny": "MLP, 1,000 clients × 60 samples, cohort 100",
    "unequal": "CNN, 20 clients with 1 to 3,000 samples, all in each round",
    "start": "process start to the end of round 1, MLP",
    "many": "start with 10,000 clients registered, cohort 100",
    "card-mlp": "MLP, 10 × 600 samples, four clients at a time on one CUDA card",
    "card-cnn": "CNN, 10 × 600 samples, four clients at a time on one CUDA card",
}


@dataclass(frozen=True)
class Goal:
    """A limit for the median over the repeats."""

    sign: Literal["≤", "≥"]
    limit: float
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}{self.unit}"

    def verdict(self, figures: Sequence[Figure]) -> str:
        """Yes or no; a lower bound that is not enough leaves it open."""
        median = statistics.median(figure.value for figure in figures)
        if self.sign == "≥" and median >= self.limit:
            return "yes"
        if any(figure.at_least for figure in figures) and (self.sign == "≥" or median <= self.limit):
            return "not known"
        return "yes" if self.sign == "≤" and median <= self.limit else "no"


@dataclass(frozen=True)
class Row:
    """`figure` of the contestants' measurements, one each, of the same repeat."""

    workload: str
    label: str
    goal: Goal | None
    figure: Callable[..., Figure]
    contestants: tuple[Contestant, ...]


def repeats(row: Row, measured: Sequence[Sequence[Measurement]]) -> list[Figure]:
    """The row's figure for each repeat; `measured`: of each of its contestants."""
    return [row.figure(*one) for one in zip(*measured, strict=True)]


def spread(figures: Sequence[Figure], unit: str = "") -> str:
    """Median (minimum to maximum); `>` marks a lower bound."""
    values = [figure.value for figure in figures]
    mark = "> " if any(figure.at_least for figure in figures) else ""
    return f"{mark}{statistics.median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


def rounds(one: Measurement, other: Measurement) -> Figure:
    """Median round of `one` ÷ that of `other`."""
    assert one.seconds is not None
    assert other.seconds is not None
    return Figure(one.seconds.value / other.seconds.value, one.seconds.at_least)


def over_limit(one: Measurement) -> Figure:
    """Median round after the first ÷ the least that it could take."""
    assert one.seconds is not None
    assert one.limit is not None
    return Figure(one.seconds.value / one.limit)


def first_over_limit(one: Measurement) -> Figure:
    """First round ÷ the least that it could take."""
    assert one.limit is not None
    return Figure(one.laps[0] / one.limit)


def start(one: Measurement) -> Figure:
    """Seconds from the start of the process to the end of round 1."""
    return Figure(one.start)


def starts(one: Measurement, other: Measurement) -> Figure:
    """`start` of `one` ÷ that of `other`."""
    return Figure(one.start / other.start)


def later(one: Measurement, other: Measurement) -> Figure:
    """Seconds by which `one` ends its first round later than `other`."""
    return Figure(one.start - other.start)


def _throughput(workload: str, number: int, stock_number: int, stop_after: float, goals: Sequence[Goal]) -> list[Row]:
    """Rounds of `mlp`, `cnn` or `tiny`; goals: ours ÷ bare, script ÷ ours, unchanged ÷ bare, script ÷ unchanged."""
    bare = Contestant("bare loop", "bare", workload, number)
    ours = Contestant("our app", "ours", workload, number, "ray")
    unchanged = Contestant("unchanged Flower app, our engine", "unchanged", workload, number, "ours")
    script = Contestant("stock Flower, script", "unchanged", workload, stock_number, "stock", stop_after)
    module = Contestant("stock Flower, module", "imported", workload, stock_number, "stock", stop_after)
    found = [
        Row(workload, "our app ÷ bare loop", goals[0], rounds, (ours, bare)),
        Row(workload, "stock Flower, script ÷ our app", goals[1], rounds, (script, ours)),
        Row(workload, "stock Flower, module ÷ our app", None, rounds, (module, ours)),
    ]
    if goals[2:]:
        found.insert(1, Row(workload, "unchanged Flower app ÷ bare loop", goals[2], rounds, (unchanged, bare)))
    if goals[3:]:
        found += [
            Row(workload, "stock Flower, script ÷ unchanged app", goals[3], rounds, (script, unchanged)),
            Row(workload, "stock Flower, module ÷ unchanged app", None, rounds, (module, unchanged)),
        ]
    return found


def _starts() -> list[Row]:
    ours = Contestant("our app", "ours", "mlp", 1, "ray-start-here")
    all_up = Contestant("our app, workers up first", "ours", "mlp", 1, "ray")
    in_process = Contestant("our app, in-process", "ours", "mlp", 1, "inprocess")
    script = Contestant("stock Flower, script", "unchanged", "mlp", 1, "stock")
    module = Contestant("stock Flower, module", "imported", "mlp", 1, "stock")
    return [
        Row("start", "our app, Ray", Goal("≤", 5, " s"), start, (ours,)),
        Row("start", "our app, Ray, all workers up before round 1", None, start, (all_up,)),
        Row("start", "our app, in-process", Goal("≤", 3, " s"), start, (in_process,)),
        Row("start", "stock Flower, script ÷ our app, Ray", Goal("≥", 3), starts, (script, ours)),
        Row("start", "stock Flower, module ÷ our app, Ray", None, starts, (module, ours)),
    ]


def _alignment(workload: str, number: int, most: float | None = None) -> list[Row]:
    """A client's local epoch with the term ÷ without it, in one process; most: how large that may be."""
    rows = []
    asked = Goal("≤", most) if most else None
    goals = {"loss": asked, "proximal": asked, "channel": None, "model": None, "autograd": None}
    for kind, goal in goals.items():
        one = Contestant(f"WSA, {kind}", "alignment", workload, number, kind, limit="the same without WSA")
        rows.append(Row(workload, f"local epoch with WSA, {kind} ÷ without", goal, over_limit, (one,)))
    return rows


def _on_a_card(workload: str) -> list[Row]:
    """Nobody has set goals for these."""
    bare = Contestant("bare loop", "bare", workload, 10)
    ours = Contestant("our app", "ours", workload, 10, "ray-card")
    in_process = Contestant("our app, in-process", "ours", workload, 10, "inprocess")
    return [
        Row(workload, "our app ÷ bare loop", None, rounds, (ours, bare)),
        Row(workload, "our app, in-process, one client at a time ÷ bare loop", None, rounds, (in_process, bare)),
        *_alignment(workload, 30),
    ]


UNEQUAL = Contestant("our app", "unequal", "unequal", 4, "ray", limit="half of all clients, or the longest")
MANY = Contestant("our app, 10,000 clients", "ours", "many", 1, "ray-start-here")
FEW = Contestant("our app, 100 clients", "ours", "few", 1, "ray-start-here")

ROWS = [
    *_throughput("mlp", 30, 3, 0, [Goal("≤", 1.25), Goal("≥", 15), Goal("≤", 1.6), Goal("≥", 12)]),
    *_alignment("mlp", 300, 1.1),
    *_throughput("cnn", 6, 3, 0, [Goal("≤", 1.0), Goal("≥", 1.5)]),
    *_alignment("cnn", 30, 1.02),
    *_throughput("tiny", 15, 2, 30, [Goal("≤", 1.4), Goal("≥", 30), Goal("≤", 2.5)]),
    Row("unequal", "round ÷ max(half of all, the longest client)", Goal("≤", 1.1), over_limit, (UNEQUAL,)),
    Row("unequal", "first round ÷ the same", None, first_over_limit, (UNEQUAL,)),
    *_starts(),
    Row("many", "later than with 100 clients", Goal("≤", 2, " s"), later, (MANY, FEW)),
    *_on_a_card("card-mlp"),
    *_on_a_card("card-cnn"),
]
