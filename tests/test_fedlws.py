"""FedLWS's factors by hand, and against a spelling that has all updates at once."""

from itertools import chain

import numpy as np
import pytest
import torch
from federations import NormNet, canned, grid_of, holdout, numbers, one_round, record, run, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedwsa import models
from fedwsa.config import ConfigError, parse
from strategies import FedAvg
from strategies.fedlws import FedLWS, layers

FREE = {"min_tau": 0.0, "max_tau": np.inf}


def shrunk(start, replies, examples, **options):
    """The model after one round of these replies."""
    given = [(model, {"num-examples": size}) for model, size in zip(replies, examples, strict=True)]
    strategy = FedLWS(len(replies), seed=0, **options)
    arrays, metrics = one_round(strategy, grid_of(canned(*given), len(replies)), record(start))
    assert dict(metrics) == {}
    return numbers(arrays)


def test_two_clients_by_hand():
    """x = (3, 4), updates (1, 0) and (−1, 2), p = ¼, ¾.

    ŵ = x + (−½, 1½), ‖ŵ − x‖ = √2.5; the updates lie √2 from their plain mean (0, 1); τ = 0.1 √2, and
    γ = 5/(5 + 0.1 √5) since √2 √2.5 = √5.
    """
    found = shrunk(
        {"w": np.array([3.0, 4.0])},
        [{"w": np.array([4.0, 4.0])}, {"w": np.array([2.0, 6.0])}],
        (1, 3),
        beta=0.1,
        **FREE,
    )
    np.testing.assert_allclose(found["w"], 5 / (5 + 0.1 * 5**0.5) * np.array([2.5, 5.5]), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "tau"),
    [
        ({"beta": 0.1, "min_tau": 0.5, "max_tau": 0.9}, 0.5),
        ({"beta": 0.1, "min_tau": 0.0, "max_tau": 0.02}, 0.02),
        ({}, 0.03 * 2**0.5),  # the defaults
        ({"beta": 3.0}, 0.2),
        ({"beta": 0.0}, 0.01),
    ],
)
def test_tau_has_limits(options, tau):
    found = shrunk(
        {"w": np.array([3.0, 4.0])}, [{"w": np.array([4.0, 4.0])}, {"w": np.array([2.0, 6.0])}], (1, 3), **options
    )
    np.testing.assert_allclose(found["w"], 5 / (5 + tau * 2.5**0.5) * np.array([2.5, 5.5]), rtol=1e-12)


ARRAYS = {"a.weight": (3, 2), "a.bias": (3,), "norm.weight": (4,), "norm.bias": (4,), "norm.mean": (4,), "b": (2, 2)}
LAYERS = [["a.weight", "a.bias"], ["norm.weight", "norm.bias"], ["b"]]


