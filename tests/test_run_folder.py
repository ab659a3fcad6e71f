"""Everything in a run folder is there whole or not at all, and belongs to one process at a time."""

import errno
import json
import logging
import multiprocessing
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedwsa import run_folder
from fedwsa.config import Config
from fedwsa.errors import RunError, UsageError
from fedwsa.run_folder import (
    FolderInUseError,
    RunFolderError,
    StrategyFolder,
    claim,
    discard_leftovers,
    new_folder,
    write_atomically,
)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", path], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def model(value: float) -> dict[str, Tensor]:
    return {"b.weight": torch.full((2, 3), value), "a.bias": torch.full((3,), -value)}


def one_round(folder: StrategyFolder, server_round: int) -> None:
    """What a round leaves: two events and a checkpoint."""
    folder.record({"round": server_round, "phase": "train"})
    folder.record({"round": server_round, "phase": "evaluate-server"})
    state = {"target/b.weight": torch.tensor([server_round / 3], dtype=torch.float64)}
    folder.save_checkpoint(server_round, model(server_round), state)


def rounds_logged(folder: StrategyFolder) -> list[int]:
    return [json.loads(line)["round"] for line in folder.metrics.read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"old content")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]


def test_written_file_has_the_users_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.usefixtures("full_disk")
def test_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RunFolderError, match=f"^{re.escape(str(path))}: cannot be written: No space left on device$"):
        write_atomically(path, b"new content")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new content")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_full_disk(small_disk: Path) -> None:
    path = small_disk / "file"
    write_atomically(path, b"o" * 100_000)
    with pytest.raises(RunFolderError, match="file: cannot be written: No space left on device"):
        write_atomically(path, b"n" * 150_000)
    assert path.read_bytes() == b"o" * 100_000
    assert names(small_disk) == ["file"]


def test_full_disk_for_a_line_of_metrics(small_disk: Path) -> None:
    folder = StrategyFolder(small_disk / "fedavg")
    one_round(folder, 1)
    with pytest.raises(RunFolderError, match=r"metrics.jsonl: cannot be written: No space left on device"):
        folder.record({"round": 2, "text": "x" * 300_000})
    checkpoint = StrategyFolder(folder.path).resume()
    assert checkpoint is not None
    assert checkpoint.server_round == 1
    assert rounds_logged(folder) == [1, 1]  # what went of the long line to the disk is gone


