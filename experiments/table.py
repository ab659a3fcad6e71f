"""The numbers of a run as tables. The terminal and the report show the same cells, which are made here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from experiments.results import Run, Summary, mean_interval, paired_differences

NONE = "–"
NOT_FINISHED = "not finished"
NOT_FINITE = "loss not finite"


@dataclass(frozen=True, slots=True)
class Cells:
    """A table before it has a medium: one header and rows of equal length, the first column being names."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def summary_cells(run: Run) -> Cells:
    """One federation: its strategies' summaries. Several: final accuracy by α over seeds, and what it cost."""
    return _one_federation(run) if len(run.federations) == 1 else _many_federations(run)


def difference_cells(run: Run) -> Cells | None:
    """Every other strategy against the first, in percentage points; None with a single seed or nothing to compare."""
    differences = {(d.strategy, d.alpha): d for d in paired_differences(run)}
    if len(run.seeds) == 1 or not differences:
        return None
    baseline, *others = run.strategies
    but = ", of which central has none" if run.uses("central") else ""
    rows = []
    for strategy in others:
        found = [differences.get((strategy, alpha)) for alpha in run.alphas]
        cells = [_plus_minus(d.mean, d.half_width, d.n, len(run.seeds), "+z.1f") if d else NOT_FINISHED for d in found]
        rows.append((strategy, *cells))
    return Cells(
        f"Final accuracy against {baseline} (percentage points)",
        ("strategy", *(run.split(alpha) for alpha in run.alphas)),
        tuple(rows),
        f"Mean difference ± half width of its 95 % t interval over {len(run.seeds)} seeds. Differences are taken seed "
        f"by seed: same partition, same start, same cohorts{but}. Not corrected for the number of comparisons.",
    )


def summary_table(run: Run) -> Table:
    """The result of a run for a terminal of 80 columns or more."""
    return rich_table(summary_cells(run))


