"""Sections of a run's configuration: what belongs to one method, each key with its meaning, range and default."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def as_tuple(value: Any) -> Any:
    """A single value or "a,b,c" where several are meant."""
    if isinstance(value, str):
        return tuple(_number_or_text(part.strip()) for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _number_or_text(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Texts = Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)]


class Section(BaseModel):
    """Keys with hyphens, no others than those named, values of exactly their types; not changed once made."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
        validate_by_alias=True,
    )


class WSAConfig(Section):
    """Weight scope alignment (DESIGN of the method: `fedwsa.scope`)."""

    strength: NonNegative = 1.0  # λ
    mode: Literal["loss", "proximal"] = "loss"
    reduction: Literal["sum", "mean"] = "sum"  # over layers
    divergence: Literal["forward-kl", "reverse-kl", "wasserstein"] = "forward-kl"
    granularity: Literal["layer", "channel", "model"] = "layer"  # whose weights share a mean and a variance
    layers: Texts = ("*",)  # that are aligned: their parameters' names, or patterns with `*` in them
    schedule: Literal["constant", "first-k-rounds", "linear-decay", "relative"] = "constant"  # of the strength
    schedule_rounds: Annotated[int, Field(ge=0)] = 0  # first-k-rounds: k; linear-decay: after so many it is 0
    share: NonNegative = 0.0  # relative: the term's gradient norm as a share of the task's, at a round's first step
    target: Literal["fused", "initial", "gaussian", "init-scheme"] = "fused"
    target_mean: Annotated[float, Field(allow_inf_nan=False)] = 0.0  # gaussian
    target_std: NonNegative = 0.0  # gaussian
    target_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0  # fused: share of the old target that stays
    variance: Literal["mean", "mixture", "independent", "merged"] = "mean"  # how variances are fused

    def contradictions(self) -> Iterator[str]:
        """A line for each key that needs, or means nothing with, another's value."""
        if self.mode == "proximal" and self.divergence == "reverse-kl":
            yield 'wsa.divergence = "reverse-kl": has no proximal map; allowed is wsa.mode = "loss", or another one'
        for key, value, owner, owned in (
            ("schedule-rounds", self.schedule_rounds, "schedule", ("first-k-rounds", "linear-decay")),
            ("share", self.share, "schedule", ("relative",)),
            ("target-std", self.target_std, "target", ("gaussian",)),
        ):
            chosen = getattr(self, owner)
            if (chosen in owned) != (value > 0):
                allowed = "> 0" if chosen in owned else "0"
                yield f'wsa.{key} = {value:g}: allowed with wsa.{owner} = "{chosen}" is {allowed}'
        if self.target_mean and self.target != "gaussian":
            yield f'wsa.target-mean = {self.target_mean:g}: allowed with wsa.target = "{self.target}" is 0'
        if self.target_momentum and self.target != "fused":
            yield f'wsa.target-momentum = {self.target_momentum:g}: allowed with wsa.target = "{self.target}" is 0'


class NPMergeConfig(Section):
    """Learning of the coefficients of NP-Merge on the server's held-out split."""

    steps: Annotated[int, Field(ge=0)] = 20  # a pair of models
    learning_rate: Positive = 0.1
    batch_size: Annotated[int, Field(ge=1)] = 100
    align: bool = True  # permute hidden units first


class FedProxConfig(Section):
    """FedProx."""

    mu: NonNegative = 0.01  # μ of the proximal term; the paper tries 0.001 to 1


class FedAvgMConfig(Section):
    """FedAvgM, Flower's; without momentum and at a rate of 1 it is FedAvg."""

    server_learning_rate: Positive = 1.0
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class FedAdamConfig(Section):
    """FedAdam, Flower's."""

    server_learning_rate: Positive = 0.1  # to be tuned: about the largest change of a weight in a round
    beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Positive = 0.001  # weights whose changes are smaller than this are hardly adapted


class FedYogiConfig(FedAdamConfig):
    """FedYogi, Flower's."""

    server_learning_rate: Positive = 0.01


class FedAdagradConfig(Section):
    """FedAdagrad, Flower's."""

    server_learning_rate: Positive = 0.1
    tau: Positive = 0.001


class FedTrimmedAvgConfig(Section):
    """FedTrimmedAvg, Flower's."""

    beta: Annotated[float, Field(ge=0, lt=0.5)] = 0.2  # share of the clients that is cut off at either end


class KrumConfig(Section):
    """Krum, Flower's."""

    num_malicious: Annotated[int, Field(ge=0)] = 0  # clients that it withstands; the cohort has at least 2f + 3


class ScaffoldConfig(Section):
    """SCAFFOLD."""

    option: Literal["I", "II"] = "II"  # what a client's control variate becomes: the gradient at x, or the steps' mean
    server_learning_rate: Positive = 1.0  # η_g


class MoonConfig(Section):
    """MOON."""

    mu: NonNegative = 1.0  # μ of the contrast; the paper tries 0.1 to 10
    temperature: Positive = 0.5


class FedExPConfig(Section):
    """FedExP."""

    epsilon: Positive = 0.001  # ε, on the scale of the squared norm of a mean update


class FedLWSConfig(Section):
    """FedLWS; with a largest τ of 0 it is FedAvg."""

    beta: NonNegative = 0.03  # τ is β times the spread of the clients' updates of a layer,
    min_tau: NonNegative = 0.01  # at least this,
    max_tau: NonNegative = 0.2  # and at most this


class FedDynConfig(Section):
    """FedDyn."""

    alpha: Positive = 0.01  # α of the dynamic regulariser; the paper tries 0.001 to 0.1
