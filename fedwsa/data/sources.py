"""Where a data set's own files are."""

from collections.abc import Sequence
from pathlib import Path

from fedwsa.data.dataset import DataError


def find_files(
    data_set: str, names: Sequence[str], folders: Sequence[Path], remedy: str, suffixes: Sequence[str] = ("",)
) -> list[Path]:
    """Return the paths of `names`, all in one folder, the first that has them; of several suffixes the first is taken.

    remedy: how a user gets the files, for the error.
    Raises DataError, in one line, that says where it looked and what is missing there.
    """
    looked = []
    for folder in folders:
        found = [next((p for s in suffixes if (p := folder / f"{name}{s}").is_file()), None) for name in names]
        if all(found):
            return [path for path in found if path]
        missing = [name for name, path in zip(names, found, strict=True) if path is None]
        looked.append(f"{folder} (there {', '.join(missing)} is missing)" if any(found) else str(folder))
    others = "".join(f" (or {suffix})" for suffix in suffixes[1:])
    where = f"looked in {', '.join(looked)}" if looked else "no data dir is given"
    raise DataError(f"{data_set}: no folder has all of {', '.join(names)}{others}; {where}; {remedy}")
