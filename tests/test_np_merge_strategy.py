"""NP-Merge as a strategy: what it merges, and what it learns the coefficients on."""

import itertools
import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federations import (
    DIGITS,
    DropoutNet,
    TiedNet,
    canned,
    digest,
    grid_of,
    holdout,
    initial_model,
    numbers,
    one_round,
    record,
    run,
    spying,
    tiny,
)
from torch import Tensor

import strategies
from clients.federation import federation
from fedwsa import models
from fedwsa.arrays import pack
from fedwsa.config import Config
from fedwsa.merging import align, chain_permutations
from fedwsa.sections import NPMergeConfig
from strategies import FedAvg, Holdout, NPMerge

WEIGHTS = (3, 10, 7, 1)


def options(**changes) -> NPMergeConfig:
    return NPMergeConfig(**{"steps": 3, "learning_rate": 0.1, "batch_size": 8, "align": False, **changes})


def trained_apart(count: int = 4, factory: str = "mlp") -> list[dict[str, np.ndarray]]:
    """Models of different seeds."""
    return [
        {name: tensor.numpy() for name, tensor in models.build(factory, *DIGITS, seed).state_dict().items()}
        for seed in range(1, count + 1)
    ]


def merge(strategy: FedAvg, clients: list[dict[str, np.ndarray]], server_round: int = 1) -> dict[str, np.ndarray]:
    replies = [(model, {"num-examples": weight, "loss": 1.0}) for model, weight in zip(clients, WEIGHTS, strict=False)]
    arrays, _ = one_round(strategy, grid_of(canned(*replies), len(clients)), record(clients[0]), server_round)
    return numbers(arrays)


# ---- without learning


@pytest.mark.parametrize("factory", ["mlp", "federations:NormNet"])
def test_zero_steps_without_alignment_is_fedavg(factory):
    clients = trained_apart(factory=factory)
    model = models.build(factory, *DIGITS, 0)
    merged = merge(NPMerge(4, holdout(8, model), options(steps=0), seed=0), clients)
    expected = merge(FedAvg(4, seed=0), clients)
    assert list(merged) == list(expected)
    for name, values in expected.items():
        assert merged[name].dtype == values.dtype
        np.testing.assert_allclose(merged[name], values, rtol=1e-6, atol=1e-6)


def test_zero_steps_is_fedavg_of_models_aligned_one_after_another():
    clients = trained_apart()
    states = [{name: torch.from_numpy(values) for name, values in model.items()} for model in clients]
    running, total = states[0], WEIGHTS[0]
    for state, weight in zip(states[1:], WEIGHTS[1:], strict=True):
        aligned, share = align(state, running), total / (total + weight)
        running = {name: share * running[name] + (1 - share) * aligned[name] for name in running}
        total += weight
    merged = merge(NPMerge(4, holdout(8), options(steps=0, align=True), seed=0), clients)
    for name, values in running.items():
        np.testing.assert_allclose(merged[name], values, rtol=1e-5, atol=1e-6)
    assert not np.allclose(merged["layers.0.weight"], merge(FedAvg(4, seed=0), clients)["layers.0.weight"], atol=1e-3)


def test_metrics_are_those_of_fedavg():
    replies = [
        (model, {"num-examples": n, "loss": n / 2, "scope-means": [0.1 * n] * 3, "scope-variances": [1.0 + n] * 3})
        for model, n in zip(trained_apart(), WEIGHTS, strict=True)
    ]
    recorded = [
        dict(one_round(strategy, grid_of(canned(*replies), 4), record(replies[0][0]))[1])
        for strategy in (FedAvg(4, seed=0), NPMerge(4, holdout(8), options(), seed=0))
    ]
    assert recorded[0] == recorded[1]
    assert recorded[0]["scope-distance"] > [0.0] * 3


# ---- the held-out samples


def test_held_out_samples_are_needed():
    with pytest.raises(ValueError, match="server-samples must be at least 1"):
        NPMerge(4, holdout(0), options(), seed=0)


GIVEN: list[Holdout] = []


def keep_holdout(config: Config, holdout: Holdout) -> FedAvg:
    GIVEN.append(holdout)
    return FedAvg.from_config(config, holdout)


@pytest.mark.parametrize("seed", [0, 3])
def test_held_out_samples_are_no_clients(seed, tmp_path):
    GIVEN.clear()
    config = tiny(strategies=("test_np_merge_strategy:keep_holdout",), rounds=1, seed=seed)
    run(config, tmp_path)
    holdings = federation(config)
    images, labels = holdings.dataset.train_tensors(holdings.server)
    assert len(labels) == 30
    assert torch.equal(GIVEN[0].images, images)
    assert torch.equal(GIVEN[0].labels, labels)
    for part in itertools.chain(holdings.training, holdings.validation):
        assert not set(part) & set(holdings.server)


