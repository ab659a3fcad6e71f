"""What clients keep lies in files, not in the server; a checkpoint counts on those that it names."""

import errno
import gc
import os
import tempfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federations import finals, grid_of, lines, run, tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from safetensors import safe_open
from safetensors.torch import save_file

from clients.client_app import app as client_app
from fedwsa.arrays import record_of
from fedwsa.run_folder import RunFolderError, StrategyFolder, read_checkpoint
from fedwsa.simulation import open_engine, simulate, states
from fedwsa.simulation.states import ClientStates, pack, read, unpack, write
from strategies import FedAvg
from strategies.server_app import make_app


def state(number: float = 1.0) -> RecordDict:
    arrays = record_of({"turned": np.asfortranarray(np.full((2, 3), number)), "none": np.zeros((0, 2), np.int8)})
    arrays["flowers"] = Array(np.full((), number, np.float32))
    texts: dict[str, Any] = {"text": "α", "flag": True, "bytes": b"\0\xff", "list": [1, -(2**63)], "none": []}
    return RecordDict({"b": arrays, "a": ConfigRecord(texts), "c": MetricRecord({"x": [0.1, float(number)], "n": 3})})


def put(kept: ClientStates, partition_id: int, number: float) -> Path:
    """What a worker does and the server then takes."""
    kept.take(partition_id, write(kept.next_file(partition_id), pack(state(number))))  # the first comes as bytes
    path = kept.path(partition_id)
    assert path is not None
    return Path(path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- the bytes


def test_bytes_and_back() -> None:
    packed = pack(state())
    assert unpack(packed).object_id == state().object_id
    assert list(unpack(packed)) == ["b", "a", "c"]
    assert pack(unpack(packed)) == packed
    assert pack(state(2.0)) != packed


def test_an_empty_state_is_no_bytes() -> None:
    assert pack(RecordDict()) == b""
    assert unpack(b"") == RecordDict()
    assert read(None) == b""


@pytest.mark.parametrize("wrong", [None, {}, {"a": ConfigRecord()}, "text"])
def test_nothing_else_is_a_state(wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"of type {type(wrong).__name__}, not a RecordDict"):
        pack(wrong)


# ---- files


def test_a_new_state_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    kept = ClientStates(tmp_path / "kept")
    first, other = put(kept, 3, 1.0), put(kept, 12, 7.0)
    second = put(kept, 3, 2.0)
    assert set(kept) == {3, 12}
    assert kept[3].object_id == state(2.0).object_id
    assert kept[12].object_id == state(7.0).object_id
    assert not first.exists()
    assert names(tmp_path / "kept") == sorted([second.name, other.name])


def test_one_that_a_checkpoint_counts_on_stays(tmp_path: Path) -> None:
    kept = ClientStates(tmp_path)
    first = put(kept, 3, 1.0)
    assert kept.synced() == {first.name: len(pack(state(1.0)))}
    second = put(kept, 3, 2.0)
    third = put(kept, 3, 3.0)
    assert names(tmp_path) == sorted([first.name, third.name])
    assert second.name not in names(tmp_path)
    assert kept.synced() == {third.name: len(pack(state(3.0)))}


def test_going_on_never_writes_over_what_is_there(tmp_path: Path) -> None:
    before = ClientStates(tmp_path)
    old = [put(before, client, client) for client in (1, 2, 3)]
    content = {path: path.read_bytes() for path in old}
    after = ClientStates(tmp_path, {1: old[0]})
    new = [put(after, client, 9.0) for client in (1, 2, 3)]
    assert not set(new) & set(old)
    assert {path: path.read_bytes() for path in old} == content


def test_what_was_given_up_and_what_follows_do_not_share_a_file(tmp_path: Path) -> None:
    kept = ClientStates(tmp_path)
    assert len({kept.next_file(4) for _ in range(3)}) == 3


def test_who_goes_on_does_not_use_a_name_again_that_a_lost_file_had(tmp_path: Path) -> None:
    """A checkpoint that was passed over for it would be whole again."""
    lost = put(ClientStates(tmp_path), 4, 1.0)
    lost.unlink()
    assert put(ClientStates(tmp_path), 4, 1.0) != lost


@pytest.mark.parametrize("there", [b"", b"of a worker that a server left behind"])
def test_a_file_that_is_there_is_never_written_over(tmp_path: Path, there: bytes) -> None:
    """Of a task that is done again the first worker may still be at it."""
    kept = ClientStates(tmp_path)
    file = kept.next_file(4)
    Path(file).write_bytes(there)
    kept.take(4, write(file, pack(state(4.0))))
    assert kept[4].object_id == state(4.0).object_id
    assert Path(file).read_bytes() == there


def test_where_the_client_could_not_write_the_server_does(tmp_path: Path) -> None:
    """As where the folder is not there yet: a worker that makes it could do so after the server has removed it."""
    kept = ClientStates(tmp_path / "kept")
    came = write(kept.next_file(5), pack(state(5.0)))
    assert came == pack(state(5.0))
    assert not (tmp_path / "kept").exists()
    kept.take(5, came)
    assert kept[5].object_id == state(5.0).object_id
    file = kept.next_file(5)
    assert write(file, b"packed") == file
    assert Path(file).read_bytes() == b"packed"


def test_a_full_disk_keeps_no_half_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes nothing, in place of a file."""
    real = os.unlink
    gone: list[str] = []
    monkeypatch.setattr(os, "unlink", lambda path: gone.append(str(path)) or real(path))
    opened = open
    monkeypatch.setattr("builtins.open", lambda path, mode: opened("/dev/full", "wb") if opened(path, mode) else None)
    assert write(f"{tmp_path}/1-1.state", b"packed") == b"packed"
    assert names(tmp_path) == []
    assert gone == [f"{tmp_path}/1-1.state"]


def test_where_the_server_cannot_either_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"file: cannot be written: File exists$"):
        ClientStates(tmp_path / "file").take(5, b"packed")


def test_one_that_is_gone_is_said(tmp_path: Path) -> None:
    kept = ClientStates(tmp_path)
    path = put(kept, 1, 1.0)
    path.unlink()
    for look in (lambda: kept[1], kept.synced):
        with pytest.raises(RunFolderError) as caught:
            look()
        assert str(caught.value) == f"{path}: cannot be read: No such file or directory"


def test_damaged_bytes_are_said(tmp_path: Path) -> None:
    kept = ClientStates(tmp_path)
    path = put(kept, 1, 1.0)
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(RunFolderError) as caught:
        kept[1]
    assert str(caught.value).startswith(f"{path}: cannot be read: ")
    assert "\n" not in str(caught.value)


def test_every_new_file_is_on_the_disk_before_a_checkpoint_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}"))))
    kept = ClientStates(tmp_path)
    first = [put(kept, client, 1.0) for client in (1, 2)]
    assert set(kept.synced()) == {path.name for path in first}
    assert set(synced) == set(first)
    synced.clear()
    last = put(kept, 2, 2.0)
    assert set(kept.synced()) == {first[0].name, last.name}
    assert synced == [last]


# ---- without a folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


counting = ClientApp()


@counting.train()
def count(message: Message, context: Context) -> Message:
    seen = int(context.state["seen"]["count"]) + 1 if "seen" in context.state else 1
    if message.content["config"]["keep"]:
        context.state["seen"] = ConfigRecord({"count": seen})
    return Message(RecordDict({"seen": MetricRecord({"count": seen})}), reply_to=message)


def counted(keep: bool, during: Any = lambda: None) -> list[list[int]]:
    """What three clients count in three rounds."""
    server, told = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        for _ in range(3):
            content = RecordDict({"config": ConfigRecord({"keep": keep})})
            replies = grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()])
            told.append([reply.content["seen"]["count"] for reply in replies])
        during()

    simulate(server, counting, 3, engine="inprocess")
    return told


def test_somebody_elses_app_keeps_it_in_a_temporary_folder_that_goes(temporary: Path) -> None:
    found: list[str] = []
    assert counted(True, lambda: found.extend(path.name for path in temporary.glob("*/*"))) == [
        [n] * 3 for n in (1, 2, 3)
    ]
    assert {name.partition("-")[0] for name in found} == {"0", "1", "2"}
    assert len(found) == 3
    assert names(temporary) == []


def test_an_app_that_keeps_nothing_makes_no_folder(temporary: Path) -> None:
    found: list[str] = []
    assert counted(False, lambda: found.extend(names(temporary))) == [[1] * 3] * 3
    assert found == []


def test_a_temporary_folder_goes_and_does_not_come_back(temporary: Path) -> None:
    kept = ClientStates()
    assert kept.next_file(1) == ""
    put(kept, 1, 1.0)
    assert len(names(temporary)) == 1
    file = kept.next_file(1)
    kept.close()
    assert write(file, b"late") == b"late"
    assert names(temporary) == []
    kept.take(1, b"late")
    assert len(names(temporary)) == 1
    del kept
    gc.collect()
    assert names(temporary) == []


def test_a_temporary_folder_goes_with_a_grid_that_nobody_closes(temporary: Path) -> None:
    grid = grid_of(counting, 3)
    content = RecordDict({"config": ConfigRecord({"keep": True})})
    assert len(list(grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()]))) == 3
    assert len(names(temporary)) == 1
    del grid
    gc.collect()
    assert names(temporary) == []


def test_the_server_does_not_hold_what_clients_keep() -> None:
    """64 clients keep 1 MB each."""
    hoarding, server = ClientApp(), ServerApp()

    @hoarding.train()
    def train(message: Message, context: Context) -> Message:
        context.state["kept"] = ArrayRecord({"w": Array(np.full(1 << 17, context.node_config["partition-id"], float))})
        return Message(RecordDict(), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        for _ in range(2):
            messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
            assert len(list(grid.send_and_receive(messages))) == 64

    tracemalloc.start()
    try:
        simulate(server, hoarding, 64, engine="inprocess")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 1 << 20 < peak < 16 << 20


# ---- checkpoints


def one_round(folder: StrategyFolder, kept: ClientStates, server_round: int, clients: list[int]) -> list[Path]:
    folder.record({"round": server_round})
    new = [put(kept, client, server_round) for client in clients]
    folder.save_checkpoint(server_round, {}, {}, kept.synced())
    return new


def test_what_no_checkpoint_counts_on_goes(tmp_path: Path) -> None:
    folder = StrategyFolder(tmp_path)
    kept = ClientStates(folder.clients)
    (one,) = one_round(folder, kept, 1, [1])
    orphan = Path(str(write(kept.next_file(9), b"of a client whose answer never came")))
    assert orphan.exists()
    (two, _) = one_round(folder, kept, 2, [1, 2])
    assert not orphan.exists()
    assert one.exists()
    one_round(folder, kept, 3, [3])
    assert not one.exists()  # of a round whose checkpoint is gone
    assert two.exists()
    checkpoint = folder.resume()
    assert checkpoint is not None
    assert {client: unpack(read(str(path)))["c"]["x"][1] for client, path in checkpoint.client_states.items()} == {
        1: 2.0,
        2: 2.0,
        3: 3.0,
    }
    late = put(kept, 1, 4.0)  # after the last checkpoint
    folder.save_final({})
    assert not late.exists()
    assert two.exists()


def test_nothing_goes_where_a_checkpoint_cannot_be_read(tmp_path: Path) -> None:
    """What it counts on is not known."""
    folder = StrategyFolder(tmp_path)
    kept = ClientStates(folder.clients)
    (one,) = one_round(folder, kept, 1, [1])
    (folder.checkpoints / "round-000001.safetensors").write_bytes(b"")
    one_round(folder, kept, 2, [1])
    assert one.exists()
    one_round(folder, kept, 3, [1])
    assert not one.exists()


def test_a_full_disk_is_not_filled_further_by_going_on(tmp_path: Path) -> None:
    folder = StrategyFolder(tmp_path)
    kept = ClientStates(folder.clients)
    (one,) = one_round(folder, kept, 1, [1])
    for client in range(5):
        put(kept, client, 2.0)
    assert folder.resume() is not None
    assert names(folder.clients) == [one.name]
    (folder.checkpoints / "round-000001.safetensors").unlink()
    assert folder.resume() is None
    assert names(folder.clients) == []


def test_a_file_that_cannot_be_removed_costs_no_checkpoint(tmp_path: Path) -> None:
    folder = StrategyFolder(tmp_path)
    one_round(folder, ClientStates(folder.clients), 1, [1])
    folder.record({"round": 2})
    (folder.clients / "9-9.state").mkdir()
    with pytest.raises(RunFolderError, match=r"9-9.state: cannot be removed: "):
        folder.resume()
    (folder.clients / "9-9.state").rmdir()
    assert folder.resume() is not None


def test_a_checkpoint_of_an_earlier_version_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = StrategyFolder(tmp_path)
    one_round(folder, ClientStates(folder.clients), 1, [])
    path = folder.checkpoints / "round-000001.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"client/0": torch.zeros(1)}, path, metadata)
    with pytest.raises(RunFolderError, match="no checkpoint is whole"):
        folder.resume()
    assert "written by an earlier version, with what clients keep inside" in caplog.text


@pytest.mark.parametrize("how", ["gone", "torn"])
def test_a_checkpoint_whose_files_are_not_whole_is_passed_over(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = StrategyFolder(tmp_path)
    kept = ClientStates(folder.clients)
    (old,) = one_round(folder, kept, 1, [1])
    (new,) = one_round(folder, kept, 2, [1])
    if how == "gone":
        new.unlink()
    else:
        os.truncate(new, new.stat().st_size - 1)
    checkpoint = folder.resume()
    assert checkpoint is not None
    assert (checkpoint.server_round, checkpoint.client_states) == (1, {1: old})
    assert f"{new} is not what it was at this checkpoint" in caplog.text


def test_a_run_goes_on_with_the_older_checkpoint_to_the_same_model(tmp_path: Path) -> None:
    config = tiny(strategies=("scaffold",), rounds=5)
    run(config, tmp_path / "whole")
    run(config.model_copy(update={"rounds": 3}), tmp_path / "parts")
    folder = StrategyFolder(tmp_path / "parts/scaffold")
    folder.final.unlink()
    checkpoint = folder.resume()
    assert checkpoint is not None
    last = {path for path in folder.clients.iterdir() if path not in checkpoint.client_states.values()}
    assert last  # of the checkpoint before
    before = read_checkpoint(folder.checkpoints / "round-000002.safetensors")
    new = set(checkpoint.client_states.values()) - set(before.client_states.values())
    new.pop().write_bytes(b"")
    run(config, tmp_path / "parts")
    assert finals(tmp_path / "parts", config) == finals(tmp_path / "whole", config)
    assert lines(folder.metrics) == lines(tmp_path / "whole/scaffold/metrics.jsonl")


def test_a_full_disk_ends_the_run_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a failure of the client, which would be left out from then on."""
    config = tiny(strategies=("scaffold",), rounds=3)
    run(config, tmp_path / "whole")
    written, real = [], states._write

    def full(path: str, packed: bytes) -> None:
        written.append(path)
        if len(written) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, packed)

    with monkeypatch.context() as patch:
        patch.setattr(states, "_write", full)
        with pytest.raises(RunFolderError, match=r"checkpoints/clients: cannot be written: No space left on device$"):
            run(config, tmp_path / "parts")
    assert len(lines(tmp_path / "parts/scaffold/metrics.jsonl")) > 1
    run(config, tmp_path / "parts")
    assert finals(tmp_path / "parts", config) == finals(tmp_path / "whole", config)


