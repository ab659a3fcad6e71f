"""The report's page: its style sheet, and its Jinja template, which `experiments.report` fills in."""

STYLE = """
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

TEMPLATE = """\
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
{% macro over_seeds() %}
{% if run.seeds|length > 1 %} Line: at each round the mean over the seeds that have a value there; band: from the lowest
of them to the highest.{% endif %}
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
{% if details and details.rows %}
{{ table(details) }}
<p class="note">{{ details.note }}</p>
{% endif %}

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
{{- over_seeds() }}
{% endcall %}
{% else %}
<p>No evaluation yet.</p>
{% endif %}

<h2>Scope distance by layer and round</h2>
<p>How far apart the clients' weights lie when they are averaged: for each layer,
<span class="formula">Σ<sub>k</sub> p<sub>k</sub> KL(client k ‖ fused)</span> in nats. Every client's layer counts as a
Gaussian with the mean and variance of its weights, p<sub>k</sub> is the client's share in the average, and 0 means that
all clients of the round returned the same scope; a round in which fewer than two replies could be used has none.</p>
{% if scope %}
{% call figure(scope, "Scope distance by layer and round") %}
Lower is better aligned.
{%- if run.seeds|length > 1 %} At each round it is the mean over the seeds that have a value there.{% endif %}
{% endcall %}
{% else %}
<p>In no round two clients sent a scope.</p>
{% endif %}

<h2>What averaging does</h2>
{% for drawing in averaging %}
{{ figure(drawing, "What averaging does, by round") }}
{% else %}
<p>Nothing of it was measured.</p>
{% endfor %}
{% if averaging %}
<p class="note">
{%- for panel in panels %}<strong>{{ panel.name|capitalize }}</strong>: {{ panel.meaning }}.
{% if panel.name == "barrier" and np_merge %}
NP-Merge has learnt on these samples, so that its own is too low.
{% endif %}
{% endfor %}
{% if "norm" in drawn and measure_every > 1 %}
All but spreads and distances are measured every {{ measure_every }} rounds.
{%- endif %}{{ over_seeds() }}</p>
{% if missing %}
<p class="note"><strong>Not drawn</strong>: {% for why, names in missing.items() %}{{ names|join(", ") }} ({{ why }})\
{{ "; " if not loop.last else "." }}{% endfor %}</p>
{% endif %}
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
on them, whatever the strategy. Of our strategies NP-Merge alone learns from them, its merging coefficients; plain
FedAvg needs no such data.
{% set idle = "takes no step in" if run.uses("np-merge") else "is not part of" %}
{% if np_merge %}
NP-Merge was therefore given labelled data that the others never saw.
{% if "barrier" in drawn %}
The barrier above is a loss on them too, whatever the strategy; no model learns from it.
{% endif %}
{% elif "barrier" in drawn %}
NP-Merge {{ idle }} this run: of ours only the barrier above used them, from which no model learns.
{% else %}
NP-Merge {{ idle }} this run, and no barrier was measured: nothing of ours used them.
{% endif %}
</p>
{% else %}
<p>The server holds no samples to learn from.</p>
{% endif %}
{{ table(given) }}
<p class="note">Beyond that, every strategy{% if run.uses("central") %} but central{% endif %} met the same partition, \
the same initial model and the same cohorts.
{%- if run.uses("central") %} central began with the same model and trained on the samples of all clients in one place,
with no cohort: no federation, but what one may be measured against.{% endif %}
{%- if run.uses("local-only") %} With local-only nothing is combined: each client goes on with its own model.{% endif %}
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
