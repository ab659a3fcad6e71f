"""A run as one HTML page that needs nothing but itself: no network, no script, no second file."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import figures
from experiments.results import Run, read_run, split_without_alpha
from experiments.table import Cells, difference_cells, summary_cells
from fedwsa import files

PHASES = {"train": "training", "evaluate-clients": "evaluation on clients"}


def write_report(run_dir: Path) -> Path:
    """Draw `run_dir/report.html` from the files of a run, finished or not; the same files give the same bytes."""
    from jinja2 import Environment, StrictUndefined  # comes with torch
    from markupsafe import Markup

    run = read_run(run_dir)
    folder = run_dir.resolve()
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = template.from_string(_TEMPLATE).render(
        run=run,
        style=Markup(_STYLE),
        svg=lambda figure: Markup(_page_colours(figure)),
        what=_what_was_run(run),
        unfinished=_unfinished(run),
        result=summary_cells(run),
        differences=difference_cells(run),
        accuracy=figures.accuracy_figure(run),
        scope=figures.scope_figure(run),
        partitions=_partition_figures(run),
        server=_server_data(run),
        given=_given(run),
        failures=_failures(run),
        command=f"fedwsa run {shlex.quote(f'{folder.parent.name}/{folder.name}/config.toml')}",
        models=_models(run),
        config=(run_dir / "config.toml").read_text(encoding="utf-8"),
    )
    path = run_dir / "report.html"
    files.replace(path, page.encode())
    return path


def write_accuracy(run_dir: Path, picture: Path) -> None:
    """Write the report's figure of accuracy by round by itself, as an .svg; ValueError before the first evaluation."""
    if picture.suffix != ".svg":
        raise ValueError(f"{picture}: allowed is a name that ends in .svg")
    svg = figures.accuracy_figure(read_run(run_dir))
    if svg is None:
        raise ValueError(f"{run_dir}: no evaluation to draw yet")
    files.replace(picture, svg.encode())


def _page_colours(svg: str) -> str:
    """The page's colours, light or dark, instead of those for white paper."""
    names = {figures.INK: "ink", figures.MUTED: "muted", figures.GRID: "grid", figures.PAPER: "paper"}
    for colour, name in {**names, figures.BLUE: "blue"}.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _what_was_run(run: Run) -> str:
    """One sentence from the config."""
    known = {key: run.config.get(key, "?") for key in ("data", "num-clients", "cohort", "rounds", "model")}
    fixed, partitioner = split_without_alpha(run.config), run.config.get("partitioner", "dirichlet")
    if fixed is None:
        split = "Dirichlet partition" if partitioner == "dirichlet" else f"partition {partitioner}"
        split += f", α = {_enumerate([f'{alpha:g}' for alpha in run.alphas])}"
    else:
        split = "IID partition" if fixed == "IID" else f"partition {fixed}"
    seeds = ("seed " if len(run.seeds) == 1 else "seeds ") + _enumerate([str(seed) for seed in run.seeds])
    return (
        f"{_enumerate(run.strategies)} on {known['data']}: {known['num-clients']} clients ({split}), {known['cohort']} "
        f"of them a round, {known['rounds']} rounds, model {known['model']}, {seeds}."
    )


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
        return f"{samples:,}, to learn its merging coefficients" if name == "np-merge" else "none"

    rows = tuple((name, on_server(name)) for name in run.strategies)
    return Cells("", ("strategy", "labelled samples learnt from on the server"), rows, "")


def _failures(run: Run) -> Cells | None:
    """Client replies that were errors or were refused, with the rounds; None if there are none."""
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
    title = f"{total:,} client {'reply was an error or was' if total == 1 else 'replies were errors or were'} refused."
    return Cells(title, header, tuple(rows), "") if rows else None


def _models(run: Run) -> Cells | None:
    found = [summary for name in run.strategies for summary in run.summaries(name)]
    rows = tuple((s.strategy, run.split(s.alpha), str(s.seed), s.model_sha256) for s in found)
    return Cells("", ("strategy", "split", "seed", "SHA-256 of final.safetensors"), rows, "") if rows else None


_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --muted: #59636e; --grid: #dfe3e8; --wash: #f6f8fa;
  --blue: #0072b2; --warn: #9a4a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e4e8ec; --muted: #9aa5b1; --grid: #2c333b;
  --wash: #1b2027; --blue: #3b97d3; --warn: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--grid); }
