"""Which layers are aligned: `wsa.layers`, and what the unit "model" is made of."""

import numpy as np
import pytest
import torch
from federations import DIGITS, Seen, initial_model, run, spying, tiny
from safetensors.torch import load_file
from test_wsa_variants import LAYERS, fused_by_hand, run_wsa
from torch import nn

from experiments.run import check
from fedwsa import models
from fedwsa.config import ConfigError, from_run_config, parse
from fedwsa.granularity import matching
from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.scope import measure
from fedwsa.seeding import torch_seed

FIRST = ("layers.0.weight",)


def frozen_net(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """A first layer that does not train and is much wider than the other."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, num_classes))
    net[1].requires_grad_(False).weight.mul_(10)
    return net


# ---- patterns


def test_patterns_by_hand():
    layers = ["conv.weight", "fc1.weight", "fc2.weight"]
    assert matching(layers, ["*"]) == layers
    assert matching(layers, ["fc2.weight", "conv*"]) == ["conv.weight", "fc2.weight"]
    assert matching([], ["*"]) == []
    with pytest.raises(ValueError, match=r"^layers = 'FC\*': matches none .* conv.weight, fc1.weight, fc2.weight"):
        matching(layers, ["fc1.weight", "FC*"])


@pytest.mark.parametrize("layers", ["layers.0*", "layers.0.weight,layers.2.weight", ["layers.0*", "layers.2*"]])
def test_patterns_go_through_every_way_to_write_a_config(layers):
    config = parse({"wsa": {"layers": layers}})
    assert parse({"wsa": {"layers": list(config.wsa.layers)}}) == from_run_config(config.to_run_config()) == config


@pytest.mark.parametrize("target", ["fused", "gaussian"])
def test_a_pattern_that_matches_nothing_is_said_before_the_run(target):
    wsa = {"layers": "head*", "target": target, **({"target-std": 0.1} if target == "gaussian" else {})}
    with pytest.raises(ConfigError, match=r"^wsa\.layers = 'head\*': matches none .* layers.0.weight"):
        check(tiny(strategies=("fedavg-wsa",), wsa=wsa))
    check(tiny(strategies=("fedavg",), wsa=wsa))  # nothing is aligned


# ---- in a federation


@pytest.mark.parametrize("granularity", ["layer", "channel", "model"])
@pytest.mark.parametrize("variance", ["mean", "merged"])
def test_the_target_is_fused_of_the_chosen_layers(granularity, variance, tmp_path):
    momentum = {"target-momentum": 0.5} if granularity == "layer" and variance == "mean" else {}
    seen = run_wsa(tmp_path, rounds=2, layers="layers.0*", granularity=granularity, variance=variance, **momentum)
    replies = [message for message in seen if message.server_round == 1]
    names, means, variances = fused_by_hand(replies, granularity, FIRST)
    targets = {message.server_round: message.alignment.target for message in seen}
    assert list(targets[1].names) == list(targets[2].names) == names
    if momentum:
        means, variances = (means + targets[1].means.numpy()) / 2, (variances + targets[1].variances.numpy()) / 2
    np.testing.assert_allclose(targets[2].means, means, rtol=1e-6, atol=1e-8)
    if variance == "mean":
        np.testing.assert_allclose(targets[2].variances, variances, rtol=1e-9)
    else:
        assert (targets[2].variances.numpy() <= variances * (1 + 1e-6)).all()


@pytest.mark.parametrize("target", ["initial", "fused", "gaussian", "init-scheme"])
@pytest.mark.parametrize("granularity", ["layer", "channel", "model"])
def test_the_chosen_layers_land_on_their_target_and_the_others_are_free(granularity, target, tmp_path):
    std = {"target-std": 0.05} if target == "gaussian" else {}
    strong = {"mode": "proximal", "strength": 1e9, "target": target, "granularity": granularity, **std}
    seen = run_wsa(tmp_path / "first", rounds=1, layers="layers.0*", **strong)
    goal = seen[0].alignment.target
    assert {name.partition("[")[0] for name in goal.names} == ({"model"} if granularity == "model" else set(FIRST))
    for message in seen:
        state = {name: torch.from_numpy(message.model[name]) for name in LAYERS}
        scope = measure({name: state[name] for name in FIRST}, granularity=granularity)
        torch.testing.assert_close(scope.means, goal.means, rtol=0, atol=1e-6)
        torch.testing.assert_close(scope.variances, goal.variances, rtol=1e-4, atol=1e-9)
        rest, start = measure({n: state[n] for n in LAYERS[1:]}), initial_model(torch_seed(0, "model"))
        assert not torch.allclose(rest.variances, measure({n: start[n] for n in LAYERS[1:]}).variances, rtol=1e-4)


def test_all_layers_is_the_default(tmp_path):
    plain = [message.model for message in run_wsa(tmp_path / "a", rounds=1, strength=0.5)]
    named = run_wsa(tmp_path / "b", rounds=1, strength=0.5, layers=list(LAYERS))
    for one, message in zip(plain, named, strict=True):
        assert all(np.array_equal(one[name], message.model[name]) for name in one)


# ---- the unit "model"


@pytest.mark.parametrize("model", ["federations:TiedNet", "test_wsa_layers:frozen_net"])
@pytest.mark.parametrize("variance", ["mean", "merged"])
@pytest.mark.parametrize("target", ["initial", "fused"])
def test_the_target_of_a_model_is_of_its_parameters_that_train(model, variance, target, tmp_path):
    """Not of a buffer, a weight's second name or a frozen layer; where nothing trains, the target does not move."""
    seen: list[Seen] = []
    wsa = {"granularity": "model", "mode": "proximal", "strength": 1e9, "target": target, "variance": variance}
    config = tiny(strategies=("fedavg-wsa",), model=model, rounds=2, learning_rate=1e-6, wsa=wsa)
    run(config, tmp_path, spying(seen))
    start = models.build(model, *DIGITS, seed=torch_seed(0, "model"))
    weights = torch.cat([p.double().flatten() for p in start.parameters() if p.requires_grad and p.ndim >= 2])
    variances = [message.alignment.target.variances.item() for message in seen if message.kind == "train"]
    assert variances == pytest.approx([weights.var(correction=0).item()] * 6, rel=1e-4)
    final = load_file(tmp_path / "fedavg-wsa" / "final.safetensors")
    for name, tensor in start.state_dict().items():
        torch.testing.assert_close(final[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_penalty_and_gradient_of_a_model_are_of_what_trains(frozen):
    net = models.build("test_wsa_layers:frozen_net", *DIGITS, seed=0)
    net[1].requires_grad_(not frozen)
    train = {name: p for name, p in net.named_parameters() if p.requires_grad and p.ndim >= 2}
    own = measure(train, granularity="model")
    regularizer = WeightScopeRegularizer(net.named_parameters(), own, strength=1e6, granularity="model")
    assert regularizer.penalty() == pytest.approx(0, abs=1e-12)
    regularizer.add_gradient()
    weights = torch.cat([p.detach().double().flatten() for p in train.values()])
    of_a_variance_twice_the_targets = 1e6 * weights.abs().max() / (2 * own.variances * len(weights))
    assert max(p.grad.abs().max().item() for p in train.values()) < 1e-5 * of_a_variance_twice_the_targets
