"""BatchNorm in a federation: what is averaged, what stays with a client, and what the server then has."""

from pathlib import Path

import numpy as np
import pytest
import torch
from federations import DIGITS, ask, digest, grid_of, one_round, run, tiny
from flwr.app import ConfigRecord, Context, Message, RecordDict
from safetensors.torch import load_file
from torch import nn

from clients.batch_norm import local_names
from clients.client_app import app as client_app
from clients.federation import federation
from clients.training import train
from fedwsa import messages, models
from fedwsa.arrays import pack, unpack
from fedwsa.evaluation import evaluate
from fedwsa.run_folder import StrategyFolder
from fedwsa.scope import measure
from fedwsa.seeding import torch_generator
from strategies import FedAvg

STATISTICS = ["2.running_mean", "2.running_var", "2.num_batches_tracked"]
LOCAL = {"aggregate": [], "local": ["2.weight", "2.bias", *STATISTICS], "local-statistics": STATISTICS}
POLICIES = list(LOCAL)


def two(policy, **changes):
    """Two clients of unlike size, who both take part in everything."""
    options = {"num_clients": 2, "cohort": 2, "evaluation_cohort": 2, "batch_size": 20, "alpha": 0.5, **changes}
    return tiny(model="federations:NormNet", strategies=("fedavg",), batch_norm=policy, **options)


def started(config):
    """A model that has trained a little: no number is what a new one has."""
    return trained(config, 0, 9, models.build(config.model, *DIGITS, 0).state_dict())


def trained(config, client, server_round, start):
    model = models.build(config.model, *DIGITS, 0)
    model.load_state_dict(start)
    holdings = federation(config)
    images, labels = holdings.dataset.train_tensors(holdings.training[client])
    train(model, images, labels, config, torch_generator(config.seed[0], "client", server_round, client))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def bits(state):
    return digest({name: tensor.numpy() for name, tensor in state.items()})


def kept(grid, client):
    """What a client has in its Context.state."""
    return unpack(grid.states[client]["batch-norm"])


@pytest.mark.parametrize("policy", POLICIES)
def test_two_rounds_of_two_clients_by_hand(policy):
    config = two(policy)
    local, server = LOCAL[policy], started(config)
    sizes = [len(part) for part in federation(config).training]
    assert sizes[0] // 20 != sizes[1] // 20
    grid = grid_of(client_app, 2, config.to_run_config())
    own = [{}, {}]
    for server_round in (1, 2):
        arrays, _ = one_round(FedAvg(2, seed=0), grid, pack(server), server_round)
        replies = [trained(config, client, server_round, {**server, **own[client]}) for client in (0, 1)]
        own = [{name: reply[name] for name in local} for reply in replies]
        averaged = unpack(arrays)
        assert list(averaged) == list(server)
        for name, tensor in averaged.items():
            assert tensor.dtype == server[name].dtype
            if name in local:
                assert torch.equal(tensor, server[name]), name
                continue
            mean = sum(n * reply[name].double() for n, reply in zip(sizes, replies, strict=True)) / sum(sizes)
            expected = mean if tensor.is_floating_point() else mean.round()  # a counter; never n // k
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-7, atol=1e-12, msg=name)
        for client in (0, 1) if local else ():
            assert list(kept(grid, client)) == [name for name in server if name in local]
            assert bits(kept(grid, client)) == bits({name: own[client][name] for name in kept(grid, client)})
        assert grid.states.keys() == ({0, 1} if local else set())
        server = averaged
    assert [reply["2.num_batches_tracked"] for reply in replies] != [server["2.num_batches_tracked"]] * 2


@pytest.mark.parametrize("policy", ["local", "local-statistics"])
def test_clients_evaluate_with_their_own(policy):
    config = two(policy)
    server = started(config)
    grid = grid_of(client_app, 2, config.to_run_config())
    strategy = FedAvg(1, seed=0, evaluation_cohort=2)
    arrays, _ = one_round(strategy, grid, pack(server))
    (trainer,) = grid.states
    before = bits(kept(grid, trainer))
    outgoing = strategy.configure_evaluate(1, arrays, ConfigRecord(), grid)
    replies = list(grid.send_and_receive(outgoing))
    assert grid.states.keys() == {trainer}
    assert bits(kept(grid, trainer)) == before
    holdings, found = federation(config), {}
    for client in (0, 1):
        images, labels = holdings.dataset.train_tensors(holdings.validation[client])
        for whose, own in (("own", kept(grid, trainer)), ("server's", {})):
            model = models.build(config.model, *DIGITS, 0)
            model.load_state_dict({**unpack(arrays), **own})
            found[client, whose] = evaluate(model, images, labels)
    for client, reply in enumerate(replies):
        metrics = messages.metrics_of(reply)
        expected = found[client, "own" if client == trainer else "server's"]
        assert (metrics["loss"], metrics["accuracy"]) == expected
    assert found[trainer, "own"] != found[trainer, "server's"]


