"""Models in safetensors files: how a run begins with one, and stays repeatable."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn

from fedwsa.config import Config

SHOWN = 4  # tensor names in an error


def read(path: Path, sha256: str = "") -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; of a run's checkpoint, the model's.

    In the order of their names, numbers in them by size: the file does not keep the model's.
    sha256: hex digest that the file must have; empty: any.
    Raises ValueError, one line with the path, for a file that cannot be read, is none, or has another digest.
    """
    content = _content(path)
    found = hashlib.sha256(content).hexdigest()
    if sha256 and found != sha256:
        raise ValueError(f"{path}: its SHA-256 is {found}, allowed is {sha256}: the file that the config means")
    try:
        tensors = load(content)
    except Exception as error:  # whatever damaged bytes lead to
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
    prefix = "model/"  # of the model in a checkpoint, see `StrategyFolder.save_checkpoint`
    model = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return dict(sorted((model or tensors).items(), key=lambda item: _place(item[0])))


def begin(model: nn.Module, config: Config) -> None:
    """Give a model the numbers of the config's `initial-model`, in the model's own types; without one, nothing.

    Raises ValueError as `read` and `fill` do.
    """
    if config.initial_model:
        tensors = read(Path(config.initial_model), config.initial_model_sha256)
        where, remedy = f"initial-model {config.initial_model}", "allowed is a file of this model"
        fill(model, config.model, tensors, where, remedy)


@torch.no_grad()
def fill(model: nn.Module, name: str, tensors: Mapping[str, Tensor], where: str, remedy: str) -> None:
    """Give a model, called `name`, the numbers of `tensors`, in the model's own types.

    Raises ValueError, one line that begins with `where`, where names or shapes differ, and then ends with `remedy`, or
    a number is not finite.
    """
    state = model.state_dict()
    odd_ones = {"missing": state.keys() - tensors.keys(), "surplus": tensors.keys() - state.keys()}
    if unlike := [f"{how}: {_some(names)}" for how, names in odd_ones.items() if names]:
        raise ValueError(f"{where}: tensor names differ from those of model {name!r}; {'; '.join(unlike)}; {remedy}")
    if others := {key for key in state if state[key].shape != tensors[key].shape}:
        shapes = (f"{key} {tuple(tensors[key].shape)} instead of {tuple(state[key].shape)}" for key in others)
        raise ValueError(f"{where}: shapes differ from those of model {name!r}: {_some(shapes)}; {remedy}")
    for key, tensor in state.items():
        tensor.copy_(tensors[key])
    if odd := {key for key, tensor in state.items() if not tensor.isfinite().all()}:
        raise ValueError(f"{where}: NaN or infinite in {_some(odd)}; allowed are finite numbers")


def pinned(config: Config) -> Config:
    """The config with the SHA-256 of its initial model, so that what is repeated or resumed begins with the same.

    Raises ValueError, one line with the path, for a file that cannot be read.
    """
    if not config.initial_model or config.initial_model_sha256:
        return config
    digest = hashlib.sha256(_content(Path(config.initial_model))).hexdigest()
    return config.model_copy(update={"initial_model_sha256": digest})


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def _place(name: str) -> list[str | int]:
    """What puts layers.2 before layers.10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def _some(names: Iterable[str]) -> str:
    """The first few in the alphabet."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more
