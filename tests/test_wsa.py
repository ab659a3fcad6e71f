"""Weight scope alignment as a strategy: what goes out, what is fused, what the wrapped strategy sees."""

import random

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
import torch
from federations import (
    DIGITS,
    Seen,
    alignment_towards,
    canned,
    digest,
    grid_of,
    initial_model,
    lines,
    numbers,
    one_round,
    record,
    run,
    spying,
    tiny,
)
from flwr.app import ConfigRecord, Context
from flwr.serverapp import ServerApp
from safetensors.torch import load_file

from clients.training import train
from fedwsa import models
from fedwsa.arrays import pack
from fedwsa.run_folder import StrategyFolder
from fedwsa.scope import VARIANCE_FUSIONS, WeightScope
from fedwsa.seeding import torch_generator, torch_seed
from fedwsa.simulation import simulate
from strategies import FedAvg, WeightScopeAlignment
from strategies.gate import Gate

LAYERS = ("layers.0.weight", "layers.1.weight", "layers.2.weight")


def scope_of(arrays) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population variance of each layer, by NumPy."""
    layers = [arrays[name].astype(np.float64) for name in LAYERS]
    return np.array([layer.mean() for layer in layers]), np.array([layer.var() for layer in layers])


def of_round(seen: list[Seen], server_round: int) -> list[Seen]:
    return [message for message in seen if (message.kind, message.server_round) == ("train", server_round)]


def mean_and_weights(replies: list[Seen]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scopes of the clients' models, [K, L] each, and p_k, [K, 1]."""
    weights = np.array([reply.metrics["num-examples"] for reply in replies], dtype=np.float64)
    means, variances = zip(*[scope_of(reply.model) for reply in replies], strict=True)
    return np.array(means), np.array(variances), (weights / weights.sum())[:, None]


def fused_by_hand(replies: list[Seen], variance: str) -> tuple[np.ndarray, np.ndarray]:
    means, variances, p = mean_and_weights(replies)
    mean = (p * means).sum(0)
    if variance == "mean":
        return mean, (p * variances).sum(0)
    if variance == "mixture":
        return mean, (p * (variances + means**2)).sum(0) - mean**2
    if variance == "independent":
        return mean, (p**2 * variances).sum(0)
    merged = {
        name: sum(p[k, 0] * reply.model[name].astype(float) for k, reply in enumerate(replies)) for name in LAYERS
    }
    return scope_of({name: values.astype(np.float32) for name, values in merged.items()})


def run_wsa(folder, **wsa) -> list[Seen]:
    seen: list[Seen] = []
    run(tiny(strategies=("fedavg-wsa",), rounds=3, wsa=wsa), folder, spying(seen))
    return seen


# ---- the target on the wire


