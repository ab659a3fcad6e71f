"""What a run leaves behind: events as they happen, checkpoints and models, each written whole or not at all."""

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fedwsa.config import Config
from fedwsa.errors import RunError, UsageError

KEEP = 2  # checkpoints of a strategy

METRICS, FINAL, CONFIG, PARTITION = "metrics.jsonl", "final.safetensors", "config.toml", "partition.json"


class RunFolderError(RunError):
    """Something in a run folder that cannot be read or written; the message is one line with the path."""


class FolderInUseError(UsageError):
    """A folder that another run holds."""


def write_atomically(path: Path, content: bytes) -> None:
    """All of `content` or nothing: a temporary file beside `path`, synced, then renamed over it.

    Raises RunFolderError (a full disk, no permission); then `path` is what it was before.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error


def new_folder(config: Config) -> Path:
    """Where a config's run goes: `out-dir`, or else `<runs-dir>/<time>-<name>`."""
    return Path(config.out_dir or Path(config.runs_dir, f"{time.strftime('%Y%m%d-%H%M%S')}-{config.name}"))


def claim(folder: Path) -> Callable[[], None]:
    """Lock a run folder against other processes until the returned function is called or this process ends.

    Raises FolderInUseError where another process holds it, RunFolderError where it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be used as a run folder: {error.strerror or error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise FolderInUseError(f"{folder}: in use by another run; wait for it or choose another folder") from None
    return file.close


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A strategy's run after a round: the model, the strategy's own state, and where metrics.jsonl ended."""

    server_round: int
    model: dict[str, Tensor]
    strategy_state: dict[str, Tensor]
    metrics_bytes: int


class StrategyFolder:
    """One strategy's part of a run folder: `metrics.jsonl`, `checkpoints/` and `final.safetensors`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / METRICS
        self.final = path / FINAL
        self.checkpoints = path / "checkpoints"

    def record(self, event: Mapping[str, Any]) -> None:
        """Append one event as one line."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise RunFolderError(f"{self.metrics}: cannot be written: {error.strerror or error}") from error

    def save_checkpoint(self, server_round: int, model: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """One safetensors file whose metadata hold the JSON part: the two cannot come apart."""
        header = {"round": server_round, "metrics-bytes": self.metrics.stat().st_size}
        tensors = {f"model/{name}": tensor for name, tensor in model.items()}
        tensors |= {f"strategy/{name}": tensor for name, tensor in state.items()}
        path = self.checkpoints / f"round-{server_round:06d}.safetensors"
        write_atomically(path, save(_own_memory(tensors), {"checkpoint": json.dumps(header)}))
        for old in sorted(self.checkpoints.glob("round-*.safetensors"))[:-KEEP]:
            old.unlink()

    def resume(self) -> Checkpoint | None:
        """The newest checkpoint that can be read, with metrics.jsonl cut back to its moment; None: start anew."""
        for path in sorted(self.checkpoints.glob("round-*.safetensors"), reverse=True):
            try:
                checkpoint = _read_checkpoint(path)
            except Exception as error:
                raise RunFolderError(
                    f"{path}: not a readable checkpoint ({error}); delete it to use the one before"
                ) from error
            if self.metrics.stat().st_size > checkpoint.metrics_bytes:
                os.truncate(self.metrics, checkpoint.metrics_bytes)
            return checkpoint
        self.metrics.unlink(missing_ok=True)
        return None

    def save_final(self, model: Mapping[str, Tensor]) -> None:
        """The model after the last round."""
        write_atomically(self.final, save(_own_memory(model)))


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Safetensors refuses tensors that share memory."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _read_checkpoint(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["checkpoint"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "strategy": {}}
    for name, tensor in tensors.items():
        part, _, own_name = name.partition("/")
        parts[part][own_name] = tensor
    return Checkpoint(header["round"], parts["model"], parts["strategy"], header["metrics-bytes"])