p { margin: .5rem 0; max-width: 46rem; }
.lead { font-size: 1.05rem; color: var(--muted); }
.note, figcaption { font-size: .875rem; color: var(--muted); max-width: 46rem; }
.warn { border-left: 3px solid var(--warn); padding: .1rem 0 .1rem .9rem; margin: 1rem 0; }
.warn strong { color: var(--warn); }
.warn ul { margin: .25rem 0; padding-left: 1.1rem; }
.formula { white-space: nowrap; }
sub { font-size: .7em; line-height: 0; }
figcaption { margin-top: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9375rem; margin: .75rem 0; }
th { color: var(--muted); font-weight: 500; font-size: .8125rem; line-height: 1.3; vertical-align: bottom; }
th, td { padding: .42rem 1.1rem .42rem 0; text-align: left; border-bottom: 1px solid var(--grid); }
td { white-space: nowrap; }
tbody th { color: var(--ink); font: inherit; font-weight: 600; white-space: nowrap; }
tbody th, td { vertical-align: baseline; }
table.numbers { width: 100%; }
.numbers th + th, .numbers td { text-align: right; padding: .42rem 0 .42rem 1.1rem; }
figure { margin: .75rem 0 1.5rem; }
figure svg { display: block; width: 100%; min-width: 40rem; height: auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important; }
code, pre { font: .875rem/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--wash); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; margin: .75rem 0; }
td.sha { font: .8125rem ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
summary { cursor: pointer; }
@media print { main { max-width: none; padding: 0; } h2 { break-after: avoid; } figure, table { break-inside: avoid; }
  figure svg { min-width: 0; } }
"""

_TEMPLATE = """\
{% macro table(cells, kind="") %}
{% if cells.rows|length > 12 and not kind %}<details><summary>{{ cells.rows|length }} rows</summary>{% endif %}
<div class="scroll"><table{% if kind %} class="{{ kind }}"{% endif %}>
<thead><tr>{% for name in cells.header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in cells.rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td{% if cell|length == 64 %} class="sha"{% endif %}>\
{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if cells.rows|length > 12 and not kind %}</details>{% endif %}
{% endmacro %}
{% macro figure(drawing, label) %}
<figure><div class="scroll" role="img" aria-label="{{ label }}">
{{ svg(drawing) }}</div>
{% if caller is defined %}<figcaption>{{ caller() }}</figcaption>{% endif %}</figure>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ run.name }} · fedwsa</title>
<style>{{ style }}</style>
</head>
<body><main>
<h1>{{ run.name }}</h1>
<p class="lead">{{ what }}</p>
{% if unfinished %}
<div class="warn"><p><strong>This run is not finished.</strong> Still missing:</p>
<ul>{% for line in unfinished %}<li>{{ line }}</li>{% endfor %}</ul></div>
{% endif %}

<h2>Result</h2>
<p>{{ result.title }}</p>
{{ table(result, "numbers") }}
<p class="note">{{ result.note }}</p>

{% if differences %}
<h2>Paired differences</h2>
<p>{{ differences.title }}</p>
{{ table(differences, "numbers") }}
<p class="note">{{ differences.note }}</p>
{% endif %}

<h2>Accuracy by round</h2>
{% if accuracy %}
{% call figure(accuracy, "Accuracy of the global model by round, one line a strategy") %}
Accuracy of the global model on the server's test split{% if server.test %} of {{ "{:,}".format(server.test) }} samples\
{% endif %}; round 0 is the model before training.
{%- if run.seeds|length > 1 %} Line: mean over seeds; band: lowest to highest seed.{% endif %}
{% endcall %}
{% else %}
<p>No evaluation yet.</p>
{% endif %}

<h2>Scope distance by layer and round</h2>
<p>How far apart the clients' weights lie when they are averaged: for each layer,
<span class="formula">Σ<sub>k</sub> p<sub>k</sub> KL(client k ‖ fused)</span> in nats. Every client's layer counts as a
Gaussian with the mean and variance of its weights, p<sub>k</sub> is the client's share in the average, and 0 means that
all clients of the round returned the same scope.</p>
{% if scope %}
{% call figure(scope, "Scope distance by layer and round") %}
{% if run.seeds|length > 1 %}Mean over seeds. {% endif %}Lower is better aligned.
{% endcall %}
{% else %}
<p>No client sent a scope.</p>
{% endif %}

<h2>Who holds which labels</h2>
{% for drawing in partitions %}
{{ figure(drawing, "Samples by client and class") }}
{% else %}
<p>No partition was drawn yet.</p>
{% endfor %}
{% if partitions %}
<p class="note">Samples by client and class; an empty cell is a class that the client does not hold. The
stronger the colour, the more, on a square-root scale.
{%- if run.seeds|length > 1 %} Of several seeds the first is shown.{% endif %}</p>
{% endif %}

<h2>What each strategy was given</h2>
{% if server.samples %}
<p>The server holds {{ "{:,}".format(server.samples) }} labelled samples (origin: {{ server.origin }}). No client trains
on them, whatever the strategy. NP-Merge alone uses them, to learn its merging coefficients; plain FedAvg needs no such
data.
{% if "np-merge" in run.strategies %}
NP-Merge was therefore given labelled data that the others never saw.
{% else %}
NP-Merge is not part of this run, so they were not used.
{% endif %}
</p>
{% else %}
<p>The server holds no samples to learn from.</p>
{% endif %}
{{ table(given) }}
<p class="note">Beyond that, every strategy met the same partition, the same initial model and the same cohorts.
{%- if server.test %} The {{ "{:,}".format(server.test) }} test samples were used to evaluate and for nothing else.\
{% endif %}</p>

<h2>Failures</h2>
{% if failures %}
<p>{{ failures.title }}</p>
{{ table(failures) }}
<p class="note">A failed reply counts neither for the weights nor for the metrics of its round.</p>
{% else %}
<p>No client failed in any round that was logged.</p>
{% endif %}

<h2>How to repeat</h2>
<pre>{{ command }}</pre>
<p>The same config on the same kind of device gives the same final models, bit for bit, for any number of workers.</p>
{% if models %}
{{ table(models) }}
{% endif %}

<h2>Configuration</h2>
<pre>{{ config }}</pre>
</main></body>
</html>
"""
