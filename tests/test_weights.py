"""A run that begins with a model in a file: the numbers it starts with, and that it stays repeatable."""

import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch
from federations import DIGITS, initial_model, lines, run, spying, tiny
from safetensors.torch import save_file

from clients.client_app import app as client_app
from fedwsa import models, weights
from fedwsa.config import Config
from fedwsa.run_folder import FolderInUseError, StrategyFolder, sha256
from fedwsa.scope import measure
from fedwsa.seeding import torch_seed
from fedwsa.simulation import simulate
from strategies.server_app import make_app


def test_a_run_begins_where_another_ended(tmp_path: Path):
    run(tiny(strategies=("fedavg",)), tmp_path / "one")
    final = tmp_path / "one/fedavg/final.safetensors"
    run(tiny(strategies=("fedavg", "fedavg-wsa"), initial_model=str(final), seed=3), tmp_path / "two")
    ended = lines(tmp_path / "one/fedavg/metrics.jsonl")[-1]
    for name in ("fedavg", "fedavg-wsa"):
        began = lines(tmp_path / "two" / name / "metrics.jsonl")[0]
        assert began["round"] == 0
        assert began["metrics"] == ended["metrics"]


def test_the_first_target_is_the_scope_of_the_file(tmp_path: Path):
    save_file(initial_model(11), tmp_path / "mine.safetensors")
    seen = []
    config = tiny(strategies=("fedavg-wsa",), rounds=1, initial_model=str(tmp_path / "mine.safetensors"))
    run(config, tmp_path / "run", spying(seen))
    assert {message.kind for message in seen} == {"train", "evaluate"}
    assert all(message.alignment.target == measure(initial_model(11)) for message in seen if message.kind == "train")


def test_a_server_without_the_command_writes_the_digest_down_too(tmp_path: Path):
    path = tmp_path / "mine.safetensors"
    save_file(initial_model(11), path)
    config = tiny(strategies=("fedavg",), rounds=1, initial_model=str(path), out_dir=str(tmp_path / "run"))
    begin = partial(simulate, make_app(), client_app, config.num_clients, engine="inprocess")
    begin(run_config=config.to_run_config())
    written = tomllib.loads((tmp_path / "run/config.toml").read_text())
    assert written["initial-model-sha256"] == sha256(path)
    save_file(initial_model(12), path)
    (tmp_path / "run/fedavg/final.safetensors").unlink()
    with pytest.raises(FolderInUseError, match="holds a run of another config"):
        begin(run_config=config.to_run_config())


def test_scheme_and_seed_decide_the_initial_model_of_a_run(tmp_path: Path):
    for seed in (0, 1):
        seen = []
        config = tiny(strategies=("fedavg-wsa",), rounds=1, init="orthogonal", seed=seed)
        run(config, tmp_path / str(seed), spying(seen))
        start = models.build("mlp", *DIGITS, torch_seed(seed, "model"), "orthogonal").state_dict()
        assert all(message.alignment.target == measure(start) for message in seen if message.kind == "train")


def test_model_of_a_checkpoint(tmp_path: Path):
    folder = StrategyFolder(tmp_path)
    folder.save_checkpoint(3, initial_model(1), {"target": torch.ones(2)}, {"0-1.state": 7})
    read = weights.read(tmp_path / "checkpoints/round-000003.safetensors")
    assert read.keys() == initial_model(1).keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in initial_model(1).items())


def test_tensors_come_in_the_order_of_their_names(tmp_path: Path):
    ordered = ["a.2.bias", "a.2.weight", "a.10.bias", "a.10.weight", "b", "c1", "c02", "c10.9.x"]
    save_file({name: torch.ones(len(name)) for name in reversed(ordered)}, tmp_path / "one.safetensors")
    assert list(weights.read(tmp_path / "one.safetensors")) == ordered


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_take_the_models_types(tmp_path: Path, dtype):
    path = tmp_path / "other.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in initial_model(1).items()}, path)
    model = models.build("mlp", *DIGITS, 0)
    weights.begin(model, Config(initial_model=str(path)))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, initial_model(1)[name].to(dtype).float())


