"""A run as one HTML page that needs nothing but itself: no network, no script, no second file."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import figures, round_figures
from experiments.page import STYLE, TEMPLATE
from experiments.results import Run, read_run
from experiments.table import Cells, detail_cells, difference_cells, summary_cells
from fedwsa.config import ALIGNED
from fedwsa.run_folder import write_atomically

PHASES = {"train": "training", "evaluate-clients": "evaluation on clients"}


def write_report(run_dir: Path) -> Path:
    """Draw `run_dir/report.html` from the files of a run, finished or not.

    The same files give the same bytes, but for `run_dir` in the command to repeat the run, which is as it is given.
    """
    from jinja2 import Environment, StrictUndefined  # comes with torch
    from markupsafe import Markup

    run = read_run(run_dir)
    panels = round_figures.shown_panels(run)
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = template.from_string(TEMPLATE).render(
        run=run,
        style=Markup(STYLE),
        svg=lambda figure: Markup(_page_colours(figure)),
        what=_what_was_run(run),
        unfinished=_unfinished(run),
        result=summary_cells(run),
        details=detail_cells(run),
        differences=difference_cells(run),
        accuracy=figures.accuracy_figure(run),
        scope=figures.scope_figure(run),
        averaging=[each for alpha in run.alphas if (each := round_figures.averaging_figure(run, alpha))],
        panels=panels,
        drawn={panel.name for panel in panels},
        missing=round_figures.missing_panels(run),
        measure_every=run.config.get("measure-every", 0),
        partitions=_partition_figures(run),
        server=_server_data(run),
        np_merge=run.learns_on_server,
        given=_given(run),
        failures=_failures(run),
        command=f"fedwsa run {shlex.quote(str(run_dir / 'config.toml'))}",
        models=_models(run),
        config=(run_dir / "config.toml").read_text(encoding="utf-8"),
    )
    path = run_dir / "report.html"
    write_atomically(path, page.encode())
    return path


def write_accuracy(run_dir: Path, picture: Path) -> None:
    """Write the report's figure of accuracy by round by itself, as SVG; ValueError before the first evaluation."""
    svg = figures.accuracy_figure(read_run(run_dir))
    if svg is None:
        raise ValueError(f"{run_dir}: no evaluation to draw yet")
    write_atomically(picture, svg.encode())


def _page_colours(svg: str) -> str:
    """The page's colours, light or dark, instead of those for white paper."""
    names = {figures.INK: "ink", figures.MUTED: "muted", figures.GRID: "grid", figures.PAPER: "paper"}
    for colour, name in {**names, figures.BLUE: "blue"}.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _what_was_run(run: Run) -> str:
    """One sentence from the config."""
    known = {key: run.config.get(key, "?") for key in ("data", "num-clients", "cohort", "rounds", "model")}
    fixed, partitioner = run.split_without_alpha, run.config.get("partitioner", "dirichlet")
    if fixed is None:
        split = "Dirichlet partition" if partitioner == "dirichlet" else f"partition {partitioner}"
        split += f", α = {_enumerate([f'{alpha:g}' for alpha in run.alphas])}"
    else:
        split = "IID partition" if fixed == "IID" else f"partition {fixed}"
    seeds = ("seed " if len(run.seeds) == 1 else "seeds ") + _enumerate([str(seed) for seed in run.seeds])
    return (
        f"{_enumerate(run.strategies)} on {known['data']}: {_counted(known['num-clients'], 'client')} ({split}), "
        f"{known['cohort']} of them a round, {_counted(known['rounds'], 'round')}, model {known['model']}, {seeds}."
    )


def _counted(number: Any, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _enumerate(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def _unfinished(run: Run) -> list[str]:
    """What is still missing, a line a strategy."""
    missing = []
    for name in run.strategies:
        results = [federation.results[name] for federation in run.federations]
        finished = sum(result.summary is not None for result in results)
        begun = sum(bool(result.events) for result in results)
        if finished == len(results):
            continue
        if len(results) > 1:
            missing.append(f"{name}: {finished} of {len(results)} federations finished, {begun} begun")
        else:
            last = max((event["round"] for event in results[0].events), default="none")
            missing.append(f"{name}: round {last} of {run.config.get('rounds', '?')}")
    return missing


def _partition_figures(run: Run) -> list[str]:
    """One figure for every α, of the first seed whose partition was drawn."""
    first = {f.alpha: f for f in reversed(run.federations) if f.partition}
    return [
        figures.partition_figure(first[a].partition["label_counts"], f"{run.split(a)}, seed {first[a].seed}")  # type: ignore[index]
        for a in run.alphas
        if a in first
    ]


def _server_data(run: Run) -> dict[str, Any]:
    """Number and origin of the server's own samples, and the size of the test split."""
    drawn = next((f.partition for f in run.federations if f.partition), {})
    return {
        "samples": drawn.get("server_samples", run.config.get("server-samples", 0)),
        "origin": drawn.get("server_origin", "held out from every client"),
        "test": drawn.get("test_samples"),
    }


def _given(run: Run) -> Cells:
    """Labelled samples that a strategy learns from on the server: NP-Merge alone does, of ours."""
    samples = _server_data(run)["samples"]

    def on_server(name: str) -> str:
        if ":" in name:
            return "as its own code decides"
        learns = run.learns_on_server and name.removesuffix(ALIGNED) == "np-merge"
        return f"{samples:,}, to learn its merging coefficients" if learns else "none"

    rows = tuple((name, on_server(name)) for name in run.strategies)
    return Cells("", ("strategy", "labelled samples learnt from on the server"), rows, "")


def _failures(run: Run) -> Cells | None:
    """Client replies that did not come, were errors or were refused, with the rounds; None if there are none."""
    rows, total = [], 0
    for federation in run.federations:
        for name, result in federation.results.items():
            for phase, words in PHASES.items():
                failed = {e["round"]: e.get("num_failed", 0) for e in result.events if e["phase"] == phase}
                rounds = [str(number) for number, count in failed.items() if count]
                if rounds:
                    total += sum(failed.values())
                    listed = ", ".join(rounds[:12]) + (f" and {len(rounds) - 12} more" if len(rounds) > 12 else "")
                    where = (name, run.split(federation.alpha), str(federation.seed), words)
                    rows.append((*where, f"{sum(failed.values()):,}", listed))
    header = ("strategy", "split", "seed", "phase", "failed replies", "in rounds")
    what = "reply is missing, was an error or was" if total == 1 else "replies are missing, were errors or were"
    title = f"{total:,} client {what} refused."
    return Cells(title, header, tuple(rows), "") if rows else None


def _models(run: Run) -> Cells | None:
    found = [summary for name in run.strategies for summary in run.summaries(name)]
    rows = tuple((s.strategy, run.split(s.alpha), str(s.seed), s.model_sha256) for s in found)
    return Cells("", ("strategy", "split", "seed", "SHA-256 of final.safetensors"), rows, "") if rows else None
