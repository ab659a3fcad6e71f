"""The configuration of a run: one model, every key with its meaning, range and default.

Keys are written with hyphens in TOML, on the command line and in Flower's run config (`num-clients`).
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedwsa.errors import UsageError


class ConfigError(UsageError):
    """A configuration that cannot run; the message has one line a problem: key, value, what is allowed."""


def _as_list(value: Any) -> Any:
    """A single value or "a,b,c" where a list is meant."""
    if isinstance(value, str):
        return [_number_or_text(part.strip()) for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _number_or_text(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _as_tuple(value: Any) -> Any:
    return tuple(_as_list(value))


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
        validate_by_alias=True,
    )


class WSAConfig(_Section):
    """Weight scope alignment (DESIGN of the method: `fedwsa.scope`)."""

    strength: NonNegative = 1.0  # λ
    mode: Literal["loss", "proximal"] = "loss"
    reduction: Literal["sum", "mean"] = "sum"  # over layers
    target: Literal["fused", "initial"] = "fused"
    variance: Literal["mean", "mixture", "independent", "merged"] = "mean"  # how variances are fused


class NPMergeConfig(_Section):
    """Learning of the coefficients of NP-Merge on the server's held-out split."""

    steps: Annotated[int, Field(ge=0)] = 20  # a pair of models
    learning_rate: Positive = 0.1
    batch_size: Annotated[int, Field(ge=1)] = 100
    align: bool = True  # permute hidden units first


class Config(_Section):
    """Everything that decides a run. Sizes are counts of samples or clients, times are seconds."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)] = "main"
    strategies: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (
        "fedavg",
        "fedavg-wsa",
        "np-merge",
    )

    data: str = "digits"
    data_dir: str = ""  # where the data set's own files lie; empty: the usual places
    num_clients: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    partitioner: str = "dirichlet"
    alpha: Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (0.1,)
    min_size: Annotated[int, Field(ge=1)] = 2  # samples of the smallest client
    server_samples: Annotated[int, Field(ge=0)] = 100  # held out from every client
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of each client's samples

    model: str = "mlp"
    seed: Annotated[tuple[Seed, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (0,)

    rounds: Annotated[int, Field(ge=1)] = 30
    cohort: Annotated[int, Field(ge=1)] = 10
    evaluation_cohort: Annotated[int, Field(ge=0)] = 10  # clients that evaluate the model; 0: none
    evaluate_every: Annotated[int, Field(ge=1)] = 1  # rounds
    local_epochs: Annotated[int, Field(ge=1)] = 5
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Positive = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegative = 0.0
    target_accuracy: Annotated[float, Field(gt=0, le=1)] = 0.8

    wsa: WSAConfig = WSAConfig()
    np_merge: NPMergeConfig = NPMergeConfig()

    engine: Literal["ray", "inprocess"] = "ray"
    workers: Annotated[int, Field(ge=0, le=1024)] = 0  # 0: one a core
    threads_per_client: Annotated[int, Field(ge=1)] = 1
    timeout: Positive = 600.0  # of one phase of a round
    checkpoint_every: Annotated[int, Field(ge=1)] = 1  # rounds
    runs_dir: str = "runs"
    out_dir: str = ""  # empty: <runs-dir>/<time>-<name>

    @model_validator(mode="after")
    def _possible(self) -> Self:
        problems = []
        for key in ("cohort", "evaluation-cohort"):
            if (value := getattr(self, key.replace("-", "_"))) > self.num_clients:
                problems.append(f"{key} = {value}: allowed is at most num-clients = {self.num_clients}")
        if "np-merge" in self.strategies and self.server_samples == 0:
            problems.append("server-samples = 0: np-merge learns on the server's split; allowed is at least 1 with it")
        if self.evaluation_cohort and self.validation_fraction == 0:
            problems.append("validation-fraction = 0: clients evaluate on it; allowed with evaluation-cohort = 0 only")
        if self.evaluation_cohort and self.min_size < 2:
            problems.append(
                f"min-size = {self.min_size}: one sample to train on and one to evaluate; allowed is at least 2, "
                "or evaluation-cohort = 0"
            )
        for key in ("strategies", "alpha", "seed"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                problems.append(f"{key} = {list(values)}: allowed are different values")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def federations(self) -> list["Config"]:
        """One config for each (α, seed), in this order: all seeds of the first α, then of the next."""
        return [self.model_copy(update={"alpha": (a,), "seed": (s,)}) for a in self.alpha for s in self.seed]

    def to_toml(self) -> str:
        """Every value; `parse` of it gives an equal config."""
        return tomli_w.dumps(_plain(self.model_dump(by_alias=True)))

    def to_run_config(self) -> dict[str, bool | int | float | str]:
        """Flat scalars for Flower's run config; `from_run_config` of it gives an equal config."""
        return dict(_flat(_plain(self.model_dump(by_alias=True))))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples of one value as that value, longer ones as lists."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            plain[key] = _plain(value)
        elif isinstance(value, tuple):
            plain[key] = list(value) if len(value) > 1 or key == "strategies" else value[0]
        else:
            plain[key] = value
    return plain


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, bool | int | float | str]]:
    flat: list[tuple[str, bool | int | float | str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{key}.")
        else:
            flat.append((prefix + key, ",".join(map(str, value)) if isinstance(value, list) else value))
    return flat


def from_run_config(run_config: Mapping[str, Any]) -> Config:
    """Config from Flower's flat run config, where sections are dotted keys (`wsa.strength`)."""
    nested: dict[str, Any] = {}
    for key, value in run_config.items():
        assign(nested, key, value)
    return parse(nested)


def assign(values: dict[str, Any], dotted_key: str, value: Any) -> None:
    """Set `values["a"]["b"]` for the key "a.b"."""
    *sections, last = dotted_key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{dotted_key}: {section} is a single value, not a section")
    values[last] = value


def parse(values: Mapping[str, Any]) -> Config:
    """Config from nested values; raises ConfigError with a line for each problem: key, value, what is allowed."""
    try:
        return Config.model_validate(_hyphenated(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error))) from None


def _hyphenated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hyphens for underscores, so that both spellings of one key cannot stand side by side."""
    spelled: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("_", "-")
        if name in spelled:
            raise ConfigError(f"{key}: given twice (as {name} too)")
        spelled[name] = _hyphenated(value) if isinstance(value, Mapping) else value
    return spelled


def read(path: Path) -> dict[str, Any]:
    """Values of a TOML file; ConfigError names the file and the place where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _lines(error: ValidationError) -> list[str]:
    lines: list[str] = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"] if isinstance(part, str))
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key; allowed are {', '.join(_known_keys(problem['loc'][:-1]))}")
        elif not problem["loc"]:  # of the check over several keys
            lines += str(problem["ctx"]["error"]).splitlines()
        else:
            lines.append(f"{key} = {problem['input']!r}: {_allowed(problem['msg'])}")
    return lines


def _allowed(message: str) -> str:
    return message.replace("Input should be ", "allowed is ").replace("a valid ", "a ")


def _known_keys(location: Sequence[str | int]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {"wsa": WSAConfig, "np-merge": NPMergeConfig}
    section = sections[str(location[0])] if location else Config
    return [field.replace("_", "-") for field in section.model_fields]
