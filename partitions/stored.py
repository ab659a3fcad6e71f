"""A partition as a JSON file, so that it can be published and used again: indices into a data set's training split."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from partitions._indices import IndexArray, check_labels

VERSION = 1
KEYS = ("version", "data", "train_samples", "labels_sha256", "made_by", "server", "clients")


@dataclass(frozen=True, slots=True)
class StoredPartition:
    """Who holds which training samples.

    clients: for each client its indices, int64, in the order in which its partitioner gave them; validation samples,
    which a run sets apart itself, are among them. server: the indices that the server holds. All are disjoint; they
    need not be complete. made_by: the partitioner's name, its options and the seed.
    """

    clients: list[IndexArray]
    server: IndexArray
    made_by: dict[str, Any]


def labels_sha256(labels: ArrayLike) -> str:
    """SHA-256 of the labels as little-endian int64, in hexadecimal digits: tells a data set, and its order."""
    return hashlib.sha256(check_labels(labels).astype("<i8").tobytes()).hexdigest()


def to_json(
    data: str, labels: ArrayLike, clients: Sequence[IndexArray], server: IndexArray, made_by: Mapping[str, Any]
) -> dict[str, Any]:
    """What the file holds; `read` ignores what else a writer puts in.

    data: name of the data set; labels: integers [n], those of its training split.
    """
    return {
        "version": VERSION,
        "data": data,
        "train_samples": len(check_labels(labels)),
        "labels_sha256": labels_sha256(labels),
        "made_by": dict(made_by),
        "server": server.tolist(),
        "clients": [client.tolist() for client in clients],
    }


def sha256(path: Path) -> str:
    """SHA-256 of who holds what in a file, in hexadecimal digits, whatever else the file says and however.

    Raises ValueError, in one line with the path, where it cannot be read or is of another format.
    """
    return _sha256(_parse(path))


def read(path: Path, labels: ArrayLike, *, num_clients: int, server_samples: int, sha256: str = "") -> StoredPartition:
    """Read a partition of the data set with these training labels, for so many clients and samples of the server.

    sha256: what `sha256` has to give for it; empty: anything.
    Raises ValueError, in one line with the path, where the file cannot be read or is of another format, data set,
    number of clients or of the server's samples, or of another digest, and where an index is out of range or held
    twice.
    """
    content = _parse(path)
    made_for, samples, clients = content["data"], content["train_samples"], len(content["clients"])
    for found, needed, difference in (
        (content["version"], VERSION, f"version is {content['version']!r}; allowed is {VERSION}"),
        (
            samples,
            len(check_labels(labels)),
            f"made for {made_for!r} with {samples} training samples, not for this data",
        ),
        (
            content["labels_sha256"],
            labels_sha256(labels),
            f"made for {made_for!r} with other training labels than here",
        ),
        (clients, num_clients, f"has {clients} clients; allowed with it is num-clients = {clients}"),
        (
            len(content["server"]),
            server_samples,
            f"the server holds {len(content['server'])}; allowed with it is server-samples = {len(content['server'])}",
        ),
    ):
        if found != needed:
            raise ValueError(f"{path}: {difference}")
    if sha256 and _sha256(content) != sha256:
        raise ValueError(
            f"{path}: not the partition that the config means, by its partition-sha256; what a run read is in its "
            "partition.json"
        )
    try:
        held = checked([content["server"], *content["clients"]], samples)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return StoredPartition(held[1:], held[0], content["made_by"])


def _sha256(content: Mapping[str, Any]) -> str:
    held = json.dumps([content["server"], content["clients"]], separators=(",", ":"))
    return hashlib.sha256(held.encode()).hexdigest()


def _parse(path: Path) -> dict[str, Any]:
    """The file's keys and values, with index lists that are lists."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"{path}: not a partition: not valid JSON: {error}") from error
    if not isinstance(content, dict) or (missing := [key for key in KEYS if key not in content]):
        what = f"{', '.join(missing)} missing" if isinstance(content, dict) else "not an object"
        raise ValueError(f"{path}: not a partition: {what}; `fedwsa partition` writes one")
    lists = isinstance(content["clients"], list) and all(
        isinstance(part, list) for part in (content["server"], *content["clients"])
    )
    if not lists or not isinstance(content["made_by"], dict):
        raise ValueError(f"{path}: server must be a list of indices, clients a list of such, made_by an object")
    return content


def checked(parts: object, num_samples: int) -> list[IndexArray]:
    """Who holds what, in the order in which it is given: an int64 array for each part.

    parts: what a file or a partitioner gives: lists or arrays of indices.
    Raises ValueError, in one line, unless it is that, with integers 0 … num_samples − 1, each once at most in all.
    """
    if not isinstance(parts, Iterable):
        raise ValueError(f"must be a list of index arrays, one a client, got {type(parts).__name__}")
    lists = [_listed(part) for part in parts]
    values = list(chain.from_iterable(lists))
    for value in values:
        if (type(value) is not int and not isinstance(value, np.integer)) or not 0 <= value < num_samples:
            raise ValueError(f"{value!r} is no training sample; allowed are integers, 0 to {num_samples - 1}")
    flat = np.array(values, np.int64)
    times = np.bincount(flat, minlength=num_samples)
    if times.max() > 1:
        raise ValueError(f"sample {times.argmax()} is held {times.max()} times; allowed is once")
    return np.split(flat, np.cumsum([len(part) for part in lists])[:-1])[: len(lists)]


def _listed(part: Any) -> list[Any]:
    """An array's numbers as Python's own, which are quicker to look at."""
    listed = part.tolist() if hasattr(part, "tolist") else list(part) if isinstance(part, Iterable) else part
    if not isinstance(listed, list):
        raise ValueError(f"a client's part must be a list or an array of indices, got {type(part).__name__}")
    return listed