def test_content_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut must not leave the new name with an empty file."""
    path, synced = tmp_path / "file", []

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(path, b"content")
    assert synced == [(7, False)]


def test_path_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(RunFolderError, match="file: cannot be written: Is a directory"):
        write_atomically(tmp_path / "file", b"")
    assert names(tmp_path) == ["file"]


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    write_atomically(tmp_path / "fedavg" / "final.safetensors", b"model")
    (tmp_path / "fedavg" / ".final.safetensors.123.tmp").write_bytes(b"mod")
    (tmp_path / ".metrics.jsonl.45.tmp").write_bytes(b"")
    (tmp_path / ".lock").touch()
    discard_leftovers(tmp_path)
    assert names(tmp_path) == [".lock", "fedavg"]
    assert names(tmp_path / "fedavg") == ["final.safetensors"]


def test_new_folder_is_nobody_elses(tmp_path: Path) -> None:
    config = Config(runs_dir=str(tmp_path / "runs"), name="trial")
    folders = [new_folder(config) for _ in range(5)]  # some of them in the same second
    assert len(set(folders)) == 5
    assert all(folder.is_dir() and re.fullmatch(r"\d{8}-\d{6}-trial(-\d)?", folder.name) for folder in folders)


def test_new_folder_by_name(tmp_path: Path) -> None:
    assert new_folder(Config(out_dir=str(tmp_path / "mine"))) == tmp_path / "mine"


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file: cannot be used as a run folder: File exists"):
        new_folder(Config(runs_dir=str(tmp_path / "file")))
    with pytest.raises(UsageError, match="file: cannot be used as a run folder: File exists"):
        claim(tmp_path / "file")


def test_runs_that_are_a_link_to_nowhere(tmp_path: Path) -> None:
    """A disk that is not mounted."""
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted" / "runs")
    with pytest.raises(UsageError, match="runs: cannot be used as a run folder: File exists"):
        new_folder(Config(runs_dir=str(tmp_path / "runs")))


def test_a_disk_without_locks_is_not_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UsageError, match="cannot be used as a run folder: No locks available") as caught:
        claim(tmp_path)
    assert not isinstance(caught.value, FolderInUseError)


def test_what_cannot_be_removed_is_said(tmp_path: Path) -> None:
    (tmp_path / ".a.1.tmp").mkdir()
    with pytest.raises(RunFolderError, match=r"\.a\.1\.tmp: cannot be removed: Is a directory"):
        discard_leftovers(tmp_path)


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomically(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"content"


def _try_to_claim(folder: Path) -> None:
    try:
        claim(folder)
    except FolderInUseError:
        os._exit(3)
    os._exit(0)


def claimed_by_another_process(folder: Path) -> bool:
    process = multiprocessing.get_context("fork").Process(target=_try_to_claim, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode in (0, 3)
    return process.exitcode == 0


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    release = claim(folder)
    assert not claimed_by_another_process(folder)
    with pytest.raises(FolderInUseError, match="run: in use by another run; wait for it or choose another folder"):
        claim(folder)
    release()
    assert claimed_by_another_process(folder)
    claim(folder)()  # the other one has ended, and its claim with it


def test_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = StrategyFolder(tmp_path / "fedavg-wsa")
    one_round(folder, 1)
    checkpoint = StrategyFolder(folder.path).resume()
    assert checkpoint is not None
    assert checkpoint.server_round == 1
    assert checkpoint.model.keys() == model(1).keys()
    assert all(torch.equal(checkpoint.model[name], tensor) for name, tensor in model(1).items())
    assert checkpoint.strategy_state.keys() == {"target/b.weight"}
    assert checkpoint.strategy_state["target/b.weight"].dtype == torch.float64
    assert checkpoint.strategy_state["target/b.weight"].item() == 1 / 3


def test_tensors_that_share_memory_or_have_holes(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    folder = StrategyFolder(tmp_path)
    folder.record({"round": 1})
    folder.save_checkpoint(1, {"whole": whole, "view": whole[1], "columns": whole.T, "number": torch.tensor(7)}, {})
    checkpoint = folder.resume()
    assert checkpoint is not None
    assert torch.equal(checkpoint.model["view"], whole[1])
    assert torch.equal(checkpoint.model["columns"], whole.T)
    assert checkpoint.model["number"].item() == 7


def test_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = StrategyFolder(tmp_path)
    for server_round in range(1, 12):
        one_round(folder, server_round)
        kept = [f"round-{number:06}.safetensors" for number in (server_round - 1, server_round) if number]
        assert names(folder.checkpoints) == kept


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    folder = StrategyFolder(tmp_path)
    one_round(folder, 1)
    one_round(folder, 2)
    folder.record({"round": 3, "phase": "train"})
    with folder.metrics.open("a") as file:
        file.write('{"round": 3, "pha')  # torn by a kill
    checkpoint = folder.resume()
    assert checkpoint is not None
    assert checkpoint.server_round == 2
    assert rounds_logged(folder) == [1, 1, 2, 2]


def test_without_a_checkpoint_the_metrics_begin_anew(tmp_path: Path) -> None:
    folder = StrategyFolder(tmp_path)
    assert folder.resume() is None
    folder.record({"round": 0})
    assert folder.resume() is None
    assert not folder.metrics.exists()


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    damaged = {
        "empty": b"",
        "header torn": content[:20],
        "tensors torn": content[:-1],
        "zeros": bytes(len(content)),
        "another file's content": b"\x02\0\0\0\0\0\0\0{}",
        "header of nonsense": content[:8] + b"x" * (len(content) - 8),
    }
    path.write_bytes(damaged[how])


@pytest.mark.parametrize(
    "how",
    ["empty", "header torn", "tensors torn", "zeros", "another file's content", "header of nonsense"],
)
def test_damaged_checkpoint_is_passed_over(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = StrategyFolder(tmp_path)
    one_round(folder, 1)
    one_round(folder, 2)
    newest = folder.checkpoints / "round-000002.safetensors"
    damage(newest, how)
    with caplog.at_level(logging.WARNING, "fedwsa"):
        checkpoint = folder.resume()
    assert checkpoint is not None
    assert checkpoint.server_round == 1
    assert rounds_logged(folder) == [1, 1]
    (warning,) = caplog.messages
    assert warning.startswith(f"{newest}: passed over, since it is damaged (")
    assert "\n" not in warning


@pytest.mark.parametrize("lost", ["file", "lines"])
def test_checkpoint_whose_metrics_are_lost_is_passed_over(
    tmp_path: Path, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The model alone would go on, and the report would miss rounds."""
    folder = StrategyFolder(tmp_path)
    one_round(folder, 1)
    one_round(folder, 2)
    if lost == "lines":
        os.truncate(folder.metrics, folder.metrics.stat().st_size - 1)
        checkpoint = folder.resume()
        assert checkpoint is not None
        assert checkpoint.server_round == 1
    else:
        folder.metrics.unlink()
        with pytest.raises(RunFolderError, match="no checkpoint is whole"):
            folder.resume()
    assert "metrics.jsonl is shorter than it was at this checkpoint" in caplog.messages[0]


