"""What is said of a config that cannot run: a line for each problem, with key, value and what is allowed."""

import difflib
import json
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError


class ContradictionError(ValueError):
    """Values that are well each by itself and impossible together: for each, the keys and the line."""

    def __init__(self, found: list[tuple[set[str], str]]) -> None:
        super().__init__("\n".join(line for _, line in found))
        self.found = found


def problems(error: ValidationError, model: type[BaseModel], wrong: Collection[str] = ()) -> tuple[list[str], set[str]]:
    """A line for each problem of a `model`, but none that has to do with a key in `wrong`; and the keys that are wrong.

    A problem of no single key is a ContradictionError.
    """
    schemas = _schemas(model)
    lines, keys = [], set()
    for problem in error.errors(include_url=False):
        location = [part for part in problem["loc"] if isinstance(part, str)]  # without positions in a list
        key = ".".join(location)
        if not location:
            lines += [line for keys_, line in problem["ctx"]["error"].found if keys_.isdisjoint(wrong)]
            continue
        keys.add(location[0])
        if problem["type"] == "extra_forbidden":
            lines.append(_unknown(key, problem["input"], schemas))
        else:
            text = "text in quotes, " if problem["type"] == "string_type" and "description" in schemas[key] else ""
            lines.append(f"{key} = {shown(problem['input'])}: allowed is {text}{_allowed(schemas[key])}")
    return lines, keys


def _unknown(key: str, value: Any, schemas: Iterable[str]) -> str:
    section, _, last = key.rpartition(".")
    if not last:
        return f"{shown(key)} = {shown(value)}: the key is missing; allowed is key = value"
    names = [known for known in schemas if known.rpartition(".")[0] == section]
    by_last = {known.rpartition(".")[2]: known for known in [*schemas, *names]}  # the same section's come first
    nearest = difflib.get_close_matches(last, by_last, n=1)
    hint = f"did you mean {by_last[nearest[0]]}? " if nearest else ""
    return f"{key}: unknown key; {hint}allowed are {', '.join(names)}"


@cache
def _schemas(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """What is allowed for each key, sections' keys dotted, as JSON Schema."""
    schema = model.model_json_schema()
    schemas: dict[str, dict[str, Any]] = {}
    for key, value in schema["properties"].items():
        schemas[key] = value
        if "$ref" in value:
            section = schema["$defs"][value["$ref"].rpartition("/")[2]]["properties"]
            schemas |= {f"{key}.{name}": inner for name, inner in section.items()}
    return schemas


def _allowed(schema: Mapping[str, Any]) -> str:
    if "description" in schema:
        return str(schema["description"])
    if "$ref" in schema:
        return "a section with keys of its own"
    if "enum" in schema:
        *most, last = [shown(value) for value in schema["enum"]]
        return f"{', '.join(most)} or {last}"
    if schema["type"] == "array":
        return f"{_allowed(schema['items'])}, or a list of such, not empty"
    kinds = {
        "integer": "a whole number",
        "number": "a finite number",
        "boolean": "true or false",
        "string": "text in quotes",
    }
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[bound]}" for bound, sign in bounds.items() if bound in schema]
    return f"{kinds[schema['type']]} {' and '.join(limits)}".rstrip()


def shown(value: Any) -> str:
    """As TOML would have it."""
    return json.dumps(value, ensure_ascii=False, default=str)