@given(seed=st.integers(0, 10**6), clients=st.integers(1, 9), beta=st.floats(0, 3))
@settings(max_examples=40)
def test_against_all_updates_at_once(seed, clients, beta):
    """The layers as vectors, by PyTorch; for one or two clients as the authors take the spread, too."""
    rng = np.random.default_rng(seed)
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in ARRAYS.items()}
    replies = [
        {name: x + rng.normal(size=x.shape).astype(np.float32) for name, x in start.items()} for _ in range(clients)
    ]
    examples = rng.integers(1, 100, size=clients).tolist()
    found = shrunk(start, replies, examples, beta=beta, parameters=ARRAYS.keys() - {"norm.mean"}, **FREE)
    shares = torch.tensor(examples, dtype=torch.float64) / sum(examples)

    def flat(model, layer):
        return torch.cat([torch.from_numpy(model[name]).double().flatten() for name in layer])

    for layer in LAYERS:
        x, ends = flat(start, layer), torch.stack([flat(reply, layer) for reply in replies])
        mean, updates = shares @ ends, ends - x
        apart = torch.linalg.vector_norm(updates - updates.mean(0), dim=1)
        spread = apart.square().mean().sqrt()
        if clients < 3:
            torch.testing.assert_close(spread, apart.mean())
        gamma = x.norm() / (x.norm() + beta * spread * (mean - x).norm())
        assert gamma <= 1
        np.testing.assert_allclose(flat(found, layer), gamma * mean, rtol=1e-5, atol=1e-6)
    unshrunk = (shares.numpy()[:, None] * [reply["norm.mean"] for reply in replies]).sum(0)
    np.testing.assert_allclose(found["norm.mean"], unshrunk, rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_zero_is_left_to_the_mean():
    start = {"zero.bias": np.zeros(2), "still.bias": np.ones(2)}
    replies = [{"zero.bias": np.array([1.0, 2.0]), "still.bias": np.ones(2)}] * 2
    found = shrunk(start, replies, (1, 1))
    assert {name: values.tolist() for name, values in found.items()} == {"zero.bias": [1, 2], "still.bias": [1, 1]}


# ---- layers


def test_layers_end_with_a_bias():
    names = [name for name, _ in models.build("mlp", (1, 8, 8), 10, 0).named_parameters()]
    assert layers(names) == [[f"layers.{i}.weight", f"layers.{i}.bias"] for i in range(3)]
    assert layers(["head.weight"]) == [["head.weight"]]
    assert layers([]) == []


def test_a_convolution_without_a_bias_goes_with_its_normalisation():
    names = [name for name, _ in models.build("resnet8", (1, 8, 8), 10, 0).named_parameters()]
    cut = layers(names)
    assert cut[0] == ["conv.weight", "norm.weight", "norm.bias"]
    assert cut[-1] == ["fc.weight", "fc.bias"]
    assert len(cut) == 8  # of a residual network with eight layers
    assert [*chain(*cut)] == names


# ---- in a run


def test_largest_tau_zero_is_fedavg_bit_for_bit(tmp_path):
    nothing = {"min-tau": 0.0, "max-tau": 0.0}
    run(tiny(strategies=("fedavg", "fedlws"), model="federations:NormNet", fedlws=nothing), tmp_path)
    plain, ours = ((tmp_path / name / "final.safetensors").read_bytes() for name in ("fedavg", "fedlws"))
    assert plain == ours


def test_a_run_shrinks_all_parameters_and_no_statistics(tmp_path):
    config = tiny(strategies=("fedavg", "fedlws"), model="federations:NormNet", rounds=1, seed=3)
    run(config, tmp_path)
    plain, ours = (load_file(tmp_path / name / "final.safetensors") for name in ("fedavg", "fedlws"))
    parameters = dict(NormNet((1, 8, 8), 10).named_parameters())
    for name, mean in plain.items():
        if name in parameters:
            ratios = (ours[name] / mean)[mean.abs() > 1e-3]
            assert ratios.max() < 1 - 1e-5
            torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios).clone(), rtol=1e-4, atol=0)
        else:
            assert torch.equal(ours[name], mean)


def test_what_stays_with_the_clients_stays_as_it_is(tmp_path):
    run(tiny(strategies=("fedlws",), model="federations:NormNet", batch_norm="local"), tmp_path)
    final = load_file(tmp_path / "fedlws" / "final.safetensors")
    assert torch.equal(final["2.weight"], torch.ones(16))


def test_the_config_reaches_the_strategy():
    options = {"beta": 0.5, "min-tau": 0.1, "max-tau": 0.3}
    strategy = FedLWS.from_config(tiny(fedlws=options), holdout(0, NormNet((1, 8, 8), 10)))
    assert (strategy.beta, strategy.min_tau, strategy.max_tau) == (0.5, 0.1, 0.3)
    assert strategy.parameters == {f"{i}.{kind}" for i in (1, 2, 4) for kind in ("weight", "bias")}
    assert strategy.weigh is FedAvg.weigh
    with pytest.raises(ConfigError, match=r"fedlws\.min-tau = 0\.3: allowed is at most max-tau = 0\.2"):
        parse({"fedlws": {"min-tau": 0.3}})


def test_a_weight_under_two_names_stays_one(tmp_path):
    """Each name would else be shrunk with a layer of its own, and whichever is loaded last would count."""
    config = tiny(strategies=("fedavg", "fedlws"), model="federations:TiedNet", rounds=1)
    run(config, tmp_path)
    plain, ours = (load_file(tmp_path / name / "final.safetensors") for name in ("fedavg", "fedlws"))
    assert torch.equal(ours["again.weight"], ours["body.weight"])
    assert not torch.equal(ours["body.weight"], plain["body.weight"])