def test_if_no_checkpoint_is_whole_the_user_decides(tmp_path: Path) -> None:
    folder = StrategyFolder(tmp_path / "fedavg")
    one_round(folder, 1)
    one_round(folder, 2)
    for path in folder.checkpoints.iterdir():
        damage(path, "tensors torn")
    with pytest.raises(RunFolderError) as caught:
        folder.resume()
    assert str(caught.value) == f"{folder.checkpoints}: no checkpoint is whole; delete {folder.path} to begin it anew"
    assert rounds_logged(folder) == [1, 1, 2, 2]  # nothing was touched


def test_failed_checkpoint_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = StrategyFolder(tmp_path)
    one_round(folder, 1)
    one_round(folder, 2)
    folder.record({"round": 3})
    before = {path.name: path.read_bytes() for path in folder.checkpoints.iterdir()}
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".tmp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match=r"round-000003.safetensors: cannot be written: No space left on device"):
        folder.save_checkpoint(3, model(3), {})
    assert {path.name: path.read_bytes() for path in folder.checkpoints.iterdir()} == before
    checkpoint = folder.resume()
    assert checkpoint is not None
    assert checkpoint.server_round == 2


@pytest.mark.usefixtures("full_disk")
def test_checkpoint_needs_its_metrics_on_the_disk(tmp_path: Path) -> None:
    folder = StrategyFolder(tmp_path)
    folder.record({"round": 1})
    with pytest.raises(RunFolderError, match=r"metrics.jsonl: cannot be written: No space left on device"):
        folder.save_checkpoint(1, model(1), {})


@pytest.mark.usefixtures("full_disk")
def test_so_does_the_final_model(tmp_path: Path) -> None:
    """Else a run whose metrics were lost would count as finished."""
    folder = StrategyFolder(tmp_path)
    folder.record({"round": 1})
    with pytest.raises(RunFolderError, match=r"metrics.jsonl: cannot be written: No space left on device"):
        folder.save_final(model(1))
    assert not folder.final.exists()


def test_final_model_is_read_by_anyone(tmp_path: Path) -> None:
    folder = StrategyFolder(tmp_path)
    folder.save_final(model(1))
    loaded = load_file(folder.final)
    assert loaded.keys() == model(1).keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model(1).items())


def test_equal_models_are_equal_bytes(tmp_path: Path) -> None:
    """Also where tensors come in another order."""
    StrategyFolder(tmp_path / "one").save_final(model(1))
    StrategyFolder(tmp_path / "two").save_final(dict(reversed(model(1).items())))
    assert run_folder.sha256(tmp_path / "one/final.safetensors") == run_folder.sha256(
        tmp_path / "two/final.safetensors"
    )
