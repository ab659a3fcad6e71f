"""The variants of weight scope alignment in a federation: what goes over the wire in which round."""

import numpy as np
import pytest
import torch
from federations import (
    DIGITS,
    Seen,
    alignment_towards,
    ask,
    canned,
    grid_of,
    holdout,
    initial_model,
    lines,
    one_round,
    record,
    run,
    spying,
    tiny,
)
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedMedian
from safetensors.torch import load_file

from clients import training
from clients.client_app import app as client_app
from clients.objectives import Objective, Task
from clients.training import train
from experiments.run import check
from fedwsa import messages, models
from fedwsa.arrays import fill, pack, unpack
from fedwsa.config import ConfigError
from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.run_folder import StrategyFolder
from fedwsa.scope import WeightScope, measure, moving_average
from fedwsa.seeding import torch_generator, torch_seed
from fedwsa.stability import Descent
from strategies import FedAvg, FedAvgWSA, WeightScopeAlignment, build
from strategies.gate import Gate

LAYERS = ("layers.0.weight", "layers.1.weight", "layers.2.weight")


def run_wsa(folder, rounds=3, **wsa) -> list[Seen]:
    seen: list[Seen] = []
    run(tiny(strategies=("fedavg-wsa",), rounds=rounds, wsa=wsa), folder, spying(seen))
    return [message for message in seen if message.kind == "train"]


def strengths(seen: list[Seen]) -> dict[int, float]:
    found = {message.server_round: message.alignment.strength if message.alignment else 0.0 for message in seen}
    assert len(seen) == 3 * len(found)
    return found


def unit_weights(
    model: dict[str, np.ndarray], granularity: str, names: tuple[str, ...] = LAYERS
) -> dict[str, np.ndarray]:
    """Each unit's weights by NumPy."""
    layers = {name: model[name].astype(np.float64) for name in names}
    if granularity == "layer":
        return layers
    if granularity == "channel":
        return {f"{name}[{i}]": row for name, layer in layers.items() for i, row in enumerate(layer)}
    return {"model": np.concatenate([layer.ravel() for layer in layers.values()])}


def fused_by_hand(
    replies: list[Seen], granularity: str, names: tuple[str, ...] = LAYERS
) -> tuple[list[str], np.ndarray, np.ndarray]:
    weights = np.array([reply.metrics["num-examples"] for reply in replies], dtype=np.float64)
    clients = [unit_weights(reply.model, granularity, names) for reply in replies]
    p = (weights / weights.sum())[:, None]
    means = np.array([[unit.mean() for unit in client.values()] for client in clients])
    variances = np.array([[unit.var() for unit in client.values()] for client in clients])
    return list(clients[0]), (p * means).sum(0), (p * variances).sum(0)


# ---- schedules


def test_constant_is_the_same_in_every_round(tmp_path):
    assert strengths(run_wsa(tmp_path, strength=0.25)) == {1: 0.25, 2: 0.25, 3: 0.25}


def test_first_k_rounds_then_none(tmp_path):
    seen = run_wsa(tmp_path, strength=0.25, schedule="first-k-rounds", **{"schedule-rounds": 2})
    assert strengths(seen) == {1: 0.25, 2: 0.25, 3: 0.0}
    assert all(message.config.keys() == {"server-round", "schema-version", "strategy"} for message in seen[6:])


def test_linear_decay_by_hand(tmp_path):
    seen = run_wsa(tmp_path, rounds=4, strength=0.5, schedule="linear-decay", **{"schedule-rounds": 2})
    assert strengths(seen) == {1: 0.5, 2: 0.25, 3: 0.0, 4: 0.0}


def test_relative_sends_the_share(tmp_path):
    seen = run_wsa(tmp_path, schedule="relative", share=0.1)
    assert {message.alignment.share for message in seen} == {0.1}


