"""Which weights share one mean and one variance: a layer's, an output channel's, or the whole model's.

These are the *units* of a weight scope. By `layer` a unit has the layer's name; by `channel` there is one for each
index of a layer's first dimension, "conv.weight[3]" (the output channel or unit of a convolution or linear layer, the
word of an embedding; of a transposed convolution, which PyTorch keeps the other way round, the input channel); by
`model` there is a single one, "model", of all layers' weights pooled. Layers are arXiv 2408.12237's; the other two are
ours.
"""

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod

GRANULARITIES = ("layer", "channel", "model")
MODEL = "model"


def check_granularity(granularity: str) -> None:
    """Raise ValueError if there is none of that name."""
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")


def channel_name(layer: str, index: int) -> str:
    """Name of a layer's channel."""
    return f"{layer}[{index}]"


def layer_of(unit: str, granularity: str) -> str:
    """Name of the layer that a unit belongs to; "model" for the whole."""
    return unit.rpartition("[")[0] if granularity == "channel" and unit.endswith("]") else unit


def matching(layers: Iterable[str], patterns: Collection[str]) -> list[str]:
    """The layers whose names match any of the patterns, `*` for any text, in their order.

    Raises ValueError for a pattern that matches none of them, but for `*`.
    """
    names = list(layers)
    for pattern in patterns:
        if pattern != "*" and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"layers = {pattern!r}: matches none of the model's layers, {', '.join(names) or '(none)'}"
            )
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def units(shapes: Mapping[str, Sequence[int]], granularity: str) -> dict[str, int]:
    """Names of the units of layers with these shapes, in their order, and how many weights each has."""
    check_granularity(granularity)
    if granularity == "model":
        return {MODEL: sum(map(prod, shapes.values()))} if shapes else {}
    if granularity == "layer":
        return {layer: prod(shape) for layer, shape in shapes.items()}
    return {channel_name(layer, index): prod(shape[1:]) for layer, shape in shapes.items() for index in range(shape[0])}
