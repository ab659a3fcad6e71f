"""What stands in a message between server and client; the only place where its keys are named.

A train or evaluate message holds

* ``arrays`` (ArrayRecord): the model's state dict;
* ``config`` (ConfigRecord): ``server-round``, ``schema-version`` and, where a strategy aligns weight scopes,
  the target ``scope-names``, ``scope-means``, ``scope-variances`` (lists of length L) with ``scope-strength`` (λ),
  ``scope-mode`` and ``scope-reduction``, and, where they are not the default, ``scope-divergence`` (forward-kl),
  ``scope-granularity`` (layer; the names are then those of the units, `fedwsa.granularity`) with ``scope-layers``, the
  layers that the unit "model" pools, and ``scope-share`` (0; if more, each client finds λ itself,
  `WeightScopeRegularizer.fix_strength`); ``strategy``, its name, by which clients tell what they keep for it;
  ``partition-sha256``, of the partition file that they read, where there is one; and ``objective``, what clients
  minimise besides the task's loss (`clients.objectives`), with its numbers (``proximal-mu``; ``control-option``, I or
  II; ``dynamic-alpha``; ``contrastive-mu`` and ``temperature``); ``local-arrays``, which arrays
  stay with the client where it is not the config that says so (a policy of `clients.batch_norm`); ``pooled-samples``
  (true: train on everybody's, which only a simulation's clients can) and ``test-split-too`` (true, of an evaluation: on
  the whole test split besides);
* further ArrayRecords where the strategy has such: ``control``, the control variate of SCAFFOLD by the parameters that
  train. In a reply it is the change of the client's own.

A message of type ``evaluate.test_split``, which only a simulation sends, has ``first-sample`` and ``last-sample``
(not included) in its ``config`` besides: the part of the test split to evaluate on, by whoever's turn it is.

A reply holds the ArrayRecords that its message held (training only; in the order in which they came) and ``metrics``
(MetricRecord):
``num-examples``, the weight of the client; ``loss`` (nats a sample) and, of an evaluation, ``accuracy``, with
``test-examples``, ``test-loss`` and ``test-accuracy`` where the server asked for the test split too; of a training
also the scope of the weights that it sends, ``scope-means`` and ``scope-variances``, one number a layer in the order of
the layers in ``arrays``; ``unit-means`` and ``unit-variances``, the same by unit, where the server asked for a
granularity other than layers; ``scope-strength``, the λ that it found, where it asked for a ``scope-share``; and
``local-steps``, how many steps the optimiser made, where it asked for the objective "fednova". A client that sends no
scope counts for the model and not for the fusion of scopes.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedwsa import arrays as flower_arrays
from fedwsa.granularity import units
from fedwsa.scope import WeightScope

SCHEMA_VERSION = 1

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
NUM_EXAMPLES, LOSS, ACCURACY = "num-examples", "loss", "accuracy"
SERVER_ROUND, VERSION, STRATEGY, PARTITION = "server-round", "schema-version", "strategy", "partition-sha256"
OBJECTIVE, PROXIMAL_MU = "objective", "proximal-mu"  # the latter is Flower's name
CONTRASTIVE_MU, TEMPERATURE, LOCAL_STEPS = "contrastive-mu", "temperature", "local-steps"
CONTROL, CONTROL_OPTION, DYNAMIC_ALPHA = "control", "control-option", "dynamic-alpha"
LOCAL, POOLED, TEST_TOO = "local-arrays", "pooled-samples", "test-split-too"
TEST_EXAMPLES, TEST_LOSS, TEST_ACCURACY = "test-examples", "test-loss", "test-accuracy"
FIRST_SAMPLE, LAST_SAMPLE = "first-sample", "last-sample"
SCOPE_NAMES, SCOPE_MEANS, SCOPE_VARIANCES = "scope-names", "scope-means", "scope-variances"
SCOPE_STRENGTH, SCOPE_MODE, SCOPE_REDUCTION = "scope-strength", "scope-mode", "scope-reduction"
SCOPE_DIVERGENCE, SCOPE_GRANULARITY, SCOPE_SHARE = "scope-divergence", "scope-granularity", "scope-share"
SCOPE_LAYERS = "scope-layers"
UNIT_MEANS, UNIT_VARIANCES = "unit-means", "unit-variances"

TEST_SPLIT = "evaluate.test_split"  # the type of an evaluation that a worker does for the server

MAX_EXAMPLES = 10**9  # of one client; more is taken for a mistake or an attack
COUNTED = {"fednova": (LOCAL_STEPS,)}  # by objective, the metrics that replies have to have besides; each at least 1


@dataclass(frozen=True, slots=True)
class Alignment:
    """Target scope and how strongly the clients train towards it; share > 0: each fixes its own λ by it.

    layers: those that the unit of granularity "model" pools, empty for the others.
    """

    target: WeightScope
    strength: float
    mode: str
    reduction: str
    divergence: str = "forward-kl"
    granularity: str = "layer"
    share: float = 0.0
    layers: tuple[str, ...] = ()


def pack_alignment(alignment: Alignment) -> dict[str, Any]:
    """Entries of the train message's ConfigRecord."""
    optional = {
        SCOPE_DIVERGENCE: (alignment.divergence, "forward-kl"),
        SCOPE_GRANULARITY: (alignment.granularity, "layer"),
        SCOPE_SHARE: (alignment.share, 0.0),
        SCOPE_LAYERS: (list(alignment.layers), []),
    }
    return {
        SCOPE_NAMES: list(alignment.target.names),
        SCOPE_MEANS: alignment.target.means.tolist(),
        SCOPE_VARIANCES: alignment.target.variances.tolist(),
        SCOPE_STRENGTH: alignment.strength,
        SCOPE_MODE: alignment.mode,
        SCOPE_REDUCTION: alignment.reduction,
        **{key: value for key, (value, default) in optional.items() if value != default},
    }