@pytest.mark.parametrize("policy", POLICIES)
def test_reply_holds_what_was_sent_in_place_of_what_is_kept(policy):
    config = two(policy)
    start = started(config)
    state, metrics = ask(config, 1, start=start)
    assert list(state) == list(start)
    unchanged = [name for name in start if torch.equal(state[name], start[name])]
    assert unchanged == [name for name in start if name in LOCAL[policy]]
    scope = measure(state)
    assert (metrics["scope-means"], metrics["scope-variances"]) == (scope.means.tolist(), scope.variances.tolist())


def asked(config, start, context, strategy, kind="train", **settings):
    entries = {messages.SERVER_ROUND: 1, messages.VERSION: messages.SCHEMA_VERSION, **settings}
    if strategy:
        entries[messages.STRATEGY] = strategy
    content = RecordDict({messages.ARRAYS: pack(start), messages.CONFIG: ConfigRecord(entries)})
    return client_app(Message(content, 1, kind), context)


def test_strategies_do_not_share_what_a_real_client_keeps():
    """Its context lives as long as the run, in which one strategy follows another."""
    config = two("local")
    start = started(config)
    context = Context(1, 1, {"partition-id": 0, "num-partitions": 2}, RecordDict(), config.to_run_config())
    asked(config, start, context, "one")
    asked(config, start, context, "other")
    one, other = (unpack(context.state[f"batch-norm {name}"]) for name in ("one", "other"))
    assert bits(one) == bits(other)
    asked(config, start, context, "one")
    assert bits(unpack(context.state["batch-norm one"])) != bits(other)
    assert bits(unpack(context.state["batch-norm other"])) == bits(other)


def test_clients_keep_something_only_where_the_policy_says_so(tmp_path: Path):
    for policy in POLICIES:
        run(two(policy, rounds=1), tmp_path / policy)
        states = StrategyFolder(tmp_path / policy / "fedavg").resume().client_states
        assert states.keys() == (set() if policy == "aggregate" else {0, 1})


def test_central_evaluation_is_of_the_servers_model_whoever_does_it():
    config = two("local")
    start = started(config)
    context = Context(1, 1, {"partition-id": 0, "num-partitions": 2}, RecordDict(), config.to_run_config())
    part = {messages.FIRST_SAMPLE: 0, messages.LAST_SAMPLE: 100}
    before = messages.metrics_of(asked(config, start, context, "", messages.TEST_SPLIT, **part))
    asked(config, start, context, "")
    assert context.state
    assert messages.metrics_of(asked(config, start, context, "", messages.TEST_SPLIT, **part)) == before
    model = models.build(config.model, *DIGITS, 0)
    model.load_state_dict(start)
    images, labels = federation(config).dataset.test_tensors(slice(0, 100))
    assert (before["loss"], before["accuracy"]) == evaluate(model, images, labels)


# ---- whole runs


def finals(folder: Path, policy, rounds=4, **changes):
    config = two(policy, rounds=rounds, **changes).model_copy(update={"strategies": ("fedavg", "fedavg-wsa")})
    run(config, folder)
    return {name: (folder / name / "final.safetensors").read_bytes() for name in config.strategies}


@pytest.mark.parametrize("policy", ["local", "local-statistics"])
def test_what_clients_keep_survives_an_interruption(tmp_path: Path, policy):
    whole = finals(tmp_path / "whole", policy)
    finals(tmp_path / "parts", policy, rounds=2)
    for name in whole:
        (tmp_path / "parts" / name / "final.safetensors").unlink()
    assert finals(tmp_path / "parts", policy) == whole
    aggregated = finals(tmp_path / "aggregated", "aggregate")
    assert all(aggregated[name] != whole[name] for name in whole)


def test_a_strategy_starts_without_what_clients_kept_in_the_one_before(tmp_path: Path):
    both = finals(tmp_path, "local", wsa={"strength": 0.0})
    assert both["fedavg"] == both["fedavg-wsa"]


def test_server_never_moves_what_stays_local(tmp_path: Path):
    for strategy in ("fedavg", "np-merge"):
        config = two("local", np_merge={"steps": 2, "align": False}).model_copy(update={"strategies": (strategy,)})
        run(config, tmp_path)
        final = load_file(tmp_path / strategy / "final.safetensors")
        assert torch.equal(final["2.num_batches_tracked"], torch.tensor(0))
        np.testing.assert_allclose(final["2.running_mean"], np.zeros(16), atol=1e-7)
        np.testing.assert_allclose(final["2.weight"], np.ones(16), atol=1e-6)


# ---- which arrays


def test_names_under_every_policy():
    model = models.build("resnet8", *DIGITS, 0)
    state = model.state_dict()
    norms = [name for name in state if "norm" in name]
    assert local_names(model, "aggregate") == []
    assert local_names(model, "local") == norms
    assert local_names(model, "local-statistics") == [name for name, _ in model.named_buffers()]
    assert local_names(models.build("resnet8", *DIGITS, 0, norm="group"), "local") == []
    assert local_names(nn.BatchNorm1d(3), "local") == list(nn.BatchNorm1d(3).state_dict())
    bare = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3, track_running_stats=False))
    assert local_names(bare, "local") == list(bare.state_dict())
    shared = nn.BatchNorm1d(3)
    assert local_names(nn.ModuleList([shared, shared]), "local-statistics") == [
        f"{place}.{name}" for place in (0, 1) for name in ("running_mean", "running_var", "num_batches_tracked")
    ]