def test_counters_and_tied_weights_come_through(tmp_path: Path):
    for name in ("federations:NormNet", "federations:TiedNet"):
        made = models.build(name, *DIGITS, 4)
        state = {key: tensor + 1 for key, tensor in made.state_dict().items()}
        save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "one.safetensors")
        model = models.build(name, *DIGITS, 0)
        weights.begin(model, Config(model=name, initial_model=str(tmp_path / "one.safetensors")))
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_without_a_file_nothing_changes():
    model = models.build("mlp", *DIGITS, 0)
    weights.begin(model, Config())
    assert all(torch.equal(tensor, initial_model()[name]) for name, tensor in model.state_dict().items())
    assert weights.pinned(Config()) == Config()


def test_pinned_config_names_the_content(tmp_path: Path):
    path = tmp_path / "mine.safetensors"
    save_file(initial_model(1), path)
    config = Config(initial_model=str(path))
    pinned = weights.pinned(config)
    assert pinned == config.model_copy(update={"initial_model_sha256": sha256(path)})
    weights.begin(models.build("mlp", *DIGITS, 0), pinned)
    save_file(initial_model(2), path)
    assert weights.pinned(pinned) == pinned
    with pytest.raises(
        ValueError, match=rf"mine.safetensors: its SHA-256 is {sha256(path)}, allowed is [0-9a-f]{{64}}: "
    ):
        weights.begin(models.build("mlp", *DIGITS, 0), pinned)


def broken(path: Path, how: str) -> None:
    state = initial_model()
    if how == "names":
        state["head.weight"] = state.pop("layers.2.weight")
    elif how == "less":
        del state["layers.2.weight"]
    elif how == "more":
        state["head.weight"] = state["layers.2.weight"].clone()
    elif how == "many names":
        state = {f"m.{name}": tensor for name, tensor in state.items()}
    elif how == "shapes":
        state["layers.0.weight"] = torch.ones(200, 784)
    elif how == "not finite":
        state["layers.0.weight"][3, 5] = torch.nan
        state["layers.2.bias"][1] = -torch.inf
    elif how == "too large":
        state["layers.2.bias"] = state["layers.2.bias"].double() + 1e300
    elif how == "no safetensors":
        path.write_bytes(b"PK\x03\x04")
        return
    elif how == "nothing":
        return
    elif how == "folder":
        path.mkdir()
        return
    save_file(state, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "names",
            "initial-model .*mine: tensor names differ from those of model 'mlp'; missing: layers.2.weight; "
            "surplus: head.weight; allowed is a file of this model$",
        ),
        ("less", "differ from those of model 'mlp'; missing: layers.2.weight; allowed is a file of this model$"),
        ("more", "differ from those of model 'mlp'; surplus: head.weight; allowed is a file of this model$"),
        (
            "many names",
            "'mlp'; missing: layers.0.bias, .*, layers.1.weight and 2 more; "
            "surplus: m.layers.0.bias, .*, m.layers.1.weight and 2 more; allowed",
        ),
        (
            "shapes",
            r"shapes differ from .* 'mlp': layers.0.weight \(200, 784\) instead of \(200, 64\); allowed is a file of ",
        ),
        ("not finite", "initial-model .*mine: NaN or infinite in layers.0.weight, layers.2.bias; allowed are finite "),
        ("too large", "initial-model .*mine: NaN or infinite in layers.2.bias; "),
        ("no safetensors", "mine: not a safetensors file: "),
        ("nothing", "mine: cannot be read: No such file or directory$"),
        ("folder", "mine: cannot be read: Is a directory$"),
    ],
)
def test_file_that_does_not_fit_is_said_in_a_line(tmp_path: Path, how, message):
    broken(tmp_path / "mine", how)
    with pytest.raises(ValueError, match=message) as error:
        weights.begin(models.build("mlp", *DIGITS, 0), Config(initial_model=str(tmp_path / "mine")))
    assert "\n" not in str(error.value)