@pytest.mark.parametrize("variance", VARIANCE_FUSIONS)
def test_target_is_the_fusion_of_the_scopes_that_came_back(variance, tmp_path):
    seen = run_wsa(tmp_path, variance=variance, strength=0.5)
    for server_round in (1, 2):
        mean, fused_variance = fused_by_hand(of_round(seen, server_round), variance)
        for message in of_round(seen, server_round + 1):
            target = message.alignment.target
            assert target.names == LAYERS
            np.testing.assert_allclose(target.means, mean, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(target.variances, fused_variance, rtol=1e-6 if variance == "mixture" else 1e-9)


def test_first_target_is_the_scope_of_the_initial_model(tmp_path):
    seen = run_wsa(tmp_path)
    mean, variance = scope_of({k: v.numpy() for k, v in initial_model(torch_seed(0, "model")).items()})
    for message in of_round(seen, 1):
        np.testing.assert_allclose(message.alignment.target.means, mean, rtol=1e-12)
        np.testing.assert_allclose(message.alignment.target.variances, variance, rtol=1e-12)


def test_initial_target_never_moves(tmp_path):
    seen = run_wsa(tmp_path, target="initial")
    targets = [message.alignment.target for message in seen if message.kind == "train"]
    assert len(targets) == 9
    assert all(target == targets[0] for target in targets)


def test_options_reach_the_clients(tmp_path):
    seen = run_wsa(tmp_path, strength=0.25, mode="proximal", reduction="mean")
    alignments = [message.alignment for message in seen if message.kind == "train"]
    assert {(a.strength, a.mode, a.reduction) for a in alignments} == {(0.25, "proximal", "mean")}


def test_only_training_is_aligned(tmp_path):
    seen = run_wsa(tmp_path)
    evaluations = [message for message in seen if message.kind == "evaluate"]
    assert len(evaluations) == 6
    assert all(message.config.keys() == {"server-round", "schema-version", "strategy"} for message in evaluations)


def test_strength_zero_is_plain_fedavg_bit_for_bit(tmp_path):
    seen: list[Seen] = []
    config = tiny(strategies=("fedavg", "fedavg-wsa"), wsa={"strength": 0.0})
    run(config, tmp_path, spying(seen))
    files = [tmp_path / name / "final.safetensors" for name in config.strategies]
    assert files[0].read_bytes() == files[1].read_bytes()
    events = [lines(tmp_path / name / "metrics.jsonl") for name in config.strategies]
    for event in events[0]:  # the traffic too: nothing about scopes goes out, but the name is longer
        if "bytes_down" in event:
            event["bytes_down"] += event["num_clients"] * len("-wsa")
    assert events[0] == events[1]
    assert all(message.config.keys() == {"server-round", "schema-version", "strategy"} for message in seen)


def test_alignment_changes_the_training(tmp_path):
    models_of = {}
    for strength in (0.0, 5.0):
        run_wsa(tmp_path / str(strength), strength=strength)
        models_of[strength] = load_file(tmp_path / str(strength) / "fedavg-wsa" / "final.safetensors")
    assert all(not torch.equal(models_of[0.0][name], models_of[5.0][name]) for name in LAYERS)


# ---- the recorded distance


@pytest.mark.parametrize(
    ("strategy", "variance"), [("fedavg", "mean"), *[("fedavg-wsa", variance) for variance in VARIANCE_FUSIONS]]
)
def test_scope_distance_is_the_mean_divergence_from_the_fusion(strategy, variance, tmp_path):
    seen: list[Seen] = []
    run(tiny(strategies=(strategy,), wsa={"variance": variance}), tmp_path, spying(seen))
    events = [event for event in lines(tmp_path / strategy / "metrics.jsonl") if event["phase"] == "train"]
    for event in events:
        replies = of_round(seen, event["round"])
        means, variances, p = mean_and_weights(replies)
        mean, fused_variance = fused_by_hand(replies, variance)
        clients = torch.distributions.Normal(torch.tensor(means), torch.tensor(variances).sqrt())
        target = torch.distributions.Normal(torch.tensor(mean), torch.tensor(fused_variance).sqrt())
        divergence = torch.distributions.kl_divergence(clients, target).numpy()
        np.testing.assert_allclose(event["scope_distance"], (p * divergence).sum(0), rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(event["scope_means"], mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(event["scope_variances"], fused_variance, rtol=1e-6)


def test_spread_of_the_scopes_is_recorded(tmp_path):
    seen: list[Seen] = []
    run(tiny(strategies=("fedavg",)), tmp_path, spying(seen))
    for event in (each for each in lines(tmp_path / "fedavg" / "metrics.jsonl") if each["phase"] == "train"):
        means, variances, p = mean_and_weights(of_round(seen, event["round"]))
        for key, values in (("scope_mean_spread", means), ("scope_std_spread", np.sqrt(variances))):
            expected = np.sqrt((p * (values - (p * values).sum(0)) ** 2).sum(0))
            np.testing.assert_allclose(event[key], expected, rtol=1e-5)


@pytest.mark.parametrize("target", ["fused", "initial"])
def test_target_distance_is_that_of_the_target_that_was_sent(target, tmp_path):
    seen = run_wsa(tmp_path, target=target)
    for event in (each for each in lines(tmp_path / "fedavg-wsa" / "metrics.jsonl") if each["phase"] == "train"):
        replies = of_round(seen, event["round"])
        means, variances, p = mean_and_weights(replies)
        sent = replies[0].alignment.target
        clients = torch.distributions.Normal(torch.tensor(means), torch.tensor(variances).sqrt())
        divergence = torch.distributions.kl_divergence(
            clients, torch.distributions.Normal(sent.means, sent.variances.sqrt())
        )
        np.testing.assert_allclose(event["target_distance"], (p * divergence.numpy()).sum(0), rtol=1e-5, atol=1e-9)
        assert event["target_distance"] > event["scope_distance"]  # the fusion is nearer


def test_distance_to_a_target_of_some_layers_by_hand():
    """Scopes N(0, 1) and N(2, 4), weights 1 and 3, target N(0, 4): ln 2 − 3/8 and 1/2; the free layer has none."""
    arrays = {"free": np.zeros((1, 2), np.float32), "w": np.zeros((2, 2), np.float32)}
    clients = canned(
        (arrays, {"num-examples": 1, "scope-means": [5.0, 0.0], "scope-variances": [1.0, 1.0]}),
        (arrays, {"num-examples": 3, "scope-means": [6.0, 2.0], "scope-variances": [1.0, 4.0]}),
    )
    target = WeightScope(("w",), torch.zeros(1, dtype=torch.float64), torch.full((1,), 4.0, dtype=torch.float64))
    strategy = WeightScopeAlignment(FedAvg(2, seed=0), target=target)
    _, metrics = one_round(strategy, grid_of(clients, 2), record(arrays))
    assert metrics["target-distance"] == [0.0, pytest.approx(0.25 * (np.log(2) - 3 / 8) + 0.75 * 0.5, rel=1e-12)]


def test_distance_and_fusion_by_hand():
    """Scopes N(0, 1) and N(2, 4), weights 1 and 3: fused N(1.5, 3.25)."""
    w = np.zeros((2, 2), np.float32)
    clients = canned(
        ({"w": w}, {"num-examples": 1, "scope-means": [0.0], "scope-variances": [1.0]}),
        ({"w": w}, {"num-examples": 3, "scope-means": [2.0], "scope-variances": [4.0]}),
    )
    strategy = WeightScopeAlignment(FedAvg(2, seed=0))
    _, metrics = one_round(strategy, grid_of(clients, 2), record({"w": w}))
    assert (strategy.target.means.item(), strategy.target.variances.item()) == (1.5, 3.25)
    to_first = 0.5 * (np.log(3.25) + (1 + 1.5**2) / 3.25 - 1)
    to_second = 0.5 * (np.log(3.25 / 4) + (4 + 0.5**2) / 3.25 - 1)
    assert metrics["scope-distance"] == pytest.approx([0.25 * to_first + 0.75 * to_second], rel=1e-12)
    assert (metrics["scope-means"], metrics["scope-variances"]) == ([1.5], [3.25])


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"scope-means": [9.0]},
        {"scope-means": [9.0], "scope-variances": [-1.0]},
        {"scope-means": [9.0, 9.0], "scope-variances": [1.0, 1.0]},
        {"scope-means": 9.0, "scope-variances": 1.0},
    ],
    ids=["none", "half", "negative", "other layers", "scalars"],
)
def test_client_without_a_usable_scope_counts_for_the_weights_and_not_for_the_fusion(odd):
    clients = canned(
        ({"w": np.float32([[1, 1]])}, {"num-examples": 1, "scope-means": [0.5], "scope-variances": [2.0]}),
        ({"w": np.float32([[5, 5]])}, {"num-examples": 3, **odd}),
    )
    strategy = Gate(WeightScopeAlignment(FedAvg(2, seed=0)))
    arrays, metrics = one_round(strategy, grid_of(clients, 2), record({"w": np.zeros((1, 2), np.float32)}))
    assert numbers(arrays)["w"].tolist() == [[4, 4]]
    assert (metrics["scope-means"], metrics["scope-variances"]) == ([0.5], [2.0])
    assert strategy.failures == []