@pytest.mark.parametrize("share", [0.02, 1e6])  # the second is capped
@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_relative_strength_is_that_of_the_first_step_for_the_whole_round(mode, share):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(64, 1, 8, 8, generator=generator), torch.randint(10, (64,), generator=generator)
    config = tiny(local_epochs=2, momentum=0.5)
    model = models.build("mlp", *DIGITS, seed=0)
    alignment = alignment_towards(0.5, model.state_dict(), mode=mode, share=share)
    first = torch.randperm(64, generator=torch_generator(0, "client"))[: config.batch_size]
    torch.nn.functional.cross_entropy(model(images[first]), labels[first]).backward()
    regularizer = WeightScopeRegularizer(model.named_parameters(), alignment.target, mode=mode)
    regularizer.fix_strength(share, config.learning_rate, config.momentum)
    assert regularizer.strength > 0
    ends = []
    for given in (alignment, alignment_towards(0.5, model.state_dict(), mode=mode, strength=regularizer.strength)):
        other = models.build("mlp", *DIGITS, seed=0)
        train(other, images, labels, config, torch_generator(0, "client"), given)
        ends.append(other.state_dict())
    plain = models.build("mlp", *DIGITS, seed=0)
    train(plain, images, labels, config, torch_generator(0, "client"))
    for name in LAYERS:
        assert torch.equal(ends[0][name], ends[1][name])
        assert not torch.equal(ends[0][name], plain.state_dict()[name])


class Cancelling(Objective):
    """Takes away most of the gradient, as SCAFFOLD and FedDyn do where they settle."""

    def add_gradient(self):
        for weights in self.task.parameters.values():
            weights.grad.mul_(1e-3)


