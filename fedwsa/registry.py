"""Find a thing by its registered name or by an import path."""

import importlib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def lookup(registry: Mapping[str, T], name: str, kind: str) -> T:
    """Return `registry[name]`, or what the import path `name` ("package.module:attribute") points at.

    kind: what the registry holds ("model", "data set"), for the error.
    Raises ValueError, in one line, if `name` is neither; what an import path points at is not checked.
    """
    if name in registry:
        return registry[name]
    remedy = f"registered are {', '.join(sorted(registry))}; or give an import path package.module:attribute"
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise ValueError(f"unknown {kind} {name!r}: {remedy}")
    try:
        found: T = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError) as error:  # TypeError: a relative module name
        raise ValueError(f"unknown {kind} {name!r} ({error}): {remedy}") from error
    return found