def test_learning_lowers_the_loss_on_the_held_out_samples():
    """Models of clients that hold few classes each, trained from one start."""
    config = tiny(alpha=0.1, local_epochs=5, cohort=6, server_samples=100)
    holdings = federation(config)
    module = models.build("mlp", *DIGITS, 0)
    held = Holdout(module, *holdings.dataset.train_tensors(holdings.server))
    losses = {}
    for steps in (0, 5, 20):
        strategy = NPMerge(6, held, options(steps=steps, batch_size=100), seed=0)
        arrays, _ = one_round(strategy, grid_of(spying([]), 6, config.to_run_config()), pack(initial_model()))
        state = {name: torch.from_numpy(values) for name, values in numbers(arrays).items()}
        logits = torch.func.functional_call(module, state, held.images)
        losses[steps] = F.cross_entropy(logits, held.labels).item()
    assert losses[20] < losses[5] < losses[0]
    assert losses[20] < 0.7 * losses[0]


# ---- the batches


class Listening(models.MLP):
    """Writes down which of the server's samples it is given; an image's first pixel is its number."""

    def __init__(self) -> None:
        super().__init__(*DIGITS)
        self.batches: list[list[int]] = []
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(images[:, 0, 0, 0].int().tolist())
        self.modes.append(self.training)
        return super().forward(images / 100)


def batches(
    clients: list[Mapping[str, np.ndarray]], seed: int = 0, server_round: int = 1, batch_size: int = 8
) -> list[list[int]]:
    module = Listening()
    held = holdout(30, module)
    held.images[:, 0, 0, 0] = torch.arange(30)
    merge(NPMerge(len(clients), held, options(batch_size=batch_size), seed=seed), clients, server_round)
    assert all(module.modes)
    return module.batches


def test_batches_come_from_seed_and_round_alone():
    clients = trained_apart()
    expected = batches(clients)
    assert len(expected) == 3 * 3  # steps, pairs
    assert all(len(set(batch)) == 8 for batch in expected)
    assert len({tuple(batch) for batch in expected}) == 9
    torch.manual_seed(5)
    random.seed(5)
    assert batches(trained_apart(5)[1:]) == expected  # other models
    assert batches(clients[:3]) == expected[:6]  # a smaller cohort
    assert batches(clients, seed=1) != expected
    assert batches(clients, server_round=2) != expected


def test_a_batch_is_no_larger_than_what_is_held_out():
    for batch in batches(trained_apart(2), batch_size=100):
        assert sorted(batch) == list(range(30))


def test_dropout_neither_follows_nor_moves_the_global_random_state():
    clients = trained_apart(factory="federations:DropoutNet")
    merged = []
    for seed in (1, 2):
        strategy = NPMerge(4, holdout(8, DropoutNet(*DIGITS)), options(), seed=0)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        merged.append(digest(merge(strategy, clients)))
        assert torch.equal(torch.get_rng_state(), before)
    assert merged[0] == merged[1]


# ---- options


@pytest.mark.parametrize("change", [{"steps": 1}, {"learning_rate": 0.3}, {"batch_size": 4}, {"align": True}])
def test_every_option_changes_the_merge(change):
    clients = trained_apart(2)
    merged = [
        digest(merge(NPMerge(2, holdout(20), chosen, seed=0), clients)) for chosen in (options(), options(**change))
    ]
    assert merged[0] != merged[1]


def test_options_come_from_the_config():
    config = tiny(np_merge={"steps": 5, "learning-rate": 0.4, "batch-size": 6, "align": False})
    held = holdout(9)
    strategy = strategies.build("np-merge", config, held)
    assert strategy.options == NPMergeConfig(steps=5, learning_rate=0.4, batch_size=6, align=False)
    assert strategy.holdout is held


def test_coefficients_are_learned_for_parameters_and_buffers_are_averaged():
    clients = trained_apart(factory="federations:NormNet")
    for model, weight in zip(clients, WEIGHTS, strict=True):
        model["2.running_mean"] = np.full(16, weight, np.float32)
    merged = merge(NPMerge(4, holdout(8, models.build("federations:NormNet", *DIGITS, 0)), options(), seed=0), clients)
    average = merge(FedAvg(4, seed=0), clients)
    np.testing.assert_allclose(merged["2.running_mean"], average["2.running_mean"], rtol=1e-6)
    assert not np.allclose(merged["1.weight"], average["1.weight"], atol=1e-3)


# ---- a weight under two names


def test_a_tied_weight_is_merged_once(tmp_path):
    """As the network is that has it under one name: a loss of the second name too would not be of the model."""
    held = holdout(8, TiedNet(*DIGITS))
    clients = trained_apart(3, "federations:TiedNet")
    merged = merge(NPMerge(3, held, options(), seed=0), clients)
    assert list(merged) == list(held.model.state_dict())
    assert np.array_equal(merged["again.weight"], merged["body.weight"])
    averaged = merge(NPMerge(3, held, options(steps=0), seed=0), clients)
    assert not np.array_equal(merged["body.weight"], averaged["body.weight"])
    run(tiny(strategies=("np-merge",), model="federations:TiedNet", np_merge={"align": False}), tmp_path)


def test_tied_weights_are_not_aligned():
    with pytest.raises(ValueError, match=r"np-merge\.align = true: again\.weight has another name too"):
        NPMerge(4, holdout(8, TiedNet(*DIGITS)), options(align=True), seed=0)
    chain = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    chain[2].weight = chain[1].weight
    with pytest.raises(ValueError, match=r"no plain chain of layers: 2\.weight and 1\.weight are one weight"):
        chain_permutations(chain.state_dict())