def rich_table(cells: Cells) -> Table:
    """Cells as a rich table for 80 columns: what is too long wraps, between words where it can; nothing is cut off."""
    table = Table(title=Text(cells.title + "\n"), caption=Text("\n" + cells.note), box=box.SIMPLE_HEAD, show_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.pad_edge, table.padding = False, (0, 1, 0, 0)
    columns = list(zip(cells.header, *cells.rows, strict=True))
    for index, (column, width) in enumerate(zip(columns, _widths(columns), strict=True)):
        justify: Literal["left", "right"] = "right" if index else "left"
        table.add_column(Text(column[0]), justify=justify, overflow="fold", vertical="bottom", width=width)
    for row in cells.rows:
        table.add_row(*map(Text, row))
    return table


def _widths(columns: Sequence[Sequence[str]], total: int = 80, gap: int = 2) -> list[int | None]:
    """Widths at which no word breaks, narrowing what can be wrapped most; None each where words alone are too wide.

    Rich narrows the widest column first, which breaks a name to keep a header on one line.
    """
    widths = [max(map(cell_len, column)) for column in columns]
    words = [max(cell_len(word) for cell in column for word in cell.split()) for column in columns]
    while sum(widths) + gap * (len(widths) - 1) > total:
        slack = [width - word for width, word in zip(widths, words, strict=True)]
        if max(slack) == 0:
            return [None] * len(widths)
        widths[slack.index(max(slack))] -= 1
    return list(widths)


def decimal_column(values: Sequence[float | None]) -> list[str]:
    """One column of numbers ≥ 0 with as many decimals as the largest needs for three digits; "–" for None."""
    largest = max((value for value in values if value is not None), default=0.0)
    decimals = next((d for d, limit in enumerate((100.0, 10.0, 1.0)) if largest >= limit), 3)
    return [NONE if value is None else f"{value:,.{decimals}f}" for value in values]


def _one_federation(run: Run) -> Cells:
    federation = run.federations[0]
    results = [federation.results[name] for name in run.strategies]
    found = [result.summary for result in results]
    costs = zip(*_costs([[summary] if summary else [] for summary in found]), strict=True)
    rows = []
    for name, result, cost in zip(run.strategies, results, costs, strict=True):
        if (summary := result.summary) is None:
            rows.append((name, NOT_FINISHED, NONE, NONE, *cost, NONE))
            continue
        reached = NONE if summary.rounds_to_target is None else str(summary.rounds_to_target)
        distance = NONE if summary.scope_distance is None else f"{summary.scope_distance:.3g}"
        final, last5 = (f"{100 * value:.1f}" for value in (summary.final_accuracy, summary.last5_accuracy))
        final += f" ({NOT_FINITE})" if result.diverged else ""
        rows.append((name, final, last5, reached, *cost, distance))
    target = run.config.get("target-accuracy")
    return Cells(
        f"{run.name}: {run.split(federation.alpha)}, seed {federation.seed}",
        (
            "strategy",
            "final accuracy (%)",
            "mean of last five (%)",
            "rounds to target" if target is None else f"rounds to {100 * target:g} %",
            "seconds",
            "MB up",
            "MB down",
            "scope distance (nats)",
        ),
        tuple(rows),
        f"{_whose(run)} Scope distance: last round, summed over layers; a single client has none. 1 MB = 10⁶ bytes of "
        "payload.",
    )


def _many_federations(run: Run) -> Cells:
    seeds = len(run.seeds)
    costs = zip(*_costs([run.summaries(name) for name in run.strategies]), strict=True)
    rows = []
    for name, cost in zip(run.strategies, costs, strict=True):
        rows.append((name, *(_accuracy_cell(run, name, alpha) for alpha in run.alphas), *cost))
    over = f"mean ± half width of the 95 % t interval over n = {seeds} seeds" if seeds > 1 else f"seed {run.seeds[0]}"
    return Cells(
        f"{run.name}: final accuracy (%), {over}",
        ("strategy", *(run.split(alpha) for alpha in run.alphas), "seconds", "MB up", "MB down"),
        tuple(rows),
        f"{_whose(run)} Seconds and MB: mean of one federation. 1 MB = 10⁶ bytes of payload.",
    )


def detail_cells(run: Run) -> Cells | None:
    """What else is said of one federation, for several: a row a strategy and α, means over seeds; None for one."""
    if len(run.federations) == 1:
        return None
    rows = []
    for name in run.strategies:
        for alpha in run.alphas:
            if found := run.summaries(name, alpha):
                last5 = _plus_minus(*mean_interval([s.last5_accuracy for s in found]), len(found), len(run.seeds))
                distances = [s.scope_distance for s in found if s.scope_distance is not None]
                distance = f"{mean_interval(distances)[0]:.3g}" if distances else NONE
                rows.append((name, run.split(alpha), last5, _rounds_cell(found), distance))
    target = run.config["target-accuracy"]
    return Cells(
        "",
        ("strategy", "split", "mean of last five (%)", f"rounds to {100 * target:g} %", "scope distance (nats)"),
        tuple(rows),
        "Means over seeds, that of the last five with the half width of its interval. Rounds to the target: over the "
        "seeds that reached it. Scope distance: last round, summed over layers, over the seeds that have one.",
    )


def _rounds_cell(found: Sequence[Summary]) -> str:
    reached = [float(s.rounds_to_target) for s in found if s.rounds_to_target is not None]
    if not reached:
        return NONE
    mean, _ = mean_interval(reached)
    return f"{mean:.{int(len(found) > 1)}f}" + (
        f" ({len(reached)} of {len(found)})" if len(reached) < len(found) else ""
    )


def _accuracy_cell(run: Run, strategy: str, alpha: float) -> str:
    """Final accuracy over the finished seeds, and how many of them have diverged."""
    finished = [result for result in run.results(alpha, strategy) if result.summary]
    if not finished:
        return NOT_FINISHED
    values = [summary.final_accuracy for summary in run.summaries(strategy, alpha)]
    cell = _plus_minus(*mean_interval(values), len(values), len(run.seeds))
    diverged = sum(result.diverged for result in finished)
    return f"{cell} ({NOT_FINITE} in {diverged} of {len(finished)})" if diverged else cell


def _whose(run: Run) -> str:
    """What the accuracy is of, and what was trained otherwise than by cohorts."""
    own = "; of local-only the mean over the clients' own models" if run.uses("local-only") else ""
    of = f"Accuracy of the global model on the test split, after the last round and not at its best{own}."
    if run.uses("central"):
        of += " central trains on all clients' samples in one place and has no cohort."
    if (policy := run.config.get("batch-norm", "aggregate")) != "aggregate":
        of += f' With batch-norm = "{policy}" clients use other models: their own accuracy is in metrics.jsonl.'
    return of


def _costs(groups: Sequence[Sequence[Summary]]) -> list[list[str]]:
    """Columns of seconds, MB up and MB down: the mean over each group, "–" for an empty one."""

    def column(values: Iterable[list[float]]) -> list[str]:
        return decimal_column([mean_interval(group)[0] if group else None for group in values])

    return [
        column([s.seconds for s in group] for group in groups),
        column([s.bytes_up / 1e6 for s in group] for group in groups),
        column([s.bytes_down / 1e6 for s in group] for group in groups),
    ]


def _plus_minus(mean: float, half_width: float | None, n: int, seeds: int, form: str = ".1f") -> str:
    """Percent with its interval; n is named where seeds are still missing."""
    spread = "" if half_width is None else f" ± {100 * half_width:.1f}"
    return f"{100 * mean:{form}}{spread}".replace("-", "−") + (f" (n={n})" if n < seeds else "")
