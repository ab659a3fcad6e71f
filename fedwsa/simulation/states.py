"""What clients keep from round to round (`Context.state`): a file each, not in the server's memory."""

import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Wire  # pylint: disable=no-name-in-module

from fedwsa.run_folder import STATE_SUFFIX, remove, unreadable, unwritable

Kept = str | bytes  # a file's path; or what one holds, where the client's process does not see the server's files


def pack(state: RecordDict) -> bytes:
    """Flower's wire format, which holds no code; empty for an empty state. Raises TypeError for anything else."""
    if not isinstance(state, RecordDict):
        raise TypeError(f"the client's state is of type {type(state).__name__}, not a RecordDict")
    return recorddict_to_proto(state).SerializeToString(deterministic=True) if state else b""


def unpack(packed: bytes) -> RecordDict:
    """The inverse."""
    return recorddict_from_proto(Wire.FromString(packed)) if packed else RecordDict()


def read(kept: Kept | None) -> bytes:
    """A packed state; empty where there is none. Raises RunFolderError."""
    if not isinstance(kept, str):
        return kept or b""
    try:
        return Path(kept).read_bytes()
    except OSError as error:
        raise unreadable(Path(kept), error) from error


def load(kept: Kept | None) -> tuple[bytes, RecordDict]:
    """A packed state, and the state. Raises RunFolderError, also for damaged bytes."""
    packed = read(kept)
    try:
        return packed, unpack(packed)
    except Exception as error:  # whatever damaged bytes lead to
        raise unreadable(Path(kept if isinstance(kept, str) else "what a client keeps"), error) from error


def write(file: str, packed: bytes) -> Kept:
    """Put a packed state into a new file, if one is named; gives what the server has to know."""
    try:
        if file:
            _write(file, packed)
            return file
    except OSError:  # the server tries it too, and says what is wrong
        pass
    return packed


def _write(path: str, packed: bytes) -> None:
    """Never over a file that is there: another worker, given up and not yet gone, may have been told the same one."""
    with open(path, "xb") as file:
        try:
            file.write(packed)
            file.flush()
        except OSError:
            with suppress(OSError):
                os.unlink(path)
            raise


class ClientStates(Mapping[int, RecordDict]):
    """By partition id, the state of each client that has any.

    folder: where new files go, made with the first of them; None: a temporary one. files: those that stand already.
    A state that changes is a new file beside the one before. That one goes, unless `synced` has named it: then a
    checkpoint counts on it.
    """

    def __init__(self, folder: Path | None = None, files: Mapping[int, Path] | None = None) -> None:
        self._folder = "" if folder is None else str(folder.absolute())
        self._files = {partition_id: str(path.absolute()) for partition_id, path in (files or {}).items()}
        self._sizes: dict[str, int] = {}  # of those that are on the disk for certain
        self._fresh: set[str] = set()  # that no checkpoint counts on
        self._token, self._number = secrets.token_hex(4), 0  # in each name: nobody else's, and never used again
        self._temporary: weakref.finalize[..., ClientStates] | None = None

    def __getitem__(self, partition_id: int) -> RecordDict:
        return load(self._files[partition_id])[1]

    def __iter__(self) -> Iterator[int]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def path(self, partition_id: int) -> str | None:
        """Where a client's state lies; None if it has none."""
        return self._files.get(partition_id)

    def next_file(self, partition_id: int) -> str:
        """Where its next one is to lie: another file each time. Empty where there is no folder yet."""
        if not self._folder:
            return ""
        self._number += 1
        return f"{self._folder}/{partition_id}-{self._token}-{self._number}{STATE_SUFFIX}"

    def take(self, partition_id: int, kept: Kept) -> None:
        """A client's new state. Raises RunFolderError where it cannot be written."""
        path = kept if isinstance(kept, str) else self._written(partition_id, kept)
        before = self._files.get(partition_id)
        self._files[partition_id] = path
        self._fresh.add(path)
        if before in self._fresh:
            self._fresh.remove(before)
            remove(Path(before))

    def _written(self, partition_id: int, packed: bytes) -> str:
        try:
            if self._folder:
                os.makedirs(self._folder, exist_ok=True)
            else:
                self._make_temporary()
            path = self.next_file(partition_id)
            _write(path, packed)
        except OSError as error:
            raise unwritable(Path(self._folder or "a temporary folder"), error) from error
        return path

    def _make_temporary(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="fedwsa-states-")
        self._temporary = weakref.finalize(self, _discard, self._folder)

    def close(self) -> None:
        """Remove the temporary folder, if there is one; as when nobody has this any more."""
        if self._temporary:
            self._temporary()
            self._folder = ""

    def synced(self) -> dict[str, int]:
        """The files that stand and their bytes, all on the disk now: for a checkpoint. Raises RunFolderError."""
        known = self._sizes
        self._sizes = {path: known[path] if path in known else _synced(path) for path in self._files.values()}
        self._fresh.clear()
        return {os.path.basename(path): size for path, size in self._sizes.items()}


def _synced(path: str) -> int:
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise unreadable(Path(path), error) from error
    try:
        os.fsync(file)
        return os.fstat(file).st_size
    except OSError as error:
        raise unwritable(Path(path), error) from error
    finally:
        os.close(file)


def _discard(folder: str) -> None:
    """Under another name first, so that what is still at work puts nothing more into it."""
    with suppress(OSError):
        os.rename(folder, f"{folder}-gone")
    shutil.rmtree(f"{folder}-gone", ignore_errors=True)
