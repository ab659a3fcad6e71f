"""What SCAFFOLD and FedDyn have in common: an array a parameter at the server, and one at each client."""

import pytest
import torch
from federations import DIGITS, ask, finals, grid_of, holdout, initial_model, lines, run, spying, tiny, usable
from flwr.app import ConfigRecord
from safetensors.torch import load_file

from clients.client_app import app as client_app
from fedwsa import messages, models
from fedwsa.arrays import pack, unpack
from fedwsa.run_folder import StrategyFolder
from strategies import FedDyn, Scaffold

KEPT = {"feddyn": ("h", "feddyn-gradient"), "scaffold": ("control", "control")}  # by the server, by the clients
OPTIONS = {"feddyn": {}, "scaffold I": {"scaffold": {"option": "I"}}, "scaffold II": {"scaffold": {"option": "II"}}}


def pair(name: str) -> tuple[str, str]:
    return name, f"{name}-wsa"


@pytest.mark.parametrize("model", ["mlp", "federations:NormNet"])
@pytest.mark.parametrize("batch_norm", ["aggregate", "local"])
@pytest.mark.parametrize("which", OPTIONS)
def test_all_clients_replies_are_usable(tmp_path, which, batch_norm, model):
    names = pair(which.partition(" ")[0])
    config, seen = tiny(strategies=names, model=model, batch_norm=batch_norm, **OPTIONS[which]), []
    run(config, tmp_path, spying(seen))
    for name in names:
        assert usable(tmp_path, name) == [3, 3]
    aligned = [each.alignment is not None for each in seen if each.kind == "train"]
    assert aligned == [False] * 6 + [True] * 6
    plain, with_term = finals(tmp_path, config).values()
    assert plain != with_term


@pytest.mark.parametrize("strategy", KEPT)
def test_it_goes_on_from_a_checkpoint_with_what_the_clients_keep(tmp_path, strategy):
    server, client = KEPT[strategy]
    names = pair(strategy)
    config = tiny(strategies=names, rounds=4)
    run(config, tmp_path / "whole")
    run(config.model_copy(update={"rounds": 2}), tmp_path / "parts")
    for name in names:
        (tmp_path / "parts" / name / "final.safetensors").unlink()
        checkpoint = load_file(tmp_path / "parts" / name / "checkpoints" / "round-000002.safetensors")
        prefix = f"strategy/wrapped/{server}/" if name.endswith("wsa") else f"strategy/{server}/"
        assert {key.removeprefix(prefix) for key in checkpoint if key.startswith(prefix)} == set(initial_model())
        assert {checkpoint[prefix + key].dtype for key in initial_model()} == {torch.float64}
        files = StrategyFolder(tmp_path / "parts" / name).resume().client_states.values()
        assert 3 <= len(files) <= 6
        assert all(f"{client} {name}".encode() in file.read_bytes() for file in files)
    run(config, tmp_path / "parts")
    assert finals(tmp_path / "parts", config) == finals(tmp_path / "whole", config)
    for name in names:
        assert lines(tmp_path / "parts" / name / "metrics.jsonl") == lines(tmp_path / "whole" / name / "metrics.jsonl")


@pytest.mark.parametrize("name", ["federations:NormNet", "federations:TiedNet"])
@pytest.mark.parametrize(
    ("kind", "options", "step", "tolerance"),
    [
        (FedDyn, {"alpha": 0.1}, 2.0, 1e-5),  # in the first of all rounds h = −α (w̄ − x), so that x ← w̄ + (w̄ − x)
        (Scaffold, {"server_learning_rate": 0.25}, 0.25, 1e-6),
    ],
)
def test_parameters_are_stepped_and_the_rest_is_averaged(kind, options, step, tolerance, name):
    config, model = tiny(model=name, num_clients=2, cohort=2), models.build(name, *DIGITS, 1)
    start = {key: each.clone() for key, each in model.state_dict().items()}
    strategy = kind(2, parameters=holdout(0, model).trainable, num_clients=2, seed=0, **options)
    grid = grid_of(client_app, 2, config.to_run_config())
    replies = list(grid.send_and_receive(strategy.configure_train(1, pack(start), ConfigRecord(), grid)))
    own = [unpack(reply.content["arrays"]) for reply in replies]
    arrays, _ = strategy.aggregate_train(1, replies)
    trained = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    assert trained != start.keys()
    for key, found in unpack(arrays).items():
        mean = (own[0][key].double() + own[1][key].double()) / 2
        expected = (1 - step) * start[key].double() + step * mean if key in trained else mean
        assert found.dtype == start[key].dtype
        atol = 0.5 if found.dtype == torch.int64 else 0.1 * tolerance
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=atol)
        if key == "1.bias":  # which BatchNorm takes out again: its gradient is 0, and rounding may move it or not
            torch.testing.assert_close(found, start[key])
        else:
            assert key == "table" or not torch.equal(found, start[key])


# ---- what is not finite


@pytest.mark.parametrize(
    ("settings", "changes"),
    [({messages.LOCAL: "model"}, {}), ({}, {"batch_norm": "local", "model": "federations:NormNet"})],
)
def test_a_client_that_diverges_keeps_nothing_of_it(settings, changes):
    """An error gives it back the state that it had; NaN of one round would be in each of its later ones."""
    config = tiny(learning_rate=1e30, **changes)
    start = models.build(config.model, *DIGITS, seed=0).state_dict()
    with pytest.raises(RuntimeError, match=r"what this client would keep \(batch-norm\) is not finite$"):
        ask(config, start=start, settings=settings)
    ask(tiny(**changes), start=start, settings=settings)