def test_target_stays_where_no_client_sends_a_scope():
    clients = canned(*[({"w": np.float32([[5, 6]])}, {"num-examples": 3})] * 2)
    strategy = WeightScopeAlignment(FedAvg(2, seed=0))
    _, metrics = one_round(strategy, grid_of(clients, 2), record({"w": np.float32([[1, 3]])}))
    assert (strategy.target.means.item(), strategy.target.variances.item()) == (2.0, 1.0)
    assert dict(metrics) == {}


# ---- around Flower's strategies


def watching(base: type[flower.FedAvg], metrics_seen: list[set[str]], **options) -> flower.FedAvg:
    """A strategy of Flower's that notes which metrics reach it."""

    class Watching(base):  # type: ignore[misc, valid-type]
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            metrics_seen.extend(set(reply.content["metrics"]) for reply in replies)
            return super().aggregate_train(server_round, replies)

    return Watching(fraction_evaluate=0.0, **options)


def start(strategy, seen: list[Seen]) -> tuple[dict[str, np.ndarray], dict[int, dict]]:
    """Three rounds of Flower's own loop with all six of our clients."""
    app = ServerApp()
    results = []

    @app.main()
    def main(grid, context: Context) -> None:
        results.append(strategy.start(grid, pack(initial_model()), num_rounds=3))

    random.seed(5)  # Flower draws its cohorts from it
    config = tiny()
    simulate(app, spying(seen), config.num_clients, engine="inprocess", run_config=config.to_run_config())
    return numbers(results[0].arrays), results[0].train_metrics_clientapp


