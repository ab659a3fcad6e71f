"""Find a thing by its registered name or by an import path, and see whether it can be called as it will be."""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def lookup(registry: Mapping[str, T], name: str, kind: str, suffix: str = "") -> T:
    """Return `registry[name]`, or what the import path `name` ("package.module:attribute") points at.

    kind: what the registry holds ("model", "data set"), for the error. suffix: what may stand behind each name too.
    Raises ValueError, in one line, if `name` is neither; what an import path points at is not checked.
    """
    plain = name.removesuffix(suffix)
    if plain in registry:
        return registry[plain]
    module, _, attribute = plain.partition(":")
    if not (module and attribute):
        raise ValueError(f"unknown {kind} {name!r}: {_remedy(registry, name, suffix)}")
    try:
        found: T = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError) as error:  # TypeError: a relative module name
        raise ValueError(f"unknown {kind} {name!r} ({error}): {_remedy(registry, name, suffix)}") from error
    return found


def _remedy(registry: Mapping[str, object], name: str, suffix: str) -> str:
    known = sorted(registry)
    nearest = difflib.get_close_matches(name.lower(), dict.fromkeys([*known, *(each + suffix for each in known)]), n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    also = f", each also with {suffix} behind it" if suffix else ""
    return f"{hint}registered are {', '.join(known)}{also}; or give an import path package.module:attribute"


def signature_of(found: object, who: str, way: str) -> inspect.Signature:
    """The signature of what will be called.

    who: what the user named ("model 'my:net'"). way: how it will be called ("(parameters, lr)"). Both for the error.
    Raises ValueError, in one line, if it is no callable, or one that is built in and has no signature.
    """
    if not callable(found):
        raise ValueError(f"{who} does not take {way}: it is a {type(found).__name__}, not a callable")
    try:
        return inspect.signature(found)
    except ValueError as error:
        raise ValueError(f"{who} does not take {way}: {error}") from error


def check_call(found: object, who: str, way: str, *arguments: object, **keywords: object) -> None:
    """Raise ValueError, in one line as `signature_of`, unless these arguments fit; nothing is called."""
    signature = signature_of(found, who, way)
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        raise ValueError(f"{who} does not take {way}: {error}") from error
