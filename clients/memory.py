"""What a client keeps from round to round: arrays by name, in Flower's `Context.state`."""

from collections.abc import Mapping, MutableMapping
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Context
from torch import Tensor

from fedwsa import messages
from fedwsa.arrays import pack


def recall(context: Context, settings: ConfigRecord, what: str) -> ArrayRecord | None:
    """What this client kept in an earlier round of the strategy whose message says `settings`; None before that."""
    return cast(ArrayRecord | None, context.state.get(_key(settings, what)))


def remember(context: Context, settings: ConfigRecord, what: str, state: Mapping[str, Tensor]) -> None:
    """Keep arrays in place of what was kept before; their memory is handed over.

    Raises ValueError for numbers that are not finite: the client keeps what it had, and is left out of this round
    alone, where it would carry them into each later one.
    """
    if not all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point()):
        raise ValueError(f"what this client would keep ({what}) is not finite")
    cast(MutableMapping[str, Any], context.state)[_key(settings, what)] = pack(state)


def _key(settings: ConfigRecord, what: str) -> str:
    """Real clients keep their state while one strategy follows another."""
    return f"{what} {settings.get(messages.STRATEGY, '')!s}".rstrip()