def test_relative_strength_is_by_the_tasks_gradient_and_not_by_what_an_objective_makes_of_it():
    images, labels = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 10
    config, found = tiny(), []
    for make in (Objective, Cancelling):
        model = models.build("mlp", *DIGITS, seed=0)
        objective = make(Task(model, dict(model.named_parameters()), None, None, config))
        alignment = alignment_towards(0.5, model.state_dict(), share=0.02)
        generator = torch.Generator().manual_seed(0)
        found.append(train(model, images, labels, config, generator, alignment, objective).strength)
    assert found[0] == found[1] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": "cosine"},
            "schedule must be one of constant, first-k-rounds, linear-decay, relative, got 'cosine'",
        ),
        ({"schedule": "first-k-rounds"}, "schedule_rounds must be >= 1 with schedule 'first-k-rounds', got 0"),
        ({"schedule": "linear-decay", "schedule_rounds": -1}, "schedule_rounds must be >= 1"),
        ({"schedule": "relative"}, "share must be > 0 and finite with schedule 'relative', got 0.0"),
        ({"granularity": "block"}, "granularity must be one of layer, channel, model, got 'block'"),
        ({"divergence": "js"}, "divergence must be one of .*, got 'js'"),
        ({"divergence": "reverse-kl", "mode": "proximal"}, "'reverse-kl' has no proximal map"),
        ({"target_momentum": 1.0}, r"target_momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WeightScopeAlignment(FedAvg(1, seed=0), **options)


def test_relative_strength_is_reported_and_no_other(tmp_path):
    elsewhere = {"target": "gaussian", "target-std": 0.1}  # at the target itself λ is what the bound allows
    seen = run_wsa(tmp_path, schedule="relative", share=0.1, **elsewhere)
    for event in (each for each in lines(tmp_path / "fedavg-wsa" / "metrics.jsonl") if each["phase"] == "train"):
        replies = [message.metrics for message in seen if message.server_round == event["round"]]
        found = [metrics["scope-strength"] for metrics in replies]
        assert min(found) > 0
        assert len(set(found)) == 3
        mean = np.average(found, weights=[metrics["num-examples"] for metrics in replies])
        assert event["metrics"]["scope-strength"] == pytest.approx(mean, rel=1e-12)
    assert all("scope-strength" not in message.metrics for message in run_wsa(tmp_path / "constant"))


def test_a_strength_that_is_found_disturbs_no_strategy_of_flowers():
    strategy = WeightScopeAlignment(FedMedian(fraction_evaluate=0.0), schedule="relative", share=0.1)
    gate = Gate(strategy)
    _, metrics = one_round(gate, grid_of(spying([]), 6, tiny().to_run_config()), pack(initial_model()))
    assert gate.failures == []
    assert metrics["scope-strength"] > 0


# ---- divergences and granularities


def test_only_what_is_not_the_default_is_said(tmp_path):
    usual = {"server-round", "schema-version", "strategy", "scope-names", "scope-means", "scope-variances"}
    usual |= {"scope-strength", "scope-mode", "scope-reduction"}
    assert all(message.config.keys() == usual for message in run_wsa(tmp_path / "a", rounds=1))
    seen = run_wsa(
        tmp_path / "b", rounds=1, divergence="wasserstein", granularity="model", schedule="relative", share=0.1
    )
    more = {"scope-divergence", "scope-granularity", "scope-layers", "scope-share"}
    assert all(message.config.keys() == usual | more for message in seen)


@pytest.mark.parametrize("divergence", ["reverse-kl", "wasserstein"])
def test_divergence_reaches_the_training(divergence):
    config = tiny()
    alignment = alignment_towards(0.5, initial_model(), strength=0.5, divergence=divergence)
    state, _ = ask(config, settings=messages.pack_alignment(alignment))
    forward, _ = ask(config, settings=messages.pack_alignment(alignment_towards(0.5, initial_model(), strength=0.5)))
    assert all(not torch.equal(state[name], forward[name]) for name in LAYERS)


@pytest.mark.parametrize("granularity", ["channel", "model"])
@pytest.mark.parametrize("variance", ["mean", "merged"])
def test_units_are_sent_fused_and_sent_back(granularity, variance, tmp_path):
    seen = run_wsa(tmp_path, granularity=granularity, strength=0.5, variance=variance)
    for server_round in (1, 2):
        replies = [message for message in seen if message.server_round == server_round]
        names, means, variances = fused_by_hand(replies, granularity)
        for message in seen:
            if message.server_round == server_round + 1:
                target = message.alignment.target
                assert list(target.names) == names
                np.testing.assert_allclose(target.means, means, rtol=1e-6, atol=1e-8)
                if variance == "mean":
                    np.testing.assert_allclose(target.variances, variances, rtol=1e-9)
                else:
                    assert (target.variances.numpy() <= variances * (1 + 1e-6)).all()  # an average is narrower
                    assert target.variances.sum().item() < 0.9999 * variances.sum()
    first = unit_weights(
        {name: each.numpy() for name, each in initial_model(torch_seed(0, "model")).items()}, granularity
    )
    target = seen[0].alignment.target
    np.testing.assert_allclose(target.means, [unit.mean() for unit in first.values()], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(target.variances, [unit.var() for unit in first.values()], rtol=1e-9)


@pytest.mark.parametrize("granularity", ["channel", "model"])
def test_target_distance_of_a_layer_is_the_sum_over_its_units(granularity, tmp_path):
    seen = run_wsa(tmp_path, granularity=granularity, rounds=2)
    for event in (each for each in lines(tmp_path / "fedavg-wsa" / "metrics.jsonl") if each["phase"] == "train"):
        replies = [message for message in seen if message.server_round == event["round"]]
        weights = np.array([reply.metrics["num-examples"] for reply in replies], dtype=np.float64)
        target = replies[0].alignment.target
        totals = dict.fromkeys(LAYERS if granularity == "channel" else ["model"], 0.0)
        for reply, weight in zip(replies, weights / weights.sum(), strict=True):
            for i, (name, unit) in enumerate(unit_weights(reply.model, granularity).items()):
                mean, variance = target.means[i].item(), target.variances[i].item()
                ratio = unit.var() / variance
                kl = 0.5 * (ratio - np.log(ratio) - 1 + (unit.mean() - mean) ** 2 / variance)
                totals[name.partition("[")[0]] += weight * kl
        np.testing.assert_allclose(event["target_distance"], list(totals.values()), rtol=1e-6)


@pytest.mark.parametrize("granularity", ["channel", "model"])
def test_what_is_recorded_is_by_layer_all_the_same(granularity, tmp_path):
    seen = run_wsa(tmp_path, granularity=granularity)
    events = [event for event in lines(tmp_path / "fedavg-wsa" / "metrics.jsonl") if event["phase"] == "train"]
    for event in events:
        replies = [message for message in seen if message.server_round == event["round"]]
        _, means, variances = fused_by_hand(replies, "layer")
        assert event["layers"] == list(LAYERS)
        assert event["num_failed"] == 0
        np.testing.assert_allclose(event["scope_means"], means, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(event["scope_variances"], variances, rtol=1e-9)


@pytest.mark.parametrize("granularity", ["channel", "model"])
def test_alignment_pulls_the_units(granularity):
    config = tiny(local_epochs=3)
    start = initial_model()
    base = measure(start, granularity=granularity)
    target = WeightScope(base.names, base.means, base.variances / 4)
    alignment = messages.Alignment(target, 100.0, "proximal", "sum", granularity=granularity)
    pulled, metrics = ask(config, settings=messages.pack_alignment(alignment))
    free, _ = ask(config)
    scopes = [measure(state, granularity=granularity) for state in (pulled, free)]
    assert ((scopes[0].variances - target.variances).abs() < 0.5 * (scopes[1].variances - target.variances).abs()).all()
    assert metrics["unit-variances"] == scopes[0].variances.tolist()
    assert metrics["scope-variances"] == measure(pulled).variances.tolist()


@pytest.mark.parametrize("granularity", ["layer", "channel", "model"])
def test_tied_weights_and_tables_do_not_stop_an_aligned_run(granularity, tmp_path):
    run(tiny(strategies=("fedavg-wsa",), model="federations:TiedNet", wsa={"granularity": granularity}), tmp_path)
    events = [event for event in lines(tmp_path / "fedavg-wsa" / "metrics.jsonl") if event["phase"] == "train"]
    assert [event["num_failed"] for event in events] == [0, 0]


@pytest.mark.parametrize("granularity", ["channel", "model"])
def test_flowers_strategies_see_no_scope_of_units(granularity):
    seen: list[set[str]] = []

    class Watching(FedMedian):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            seen.extend(set(reply.content["metrics"]) for reply in replies)
            return super().aggregate_train(server_round, replies)

    one, many = {"unit-means": [0.5] * 2, "unit-variances": [1.0] * 2}, {"unit-means": [0.5], "unit-variances": [1.0]}
    metrics = {"num-examples": 3, "scope-means": [0.0], "scope-variances": [1.0]}
    metrics |= one if granularity == "channel" else many
    clients = canned(*[({"w": np.float32([[1, 2], [3, 4]])}, metrics)] * 2)
    strategy = WeightScopeAlignment(Watching(fraction_evaluate=0.0), granularity=granularity)
    one_round(Gate(strategy), grid_of(clients, 2), record({"w": np.zeros((2, 2), np.float32)}))
    assert seen == [{"num-examples"}] * 2
    assert strategy.target.names == (("w[0]", "w[1]") if granularity == "channel" else ("model",))
    assert set(strategy.target.means.tolist()) == {0.5}


def test_a_client_that_sends_no_units_counts_for_the_layers_and_not_for_the_target():
    w = np.float32([[1, 2], [3, 5]])
    metrics = {"num-examples": 1, "scope-means": [0.0], "scope-variances": [1.0]}
    clients = canned(
        ({"w": w}, {**metrics, "unit-means": [0.5], "unit-variances": [2.0]}),
        ({"w": w}, {**metrics, "scope-means": [2.0]}),
    )
    strategy = WeightScopeAlignment(FedAvg(2, seed=0), granularity="model")
    _, recorded = one_round(strategy, grid_of(clients, 2), record({"w": w}))
    assert (strategy.target.means.item(), strategy.target.variances.item()) == (0.5, 2.0)
    assert recorded["scope-means"] == [1.0]


# ---- targets


def test_gaussian_target_goes_out_in_every_round(tmp_path):
    seen = run_wsa(tmp_path, target="gaussian", **{"target-mean": 0.01, "target-std": 0.2})
    for message in seen:
        assert message.alignment.target.names == LAYERS
        assert message.alignment.target.means.tolist() == [0.01] * 3
        assert message.alignment.target.variances.tolist() == pytest.approx([0.04] * 3)


@pytest.mark.parametrize(("init", "factor"), [("default", 1 / 3), ("kaiming-normal", 2)])
def test_init_scheme_target_is_the_initialisers(init, factor, tmp_path):
    seen: list[Seen] = []
    config = tiny(strategies=("fedavg-wsa",), init=init, wsa={"target": "init-scheme"})
    run(config, tmp_path, spying(seen))
    inputs = [initial_model()[name].shape[1] for name in LAYERS]
    for message in seen:
        if message.kind == "train":
            assert message.alignment.target.means.tolist() == [0] * 3
            assert message.alignment.target.variances.tolist() == pytest.approx([factor / n for n in inputs])


def test_fixed_target_must_name_layers_of_the_model():
    target = WeightScope(("elsewhere",), torch.zeros(1).double(), torch.ones(1).double())
    strategy = WeightScopeAlignment(FedAvg(1, seed=0), target=target)
    with pytest.raises(ValueError, match=r"must name layers of the model, got \['elsewhere'\]"):
        list(strategy.configure_train(1, record({"w": np.ones((2, 2))}), ConfigRecord(), grid_of(canned(), 1)))


def test_init_scheme_of_an_unknown_layer_is_said_before_the_run():
    config = tiny(strategies=("fedavg-wsa",), model="test_wsa_variants:bilinear", wsa={"target": "init-scheme"})
    with pytest.raises(ConfigError, match=r"no initialiser is known for odd\.weight"):
        check(config)


class Bilinear(torch.nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.odd = torch.nn.Bilinear(64, 64, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)
        return self.odd(flat, flat)  # type: ignore[no-any-return]


def bilinear(input_shape: tuple[int, int, int], num_classes: int) -> torch.nn.Module:
    return Bilinear(num_classes)


# ---- momentum on the target


def test_target_momentum_by_hand():
    """From N(0, 1) and N(2, 5) at m = 3/4: N(1/2, 2); what is recorded is the fusion itself."""
    old, new = (
        WeightScope(("w",), torch.tensor([m]).double(), torch.tensor([v]).double()) for m, v in ((0, 1), (2, 5))
    )
    assert moving_average(old, new, 0.75) == WeightScope(("w",), *(torch.tensor([v]).double() for v in (0.5, 2.0)))
    assert moving_average(old, new, 0.0) is new
    w = np.float32([[-1, 1]])
    clients = canned(({"w": w}, {"num-examples": 1, "scope-means": [2.0], "scope-variances": [5.0]}))
    strategy = WeightScopeAlignment(FedAvg(1, seed=0), target_momentum=0.75)
    _, metrics = one_round(strategy, grid_of(clients, 1), record({"w": w}))
    assert (strategy.target.means.item(), strategy.target.variances.item()) == (0.5, 2.0)
    assert (metrics["scope-means"], metrics["scope-variances"]) == ([2.0], [5.0])
    one_round(strategy, grid_of(clients, 1), record({"w": w}), 2)
    assert strategy.target.variances.item() == 0.75 * 2 + 0.25 * 5


def test_a_layer_that_is_not_finite_in_the_old_target_is_taken_from_the_new():
    old, new = (
        WeightScope(("a", "b"), torch.tensor(m).double(), torch.ones(2).double()) for m in ([np.nan, 0.0], [1.0, 1.0])
    )
    assert moving_average(old, new, 0.5).means.tolist() == [1.0, 0.5]
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got nan"):
        moving_average(old, new, float("nan"))


@pytest.mark.parametrize("granularity", ["layer", "channel", "model"])
def test_target_goes_through_a_checkpoint(granularity, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(3, 2)) for name in ("stem.weight", "a/b.weight")}
    make = lambda: WeightScopeAlignment(FedAvg(1, seed=0), granularity=granularity, target_momentum=0.5)  # noqa: E731
    one, other = make(), make()
    list(one.configure_train(1, record(arrays), ConfigRecord(), grid_of(canned(), 1)))
    folder = StrategyFolder(tmp_path)
    folder.record({})
    folder.save_checkpoint(1, {}, one.state())
    other.load_state(folder.resume().strategy_state)
    assert other.target == one.target
    assert len(other.target.names) == {"layer": 2, "channel": 6, "model": 1}[granularity]


# ---- the warning


def told(caplog) -> int:
    return sum("does not settle" in record.getMessage() for record in caplog.records)


def outgoing(strategy, server_round=1) -> None:
    list(
        strategy.configure_train(
            server_round, record({"w": np.float32([[-1, 1]])}), ConfigRecord(), grid_of(canned(), 1)
        )
    )


def test_beyond_the_bound_is_told_before_the_run_and_whenever_the_target_crosses_it(caplog):
    """nσ_t² = 2 at the start: the bound is λ = 2/η."""
    descent = Descent(0.1)
    outgoing(WeightScopeAlignment(FedAvg(1, seed=0), strength=19.9, descent=descent))
    assert told(caplog) == 0
    strategy = WeightScopeAlignment(FedAvg(1, seed=0), strength=20.1, descent=descent)
    outgoing(strategy)
    assert told(caplog) == 1
    for target_variance, expected in ((0.9, 1), (1.1, 1), (0.9, 2)):  # it stays beyond, comes back, crosses anew
        strategy.target = WeightScope(("w",), torch.zeros(1).double(), torch.tensor([target_variance]).double())
        outgoing(strategy, 2)
        assert told(caplog) == expected


@pytest.mark.parametrize(
    "options", [{"mode": "proximal"}, {"schedule": "relative", "share": 0.1}, {"strength": 0.0}, {"descent": None}]
)
def test_nothing_is_told_where_there_is_no_bound(options, caplog):
    outgoing(WeightScopeAlignment(FedAvg(1, seed=0), **{"strength": 1e6, "descent": Descent(0.1), **options}))
    assert told(caplog) == 0


def test_the_common_pair_has_a_short_name():
    """Its two rounds are those of the pair, to the bit."""
    options = {"strength": 3.0, "mode": "proximal"}

    def trained(strategy):
        start = {name: tensor.clone() for name, tensor in initial_model().items()}
        grid = grid_of(client_app, 6, tiny().to_run_config())
        for server_round in (1, 2):
            arrays, _ = one_round(strategy, grid, pack(start), server_round)
            start = unpack(arrays)
        return start

    short = trained(FedAvgWSA(3, seed=4, evaluation_cohort=2, timeout=9.0, **options))
    long = trained(WeightScopeAlignment(FedAvg(3, seed=4), **options))
    assert all(torch.equal(short[name], tensor) for name, tensor in long.items())
    assert not all(torch.equal(short[name], tensor) for name, tensor in trained(FedAvg(3, seed=4)).items())
    assert FedAvgWSA(3, seed=4, timeout=9.0).strategy.timeout == 9.0


def test_the_configs_step_is_what_is_checked(caplog):
    config = tiny(learning_rate=0.05, momentum=0.9, wsa={"strength": 1e6})
    strategy = build("fedavg-wsa", config, holdout())
    assert isinstance(strategy, WeightScopeAlignment)
    assert strategy.descent == Descent(0.05, 0.9)
    list(
        strategy.configure_train(
            1, record({k: v.numpy() for k, v in initial_model().items()}), ConfigRecord(), grid_of(canned(), 6)
        )
    )
    assert told(caplog) == 1


# ---- λ = 0


@pytest.mark.parametrize(
    "wsa",
    [
        {"divergence": "wasserstein"},
        {"granularity": "channel"},
        {"granularity": "model", "mode": "proximal"},
        {"target": "init-scheme"},
        {"target": "gaussian", "target-std": 0.1},
        {"target-momentum": 0.9},
        {"schedule": "relative", "share": 0.5},
    ],
    ids=str,
)
def test_strength_zero_is_plain_fedavg_bit_for_bit_and_one_is_not(wsa, tmp_path):
    run(tiny(strategies=("fedavg",)), tmp_path)
    for strength in (0.0, 1.0):
        run(tiny(strategies=("fedavg-wsa",), wsa={**wsa, "strength": strength}), tmp_path / str(strength))
    files = [tmp_path / "fedavg", tmp_path / "0.0" / "fedavg-wsa", tmp_path / "1.0" / "fedavg-wsa"]
    plain, off, on = (load_file(folder / "final.safetensors") for folder in files)
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    assert any(not torch.equal(plain[name], on[name]) for name in plain)


def test_clients_of_a_round_have_one_regularizer_and_others_their_own(monkeypatch):
    """One of a model of before, of another target or of a λ that moves would pull wrongly, without a word."""
    monkeypatch.setattr(training, "_LAST", [])
    model = models.build("mlp", (1, 8, 8), 10, seed=0)
    alignment, same, other = (alignment_towards(factor, model.state_dict()) for factor in (1.5, 1.5, 2.0))
    first = training._regularizer(model, alignment)
    assert training._regularizer(model, same) is first
    assert training._regularizer(model, None) is None
    assert training._regularizer(model, same) is first
    second = training._regularizer(model, other)
    assert second is not first
    another = models.build("mlp", (1, 8, 8), 10, seed=0)
    third = training._regularizer(another, other)
    assert third is not second
    another.layers[0].weight = torch.nn.Parameter(another.layers[0].weight.detach().clone())
    assert training._regularizer(another, other) is not third
    moving = alignment_towards(2.0, model.state_dict(), share=0.5)
    assert training._regularizer(another, moving) is not training._regularizer(another, moving)


@pytest.mark.parametrize("mode", ["loss", "proximal"])
@pytest.mark.parametrize("granularity", ["layer", "channel", "model"])
def test_a_regularizer_used_before_gives_the_bits_of_a_new_one(mode, granularity, monkeypatch):
    trained = []
    for kept in (True, False):
        monkeypatch.setattr(training, "_LAST", [])
        model = models.build("mlp", (1, 8, 8), 10, seed=0)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        layers = {name: tensor for name, tensor in model.named_parameters() if tensor.ndim > 1}
        target = measure({name: 1.5 * tensor for name, tensor in layers.items()}, granularity=granularity)
        alignment = messages.Alignment(target, 3.0, mode, "sum", granularity=granularity, layers=tuple(layers))
        images = torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(30) % 10
        for client in range(2):
            fill(model, pack({name: tensor.clone() for name, tensor in start.items()}))
            train(model, images, labels, tiny(learning_rate=0.1), torch_generator(0, "client", 1, client), alignment)
            if not kept:
                training._LAST.clear()
        trained.append([weights.detach().clone() for weights in model.parameters()])
    for one, other in zip(*trained, strict=True):
        assert torch.equal(one, other)
