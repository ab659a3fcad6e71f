"""What a run leaves behind: events as they happen, checkpoints and models, each written whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from fedwsa import files
from fedwsa.errors import RunError, UsageError

if TYPE_CHECKING:  # a report is drawn without PyTorch
    from torch import Tensor

    from fedwsa.config import Config

KEEP = 2  # checkpoints of a strategy

METRICS, FINAL, CONFIG, PARTITION = "metrics.jsonl", "final.safetensors", "config.toml", "partition.json"
LOCK = ".lock"
CLIENTS = "clients"  # beside a strategy's checkpoints: what its clients keep
STATE_SUFFIX = ".state"  # of the files there, whose names begin with the partition id and "-"

_LOG = logging.getLogger("fedwsa")


class RunFolderError(RunError):
    """Something in a run folder, or in its place, that cannot be read or written; one line with the path."""


class FolderInUseError(UsageError):
    """A folder that another run holds."""


def write_atomically(path: Path, content: bytes) -> None:
    """`files.replace` in a folder that is made where it is not there; RunFolderError instead of OSError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, content)
    except OSError as error:
        raise unwritable(path, error) from error


def remove(path: Path) -> None:
    """Unlink a file, if it is there; RunFolderError instead of OSError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be removed: {error.strerror or error}") from error


def discard_leftovers(folder: Path) -> None:
    """Remove what processes that were killed in `write_atomically` left; for the one that has claimed the folder."""
    for temporary in folder.rglob(".*.tmp"):
        remove(temporary)


def part_name(alpha: float, seed: int) -> str:
    """The folder of one federation in a run of several: α to six digits."""
    return f"alpha-{alpha:g}_seed-{seed}"


def new_folder(config: Config) -> Path:
    """Where a config's run goes: `out-dir`, or else `<runs-dir>/<time>-<name>`, made here so that it is nobody else's.

    Raises UsageError where it cannot be made.
    """
    if config.out_dir:
        return Path(config.out_dir)
    first = folder = Path(config.runs_dir, f"{time.strftime('%Y%m%d-%H%M%S')}-{config.name}")
    number = 1
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(first.parent, error) from error
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:  # of a run that started in the same second
            number += 1
            folder = first.with_name(f"{first.name}-{number}")
        except OSError as error:
            raise unusable(folder, error) from error


def claim(folder: Path) -> Callable[[], None]:
    """Lock a run folder against other processes until the returned function is called or this process ends.

    Raises FolderInUseError where another process holds it, UsageError where it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise unusable(folder, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise FolderInUseError(f"{folder}: in use by another run; wait for it or choose another folder") from None
    except OSError as error:  # a file system without locks
        file.close()
        raise unusable(folder, error) from error
    return file.close


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A strategy's run after a round: the model, the strategy's state, clients' files, where metrics.jsonl ended."""

    server_round: int
    model: dict[str, Tensor]
    strategy_state: dict[str, Tensor]
    client_states: dict[int, Path]  # by partition id
    metrics_bytes: int


class StrategyFolder:
    """One strategy's part of a run folder: `metrics.jsonl`, `checkpoints/` and `final.safetensors`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / METRICS
        self.final = path / FINAL
        self.checkpoints = path / "checkpoints"
        self.clients = self.checkpoints / CLIENTS

    def record(self, event: Mapping[str, Any]) -> None:
        """Append one event as one line."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise unwritable(self.metrics, error) from error

    def save_checkpoint(
        self,
        server_round: int,
        model: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        client_files: Mapping[str, int] | None = None,
    ) -> None:
        """One safetensors file whose metadata hold the JSON part: the two cannot come apart.

        client_files: in `clients`, with their bytes; they stay until the last checkpoint that counts on them goes.
        """
        header = {"round": server_round, "metrics-bytes": self._sync_metrics(), CLIENTS: dict(client_files or {})}
        tensors = {f"model/{name}": tensor for name, tensor in model.items()}
        tensors |= {f"strategy/{name}": tensor for name, tensor in state.items()}
        path = self.checkpoints / f"round-{server_round:06d}.safetensors"
        write_atomically(path, _saved(tensors, {"checkpoint": json.dumps(header)}))
        for old in self._checkpoints()[:-KEEP]:
            remove(old)
        self._remove_old_states()

    def _checkpoints(self) -> list[Path]:
        """The oldest first."""
        return sorted(self.checkpoints.glob("round-*.safetensors"))

    def _remove_old_states(self) -> None:
        """Those that no checkpoint counts on; none where one cannot be read, which might."""
        if not self.clients.is_dir():
            return
        try:
            counted_on = {name for path in self._checkpoints() for name in _header(path).get(CLIENTS, {})}
        except Exception:  # whatever damaged bytes lead to
            return
        for file in self.clients.glob(f"*{STATE_SUFFIX}"):
            if file.name not in counted_on:
                remove(file)

    def resume(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, with metrics.jsonl cut back to its moment; None: start anew.

        A damaged one is passed over with a warning: those before it lead to the same model. RunFolderError if none
        is whole.
        """
        paths = self._checkpoints()[::-1]
        for path in paths:
            try:
                checkpoint = read_checkpoint(path)
                self._cut_metrics(checkpoint.metrics_bytes)
            except OSError as error:
                raise unreadable(path, error) from error
            except Exception as error:  # whatever damaged bytes lead to
                _LOG.warning("%s: passed over, since it is damaged (%s)", path, error)
            else:
                self._remove_old_states()
                return checkpoint
        if paths:
            raise RunFolderError(f"{self.checkpoints}: no checkpoint is whole; delete {self.path} to begin it anew")
        remove(self.metrics)
        self._remove_old_states()
        return None

    def save_final(self, model: Mapping[str, Tensor]) -> None:
        """The model after the last round."""
        if self.metrics.exists():
            self._sync_metrics()
        write_atomically(self.final, _saved(model))
        self._remove_old_states()

    def _sync_metrics(self) -> int:
        """Bytes of metrics.jsonl, all of them on the disk now: a checkpoint must not outlive what it counts on."""
        try:
            with self.metrics.open("ab") as file:
                os.fsync(file.fileno())
                return file.tell()
        except OSError as error:
            raise unwritable(self.metrics, error) from error

    def _cut_metrics(self, size: int) -> None:
        with self.metrics.open("ab") as file:
            if file.tell() < size:
                raise ValueError(f"{self.metrics} is shorter than it was at this checkpoint")
            file.truncate(size)


def unwritable(path: Path, error: OSError) -> RunFolderError:
    """What to say of a file that the system does not take."""
    return RunFolderError(f"{path}: cannot be written: {error.strerror or error}")


def unreadable(path: Path, error: Exception) -> RunFolderError:
    """What to say of a file that the system does not give, or whose bytes are damaged."""
    return RunFolderError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")


def unusable(folder: Path, error: OSError) -> UsageError:
    """What to say of a folder that the system does not give."""
    return UsageError(f"{folder}: cannot be used as a run folder: {error.strerror or error}")


def _saved(tensors: Mapping[str, Tensor], header: dict[str, str] | None = None) -> bytes:
    from safetensors.torch import save

    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(own, header)  # it refuses tensors that share memory


def _header(checkpoint: Path) -> dict[str, Any]:
    with safe_open(checkpoint, framework="pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()["checkpoint"])
    return header


def read_checkpoint(path: Path) -> Checkpoint:
    """What `save_checkpoint` wrote; raises whatever damaged bytes lead to."""
    header = _header(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if any(name.startswith("client/") for name in tensors):
        raise ValueError("written by an earlier version, with what clients keep inside")
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "strategy": {}}
    for name, tensor in tensors.items():
        part, _, own_name = name.partition("/")
        parts[part][own_name] = tensor
    client_states = {}
    for name, size in header.get(CLIENTS, {}).items():
        kept = path.parent / CLIENTS / name
        if not kept.is_file() or kept.stat().st_size != size:
            raise ValueError(f"{kept} is not what it was at this checkpoint")
        client_states[int(name.partition("-")[0])] = kept
    return Checkpoint(header["round"], parts["model"], parts["strategy"], client_states, header["metrics-bytes"])