@pytest.mark.parametrize("base", [flower.FedAvg, flower.FedAdam, flower.FedMedian, flower.FedTrimmedAvg])
def test_flowers_strategies_are_aligned_and_see_no_scope(base):
    metrics_seen: list[set[str]] = []
    seen: list[Seen] = []
    gate = Gate(WeightScopeAlignment(watching(base, metrics_seen), strength=0.5, variance="merged"))
    final, metrics = start(gate, seen)
    assert gate.failures == []
    assert metrics_seen == [{"num-examples", "loss"}] * 18
    assert all(np.isfinite(values).all() for values in final.values())
    for server_round in (1, 2):  # the scope of whatever the strategy made of the models
        targets = [message.alignment.target for message in of_round(seen, server_round + 1)]
        assert all(target == targets[0] for target in targets)
        assert metrics[server_round]["scope-means"] == targets[0].means.tolist()
        recorded = {"scope-distance", "scope-means", "scope-variances", "scope-mean-spread", "scope-std-spread"}
        assert metrics[server_round].keys() == {"loss", *recorded, "target-distance"}


@pytest.mark.parametrize("base", [flower.FedAvg, flower.FedAdam, flower.FedMedian])
def test_strength_zero_leaves_flowers_strategy_as_it_is(base):
    plain, _ = start(base(fraction_evaluate=0.0), [])
    wrapped, _ = start(WeightScopeAlignment(base(fraction_evaluate=0.0), strength=0.0), [])
    aligned, _ = start(WeightScopeAlignment(base(fraction_evaluate=0.0), strength=1.0), [])
    assert digest(plain) == digest(wrapped)
    assert digest(plain) != digest(aligned)


# ---- the pull


@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_alignment_pulls_every_layer_towards_the_target(mode):
    """The target is half as wide as the start; training alone widens the layers."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(64, 1, 8, 8, generator=generator), torch.randint(10, (64,), generator=generator)
    distance = {}
    for strength in (0.0, 10.0):
        model = models.build("mlp", *DIGITS, seed=0)
        alignment = alignment_towards(0.5, model.state_dict(), strength=strength, mode=mode)
        train(model, images, labels, tiny(local_epochs=5), torch_generator(0, "client"), alignment)
        mean, variance = scope_of({name: tensor.numpy() for name, tensor in model.state_dict().items()})
        target = alignment.target.means.numpy(), alignment.target.variances.numpy()
        distance[strength] = 0.5 * (np.log(target[1] / variance) + (variance + (mean - target[0]) ** 2) / target[1] - 1)
    assert (distance[10.0] < 0.9 * distance[0.0]).all()


# ---- state and arguments


def test_state_keeps_the_order_of_the_layers_through_a_checkpoint(tmp_path):
    names = ["stem.weight", "layers.2.weight", "layers.10.weight", "a/b.weight", "bias"]
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(3, 2) if "weight" in name else 2) for name in names}
    one, other = WeightScopeAlignment(FedAvg(1, seed=0)), WeightScopeAlignment(FedAvg(1, seed=0))
    list(one.configure_train(1, record(arrays), ConfigRecord(), grid_of(canned(), 1)))
    assert one.target.names == tuple(names[:4])
    folder = StrategyFolder(tmp_path)
    folder.record({})
    folder.save_checkpoint(1, {}, one.state())
    other.load_state(folder.resume().strategy_state)
    assert other.target == one.target


def test_wrapped_strategys_state_is_its_own():
    class Counting(FedAvg):
        def state(self):
            return {"target/0/rounds": torch.tensor(3)}

        def load_state(self, state):
            self.loaded = state

    inner = Counting(1, seed=0)
    strategy = WeightScopeAlignment(inner)
    strategy.load_state(strategy.state())
    assert strategy.target is None
    assert inner.loaded == {"target/0/rounds": torch.tensor(3)}


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_strength_must_be_a_number_from_zero(strength):
    with pytest.raises(ValueError, match="strength must be >= 0 and finite"):
        WeightScopeAlignment(FedAvg(1, seed=0), strength=strength)


@pytest.mark.parametrize("option", ["mode", "reduction", "target", "variance"])
def test_unknown_options_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be one of .*, got 'x'"):
        WeightScopeAlignment(FedAvg(1, seed=0), **{option: "x"})


def test_tied_weights_and_tables_do_not_stop_an_aligned_run(tmp_path):
    """The server sees both names of a tied weight, and a buffer, as layers; a client aligns its parameters."""
    run(tiny(strategies=("fedavg-wsa",), model="federations:TiedNet"), tmp_path)
    events = [event for event in lines(tmp_path / "fedavg-wsa" / "metrics.jsonl") if event["phase"] == "train"]
    assert [event["num_failed"] for event in events] == [0, 0]
    assert events[0]["layers"] == ["table", "stem.weight", "body.weight", "again.weight", "head.weight"]
    final = load_file(tmp_path / "fedavg-wsa" / "final.safetensors")
    assert torch.equal(final["body.weight"], final["again.weight"])
    assert torch.equal(final["table"], torch.linspace(-1, 1, 64).reshape(1, 64))
