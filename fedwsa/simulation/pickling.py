"""What of an app cannot be sent to another process, by name."""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

from ray import cloudpickle

DEPTH = 8  # steps from the app to what is to blame


def dumps(value: Any, name: str) -> bytes:
    """Pickle by value what this process alone has. Raises ValueError that names the part which cannot be."""
    try:
        return cloudpickle.dumps(value)  # type: ignore[no-untyped-call,no-any-return]
    except Exception as error:
        raise ValueError(f"{name} cannot be sent to the workers: {_blame(value, name, DEPTH)}: {error}") from error


def _blame(value: Any, name: str, depth: int) -> str:
    """The innermost part that fails by itself."""
    if depth:
        for part_name, part in _parts(value, name):
            try:
                cloudpickle.dumps(part)  # type: ignore[no-untyped-call]
            except Exception:
                return _blame(part, part_name, depth - 1)
    return f"{name}, a {type(value).__name__}"


def _parts(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if inspect.isfunction(value):
        used = inspect.getclosurevars(value)
        for kind, variables in (("variable", used.nonlocals), ("global", used.globals)):
            for key, part in variables.items():
                yield f"{kind} {key!r} of {value.__qualname__}()", part
        for parameter in inspect.signature(value).parameters.values():
            yield f"argument {parameter.name!r} of {value.__qualname__}()", parameter.default
    elif inspect.ismethod(value):
        yield type(value.__self__).__qualname__, value.__self__
    elif isinstance(value, partial):
        for place, part in (*enumerate(value.args), *value.keywords.items()):
            yield f"argument {place!r} of partial({getattr(value.func, '__qualname__', value.func)})", part
        yield name, value.func
    elif isinstance(value, dict):
        for key, part in value.items():
            yield f"{name}[{key!r}]", part
    elif isinstance(value, list | tuple):
        for position, part in enumerate(value):
            yield f"{name}[{position}]", part
    else:
        for key, part in getattr(value, "__dict__", {}).items():
            yield f"{name}.{key}", part
