"""The configuration of a run: one model, every key with its meaning, range and default.

Keys are written with hyphens in TOML, on the command line and in Flower's run config (`num-clients`).
"""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from fedwsa.errors import UsageError
from fedwsa.problems import ContradictionError, problems, shown
from fedwsa.sections import (
    FedAdagradConfig,
    FedAdamConfig,
    FedAvgMConfig,
    FedDynConfig,
    FedExPConfig,
    FedLWSConfig,
    FedProxConfig,
    FedTrimmedAvgConfig,
    FedYogiConfig,
    KrumConfig,
    MoonConfig,
    NonNegative,
    NPMergeConfig,
    Positive,
    ScaffoldConfig,
    Section,
    Texts,
    WSAConfig,
    as_tuple,
)


class ConfigError(UsageError):
    """A configuration that cannot run; the message has one line a problem: key, value, what is allowed."""


ALIGNED = "-wsa"  # behind any strategy's name: with weight scope alignment around it

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Digest = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$", description="64 hexadecimal digits, or empty")]
Initialisation = Literal[
    "default", "kaiming-normal", "kaiming-uniform", "xavier-normal", "xavier-uniform", "orthogonal"
]


class Config(Section):
    """Everything that decides a run. Sizes are counts of samples or clients, times are seconds."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
            max_length=80,
            description="up to 80 letters, digits, dots, hyphens and underscores, the first a letter or digit",
        ),
    ] = "main"
    strategies: Texts = ("fedavg", "fedavg-wsa", "np-merge")

    data: str = "digits"
    data_dir: str = ""  # where the data set's own files lie; empty: the usual places
    image_size: Annotated[int, Field(ge=0)] = 0  # pixels a side that images are cut and scaled to; 0: left as they are
    feature_shift: str = ""  # what makes clients' images unlike: noise, rotation, contrast; empty: nothing
    shift_strength: NonNegative = 0.1  # at the last client: std of the noise, full turns, share of the contrast lost
    num_clients: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    partitioner: str = "dirichlet"
    alpha: Annotated[tuple[Positive, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (0.1,)
    min_size: Annotated[int, Field(ge=1)] = 2  # samples of the smallest client
    balanced: bool = False  # dirichlet: equal sizes
    shards_per_client: Annotated[int, Field(ge=1)] = 2
    classes_per_client: Annotated[int, Field(ge=1)] = 2  # label_skew
    beta: Positive = 0.5  # quantity_skew: sizes ~ Dir(β)
    size_sigma: NonNegative = 0.0  # quantity_skew: if > 0, sizes are log-normal with this σ of their logarithm instead
    partition_file: str = ""  # to read instead: a partition.json of `fedwsa partition` or a run; empty: none
    partition_sha256: Digest = ""  # of who holds what by that file, `partitions.stored.sha256`; a run fills it in
    server_samples: Annotated[int, Field(ge=0)] = 100  # held out from every client
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of each client's samples

    model: str = "mlp"
    width: Positive = 1.0  # a factor for the model's channels and hidden units, where it has such an option
    norm: Literal["batch", "group"] = "batch"  # of the residual networks
    init: Initialisation = "default"  # of the weights; default: as the model itself begins
    initial_model: str = ""  # a safetensors file to begin with, e.g. a run's final.safetensors; empty: none
    initial_model_sha256: Digest = ""  # that the file must have; a run fills it in
    batch_norm: Literal["aggregate", "local", "local-statistics"] = "aggregate"  # what stays with the clients
    seed: Annotated[tuple[Seed, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (0,)

    rounds: Annotated[int, Field(ge=1)] = 30
    cohort: Annotated[int, Field(ge=1)] = 10
    evaluation_cohort: Annotated[int, Field(ge=0)] = 10  # clients that evaluate the model; 0: none
    evaluate_every: Annotated[int, Field(ge=1)] = 1  # rounds; by clients and by the server, and after the last round
    measure_every: Annotated[int, Field(ge=0)] = 5  # rounds; of updates and barriers, `strategies.measures`; 0: never
    local_epochs: Annotated[int, Field(ge=1)] = 5
    batch_size: Annotated[int, Field(ge=1)] = 32
    optimizer: str = "sgd"  # of the clients: sgd, adam, adamw, … of torch.optim; its state begins anew each round
    learning_rate: Positive = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegative = 0.0
    clip_norm: NonNegative = 0.0  # of the task's gradient, and MOON's, at a client's step, all parameters; 0: none
    augmentation: str = ""  # of training images, anew at each step: flip, crop-flip; empty: none
    target_accuracy: Annotated[float, Field(gt=0, le=1)] = 0.8

    wsa: WSAConfig = WSAConfig()
    np_merge: NPMergeConfig = NPMergeConfig()
    fedprox: FedProxConfig = FedProxConfig()
    scaffold: ScaffoldConfig = ScaffoldConfig()
    feddyn: FedDynConfig = FedDynConfig()
    moon: MoonConfig = MoonConfig()
    fedexp: FedExPConfig = FedExPConfig()
    fedlws: FedLWSConfig = FedLWSConfig()
    fedavgm: FedAvgMConfig = FedAvgMConfig()
    fedadam: FedAdamConfig = FedAdamConfig()
    fedyogi: FedYogiConfig = FedYogiConfig()
    fedadagrad: FedAdagradConfig = FedAdagradConfig()
    fedtrimmedavg: FedTrimmedAvgConfig = FedTrimmedAvgConfig()
    krum: KrumConfig = KrumConfig()

    engine: Literal["ray", "inprocess"] = "ray"
    workers: Annotated[int, Field(ge=0, le=1024)] = 0  # 0: as many as fit
    threads_per_client: Annotated[int, Field(ge=1)] = 1
    cpus_per_client: Positive = 1.0  # of Ray's; 0.5: two clients on a core
    gpus_per_client: NonNegative = 0.0  # of Ray's; 0.25: four clients on a card; 0: clients compute on the CPU
    ray_address: str = ""  # of a cluster to join, "auto" for the one here; empty: Ray is started on this machine
    timeout: Positive = 600.0  # of one phase of a round
    on_client_failure: Literal["skip", "fail"] = "skip"  # leave the client out of the round, or end the run
    min_replies: Annotated[int, Field(ge=1)] = 1  # usable ones that a training round needs
    checkpoint_every: Annotated[int, Field(ge=1)] = 1  # rounds
    runs_dir: str = "runs"
    out_dir: str = ""  # empty: <runs-dir>/<time>-<name>

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if found := list(self._contradictions()):
            raise ContradictionError(found)
        return self

    def _contradictions(self) -> Iterator[tuple[set[str], str]]:
        for key, value in (("cohort", self.cohort), ("evaluation-cohort", self.evaluation_cohort)):
            if value > self.num_clients:
                yield {key, "num-clients"}, f"{key} = {value}: allowed is at most num-clients = {self.num_clients}"
        if self.min_replies > self.cohort:
            line = f"min-replies = {self.min_replies}: allowed is at most cohort = {self.cohort}"
            yield {"min-replies", "cohort"}, line
        if self.engine == "inprocess" and (self.gpus_per_client or self.ray_address):
            key = "gpus-per-client" if self.gpus_per_client else "ray-address"
            yield {"engine", key}, f'{key}: with engine = "inprocess" it means nothing; allowed is engine = "ray"'
        if self.initial_model and self.init != "default":
            line = f'init = "{self.init}": with an initial-model it means nothing; allowed is "default"'
            yield {"init", "initial-model"}, line
        if self.initial_model_sha256 and not self.initial_model:
            line = "initial-model-sha256: without an initial-model it means nothing; allowed is empty"
            yield {"initial-model-sha256", "initial-model"}, line
        if self.partition_sha256 and not self.partition_file:
            line = "partition-sha256: without a partition-file it means nothing; allowed is empty"
            yield {"partition-sha256", "partition-file"}, line
        unused = type(self).model_fields["shift_strength"].default
        if not self.feature_shift and self.shift_strength != unused:
            line = f"shift-strength = {self.shift_strength}: without a feature-shift it means nothing; "
            yield {"shift-strength", "feature-shift"}, f"{line}allowed is {unused}"
        if self.partition_file and len(self.alpha) > 1:
            line = f"alpha = {shown(self.alpha)}: with a partition-file it decides nothing; allowed is one value"
            yield {"alpha", "partition-file"}, line
        for line in self.wsa.contradictions():
            yield {"wsa"}, line
        if self.uses("np-merge") and self.server_samples == 0:
            line = "server-samples = 0: np-merge learns on the server's split; allowed with it is a whole number ≥ 1"
            yield {"server-samples", "strategies"}, line
        if self.uses("local-only") and self.evaluation_cohort == 0:
            line = "evaluation-cohort = 0: only its clients can evaluate local-only; allowed with it is ≥ 1"
            yield {"evaluation-cohort", "strategies"}, line
        if self.uses("central") and self.min_replies > 1:
            line = f"min-replies = {self.min_replies}: central trains in one place; allowed with it is 1"
            yield {"min-replies", "strategies"}, line
        if self.uses("krum") and self.cohort < 2 * self.krum.num_malicious + 3:
            line = (
                f"krum.num-malicious = {self.krum.num_malicious}: of a cohort of {self.cohort} fewer must be bad; "
                "allowed is at most (cohort − 3)/2"
            )
            yield {"krum", "cohort", "strategies"}, line
        if self.uses("fednova") and self.optimizer != "sgd":
            line = f'optimizer = "{self.optimizer}": fednova knows how far steps of SGD go; allowed with it is "sgd"'
            yield {"optimizer", "strategies"}, line
        if self.fedlws.min_tau > self.fedlws.max_tau:
            line = f"fedlws.min-tau = {self.fedlws.min_tau:g}: allowed is at most max-tau = {self.fedlws.max_tau:g}"
            yield {"fedlws"}, line
        if self.uses("scaffold") and self.scaffold.option == "II" and self.optimizer != "sgd":
            line = f'scaffold.option = "II": allowed with optimizer = "{self.optimizer}" is "I"'
            yield {"scaffold", "optimizer", "strategies"}, line
        if self.evaluation_cohort and self.validation_fraction == 0:
            line = "validation-fraction = 0: clients evaluate on it; allowed is > 0, or evaluation-cohort = 0"
            yield {"validation-fraction", "evaluation-cohort"}, line
        if self.evaluation_cohort and self.min_size < 2:
            line = (
                f"min-size = {self.min_size}: a client trains on one sample and evaluates on another; "
                "allowed is a whole number ≥ 2, or evaluation-cohort = 0"
            )
            yield {"min-size", "evaluation-cohort"}, line
        alphas = [f"{alpha:g}" for alpha in self.alpha]  # as folders are named
        for key, values in (("strategies", self.strategies), ("alpha", alphas), ("seed", self.seed)):
            if len(set(values)) < len(values):
                how = " in their first six digits" if key == "alpha" else ""
                given = shown(getattr(self, key))
                yield {key}, f"{key} = {given}: allowed are values that differ from each other{how}"

    def __hash__(self) -> int:
        """Of what mostly tells configs apart: Pydantic's own takes a hundred times as long, once a client."""
        return hash((self.name, self.data, self.model, self.num_clients, self.alpha, self.seed, self.partitioner))

    def uses(self, strategy: str) -> bool:
        """Whether a strategy is among those to run, by itself or aligned."""
        return any(name.removesuffix(ALIGNED) == strategy for name in self.strategies)

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
    """Set `values["a"]["b"]` for the key "a.b"; underscores in the key count as hyphens."""
    *sections, last = dotted_key.replace("_", "-").split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{dotted_key}: {section} is given as a single value too; allowed is one of the two")
    values[last] = value


def parse(values: Mapping[str, Any]) -> Config:
    """Config from nested values; raises ConfigError with a line for each problem: key, value, what is allowed."""
    spelled = hyphenated(values)
    try:
        return Config.model_validate(spelled)
    except ValidationError as error:
        lines, wrong = problems(error, Config)
    if wrong:  # then the check over several keys was not reached; it is made without those that are wrong themselves
        try:
            Config.model_validate({key: value for key, value in spelled.items() if key not in wrong})
        except ValidationError as error:
            lines += problems(error, Config, wrong)[0]
    raise ConfigError("\n".join(lines))


def hyphenated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hyphens for underscores, so that both spellings of one key cannot stand side by side."""
    spelled: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("_", "-")
        if name in spelled:
            raise ConfigError(f"{name}: given twice, with a hyphen and with an underscore; allowed is one of the two")
        spelled[name] = hyphenated(value) if isinstance(value, Mapping) else value
    return spelled


def read(path: Path) -> dict[str, Any]:
    """Values of a TOML file, keys with hyphens; ConfigError names the file and the place where it cannot be read."""
    try:
        return hyphenated(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