@pytest.mark.parametrize("engine", ["inprocess", pytest.param("ray", marks=pytest.mark.process)])
def test_one_that_cannot_be_read_ends_the_run_with_a_line(tmp_path: Path, engine: str) -> None:
    config = tiny(strategies=("scaffold",), num_clients=3, checkpoint_every=9)

    def remove(strategy: str, event: dict[str, Any]) -> None:
        if (event["round"], event["phase"]) == (1, "evaluate-server"):
            for path in (tmp_path / "scaffold/checkpoints/clients").iterdir():
                path.unlink()

    app, found = make_app(tmp_path, remove), config.to_run_config()
    with (
        open_engine(engine, workers=1) as opened,
        pytest.raises(RunFolderError, match=r"state: cannot be read: No"),
    ):
        simulate(app, client_app, 3, engine=opened, run_config=found)


def test_after_a_failure_nothing_more_goes_over_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are lost: a ServerApp that goes on would wait for them."""

    def full(path: str, packed: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(states, "_write", full)
    server, caught = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        for _ in range(2):
            content = RecordDict({"config": ConfigRecord({"keep": True})})
            try:
                list(grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()]))
            except RunFolderError as error:
                caught.append(str(error))

    with pytest.raises(RunFolderError, match="No space left on device"):
        simulate(server, counting, 3, engine="inprocess")
    assert len(caught) == 2


def test_the_folder_may_be_given_relative_to_where_the_server_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = ClientStates(Path("kept"), {7: Path("kept/7-3.state")})
    assert kept.path(7) == f"{tmp_path}/kept/7-3.state"
    assert kept.next_file(7).startswith(f"{tmp_path}/kept/7-")


class Careless(FedAvg):
    """Does not look at what clients say of their evaluation."""

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """See Strategy."""


def test_replies_that_a_strategy_does_not_look_at_do_not_cost_the_run(tmp_path: Path) -> None:
    """The clients that are to evaluate after the last round need files that no checkpoint counts on."""
    config = tiny(
        strategies=("test_states:Careless", "fedavg"),
        rounds=3,
        batch_norm="local",
        checkpoint_every=2,
        model="federations:NormNet",
    )
    run(config, tmp_path)
    assert finals(tmp_path, config)


@pytest.mark.process
def test_workers_write_the_files_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the first of all, before which the folder is not there."""
    written, real = [], ClientStates._written

    def watched(kept: ClientStates, partition_id: int, packed: bytes) -> str:
        written.append(partition_id)
        return real(kept, partition_id, packed)

    monkeypatch.setattr(ClientStates, "_written", watched)
    config = tiny(strategies=("scaffold",), rounds=3, num_clients=3)
    app, by_round = make_app(tmp_path, lambda strategy, event: by_round.append(len(written))), []
    with open_engine("ray", workers=2) as engine:
        simulate(app, client_app, 3, engine=engine, run_config=config.to_run_config())
    assert 1 <= by_round[-1] <= 3
    assert written == written[: by_round[2]]
    assert len(StrategyFolder(tmp_path / "scaffold").resume().client_states) == 3