def unpack_alignment(config: ConfigRecord) -> Alignment | None:
    """The alignment that a train message asks for, if any."""
    if SCOPE_NAMES not in config:
        return None
    entries = cast(Mapping[str, Any], config)
    return Alignment(
        target=WeightScope(
            tuple(entries[SCOPE_NAMES]),
            torch.tensor(entries[SCOPE_MEANS], dtype=torch.float64),
            torch.tensor(entries[SCOPE_VARIANCES], dtype=torch.float64),
        ),
        strength=float(entries[SCOPE_STRENGTH]),
        mode=str(entries[SCOPE_MODE]),
        reduction=str(entries[SCOPE_REDUCTION]),
        divergence=str(entries.get(SCOPE_DIVERGENCE, "forward-kl")),
        granularity=str(entries.get(SCOPE_GRANULARITY, "layer")),
        share=float(entries.get(SCOPE_SHARE, 0.0)),
        layers=tuple(entries.get(SCOPE_LAYERS, ())),
    )


def layer_names(record: ArrayRecord) -> tuple[str, ...]:
    """Names of the layers, the arrays that have a scope, in the record's order."""
    return tuple(name for name, array in record.items() if len(array.shape) >= 2 and array.dtype.startswith("float"))


def unit_sizes(record: ArrayRecord, granularity: str) -> dict[str, int]:
    """Names of the units of the record's layers, in order, and how many weights each has."""
    return units({name: record[name].shape for name in layer_names(record)}, granularity)


def pack_scope(scope: WeightScope, granularity: str = "layer") -> dict[str, list[float]]:
    """Entries of the reply's MetricRecord."""
    means, variances = _scope_keys(granularity)
    return {means: scope.means.tolist(), variances: scope.variances.tolist()}


def _scope_keys(granularity: str) -> tuple[str, str]:
    return (SCOPE_MEANS, SCOPE_VARIANCES) if granularity == "layer" else (UNIT_MEANS, UNIT_VARIANCES)


def take_scope(
    metrics: MutableMapping[str, Any], layers: int, granularity: str = "layer"
) -> tuple[list[float], list[float]] | None:
    """Take a reply's scope out of its metrics: means and variances of so many layers, or units of another granularity.

    None where it has none such.
    """
    means, variances = (metrics.pop(key, None) for key in _scope_keys(granularity))
    if not (isinstance(means, list) and isinstance(variances, list) and len(means) == len(variances) == layers):
        return None
    return None if any(variance < 0 for variance in variances) else (means, variances)


def arrays_of(message: Message) -> ArrayRecord:
    """The model in a message that has one."""
    return cast(ArrayRecord, message.content[ARRAYS])


def config_of(message: Message) -> ConfigRecord:
    """What the server says."""
    return cast(ConfigRecord, message.content[CONFIG])


def metrics_of(message: Message) -> MetricRecord:
    """What a client says."""
    return cast(MetricRecord, message.content[METRICS])


def check_version(config: ConfigRecord) -> None:
    """ValueError if the server speaks another version; a server that names none is taken as a stock Flower one."""
    version = config.get(VERSION, SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{VERSION} = {version!r}: this client speaks {SCHEMA_VERSION}; "
            "install the same fedwsa on server and clients"
        )


def payload_bytes(content: RecordDict) -> int:
    """Logical size of a message: the numbers and texts it holds, without keys, headers or compression."""
    total = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            total += flower_arrays.num_bytes(record)
        else:
            total += sum(_value_bytes(value) for value in record.values())
    return total


def _value_bytes(value: Any) -> int:
    if isinstance(value, list):
        return sum(_value_bytes(item) for item in value)
    return len(value.encode() if isinstance(value, str) else value) if isinstance(value, str | bytes) else 8
