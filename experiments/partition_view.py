"""Who holds which labels: for the terminal, as a picture, and as a file that a run can read back."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from clients.federation import FederatedData
from partitions import heterogeneity, stored

MAX_CLIENTS = 40
MAX_CLASS_COLUMNS = 10


def partition_table(label_counts: Sequence[Sequence[int]]) -> Table:
    """A row a client: size, number of classes held, and the counts; of more than 40 clients the first 40.

    Up to ten classes have a column each; of more, a client's largest are listed as label: count.
    """
    counts = np.asarray(label_counts)
    if counts.ndim != 2 or 0 in counts.shape:
        raise ValueError(f"label counts must be [clients][classes] and not empty, got shape {counts.shape}")
    clients, classes = counts.shape
    sizes = counts.sum(1)
    narrow = classes <= MAX_CLASS_COLUMNS
    caption = (
        f"{clients} clients hold {sizes.min():,} to {sizes.max():,} samples, {np.median(sizes):,.0f} in the median"
    )
    if clients > MAX_CLIENTS:
        caption += f"; the first {MAX_CLIENTS} are shown, {clients - MAX_CLIENTS} are left out"
    table = Table(title="Samples by client and class", caption=Text(caption + "."), box=box.SIMPLE_HEAD, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    table.title_justify = table.caption_justify = "left"
    for name in ("client", "size", "classes", *(map(str, range(classes)) if narrow else ())):
        table.add_column(name, justify="right", overflow="fold")
    if not narrow:
        table.add_column("largest (label: count)", overflow="fold")
    for client, row in enumerate(counts[:MAX_CLIENTS]):
        cells = [str(count or "·") for count in row] if narrow else [_largest(row)]
        table.add_row(str(client), str(sizes[client]), str(np.count_nonzero(row)), *cells)
    return table


def heterogeneity_table(label_counts: Sequence[Sequence[int]]) -> Table:
    """How unlike the clients are: a row a number of `partitions.heterogeneity`."""
    found = heterogeneity(label_counts)
    table = Table(title="How unlike the clients are", box=None, show_header=False, pad_edge=False)
    table.title_justify = "left"
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    classes = len(label_counts[0])
    for name, value, meaning in (
        ("total variation", found.total_variation, "from all clients' labels: 0 alike, below 1"),
        ("Jensen–Shannon distance", found.jensen_shannon, "from the same: 0 alike, below 1"),
        ("effective classes", found.effective_classes, f"of a client: 1 to {classes}"),
        ("Gini of the sizes", found.size_gini, "0 equal, near 1: one client holds all"),
    ):
        table.add_row(name, f"{value:.3f}", meaning)
    return table


def describe(made_by: Mapping[str, Any]) -> str:
    """How a partition was made, in one line: "dirichlet, α = 0.1, min-size = 2, seed = 0"; what is off is left out."""
    words = {"alpha": "α", "beta": "β"}
    shown = {key: value for key, value in made_by.items() if key == "seed" or (key != "partitioner" and value)}
    said = [
        f"{words.get(key, key.replace('_', '-'))} = {f'{value:g}' if isinstance(value, float) else value}"
        for key, value in shown.items()
    ]
    return ", ".join([str(made_by.get("partitioner", "partition of unknown origin")), *said])


def partition_json(holdings: FederatedData) -> bytes:
    """The partition as `partitions.stored` reads it, with the counts that a report shows."""
    data = holdings.dataset
    content = stored.to_json(data.name, data.train_labels, holdings.parts, holdings.server, holdings.made_by)
    summary = {
        "label_counts": holdings.label_counts().tolist(),
        "num_classes": data.num_classes,
        "server_samples": len(holdings.server),
        "server_origin": f"training split of {data.name}, held out from every client",
        "test_samples": len(data.test_labels),
    }
    return json.dumps(summary | content).encode()


def _largest(row: "np.ndarray[tuple[int], np.dtype[np.int64]]", shown: int = 4) -> str:
    """A client's largest classes, ties by label: "3: 120, 17: 80 and 2 more"."""
    order = [int(label) for label in np.argsort(-row, kind="stable") if row[label]]
    more = f" and {len(order) - shown} more" if len(order) > shown else ""
    return ", ".join(f"{label}: {row[label]}" for label in order[:shown]) + more
