"""What a user names by import path: where it cannot be used, a line says so before anything is written."""

import re

import numpy as np
import pytest
import torch
from federations import DIGITS, tiny
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg
from torch import nn

from clients.federation import federation
from experiments.run import check
from fedwsa import models
from fedwsa.config import ConfigError
from strategies import FedAvg

# ---- partitioners


def of_gamma(labels, num_clients, gamma, *, rng): ...


def nothing(labels, num_clients, *, rng):
    return None


def numbers(labels, num_clients, *, rng):
    return [1] * num_clients


def floats(labels, num_clients, *, rng):
    return [np.arange(k, len(labels), num_clients) + 0.5 for k in range(num_clients)]


def mask(labels, num_clients, *, rng):
    return [np.arange(len(labels)) % num_clients == k for k in range(num_clients)]


def beyond(labels, num_clients, *, rng):
    return np.array_split(np.arange(len(labels)) + 1, num_clients)


def before(labels, num_clients, *, rng):
    return np.array_split(np.arange(len(labels)) - 1, num_clients)


def twice(labels, num_clients, *, rng):
    return [np.arange(3)] * num_clients


def refuses(labels, num_clients, min_size, *, rng):
    raise ValueError(f"min_size={min_size} is odd")


def plain_lists(labels, num_clients, *, rng):
    return (np.arange(k, len(labels), num_clients).tolist() for k in range(num_clients))


def numpy_numbers(labels, num_clients, *, rng):
    return [list(np.arange(k, len(labels), num_clients, dtype=np.uint16)) for k in range(num_clients)]


# ---- optimisers


def without_step(parameters, lr):
    return {}


def without_rate(parameters):
    return torch.optim.SGD(parameters)


class Wandering(torch.optim.SGD):
    """It draws random numbers."""

    def step(self):
        torch.rand(1)
        super().step()


# ---- strategies


class Bare:
    pass


class Own(FedAvg):
    pass


class Stateless(FlowersFedAvg):
    @classmethod
    def from_config(cls, config, holdout):
        return cls()


def no_strategy(config, holdout):
    return Bare()


# ---- models


class Flat(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, images):
        assert not self.training
        torch.rand(1)
        return self.layer(images.flatten(1))


def of_seven(input_shape, num_classes):
    return Flat(64, 7)


def of_ten(input_shape, num_classes):
    return Flat(64, 10)


def of_more_pixels(input_shape, num_classes):
    return Flat(65, num_classes)


class Pair(Flat):
    def forward(self, images):
        return super().forward(images), images


def of_two(input_shape, num_classes):
    return Pair(64, num_classes)


# ---- the checks

CONFIG_KEYS = "alpha, min_size, balanced, shards_per_client, classes_per_client, beta, size_sigma and groups"

UNUSABLE = {
    "partitioner": {
        "os:path": f" (labels, num_clients, *, rng) and those that it names of {CONFIG_KEYS}: it is a module",
        "builtins:max": ": no signature found for builtin",
        ":of_gamma": f"{CONFIG_KEYS}: missing a required argument: 'gamma'",
        ":nothing": ": must be a list of index arrays, one a client, got NoneType",
        ":numbers": ": a client's part must be a list or an array of indices, got int",
        ":floats": ": 0.5 is no training sample; allowed are integers, 0 to 1407",
        ":mask": ": True is no training sample",
        ":beyond": ": 1408 is no training sample; allowed are integers, 0 to 1407",
        ":before": ": -1 is no training sample",
        ":twice": ": sample 0 is held 6 times; allowed is once",
        ":refuses": ": min-size=2 is odd",
    },
    "optimizer": {
        "os:path": "does not take (parameters, lr=…), and momentum and weight_decay where it names them: it is a",
        ":without_rate": ": got an unexpected keyword argument 'lr'",
        ":without_step": " makes no step: 'dict' object has no attribute 'step'; allowed is one whose step() takes ",
        "torch.optim:Muon": " makes no step: Muon only supports 2D parameters",
        "torch.optim:LBFGS": " makes no step: LBFGS.step() missing 1 required positional argument: 'closure'; ",
    },
    "strategies": {
        "os:path": " does not take (config, holdout), by from_config if it is a class: it is a module",
        ":Bare": " (config, holdout), by from_config if it is a class: too many positional arguments",
        ":no_strategy": " must be a flwr.serverapp.strategy.Strategy, got Bare",
        ":Stateless": " has no state and no load_state; checkpoints need both",
        ":Stateless-wsa": " has no state and no load_state",
    },
    "model": {
        ":of_seven": " makes (1, 7) of 1 images; allowed is a tensor [images, classes], (1, 10)",
        ":of_more_pixels": " does not take images (1, 8, 8): mat1 and mat2 shapes cannot be multiplied",
        ":of_two": " makes tuple of 1 images; allowed is a tensor [images, classes], (1, 10)",
    },
    "augmentation": {"os:path": " does not take (images, generator): it is a module, not a callable"},
    "feature_shift": {"os:path": " does not take (pixels, amount, rng): it is a module, not a callable"},
}
CASES = [(key, name, line) for key, lines in UNUSABLE.items() for name, line in lines.items()]


def checked(key, name):
    value = f"{__name__}{name}" if name.startswith(":") else name
    check(tiny(**{"strategies": ("fedavg",), key: (value,) if key == "strategies" else value}))


@pytest.mark.parametrize(("key", "name", "line"), CASES)
def test_what_cannot_be_used_is_said_in_a_line(key, name, line):
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match=re.escape(line)) as error:
        checked(key, name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("partitioner", ":plain_lists"),
        ("partitioner", ":numpy_numbers"),
        ("optimizer", "torch.optim:Adam"),
        ("optimizer", ":Wandering"),
        ("strategies", ":Own"),
        ("strategies", ":Own-wsa"),
        ("model", ":of_ten"),
    ],
)
def test_what_can_be_used_is_and_no_random_number_is_drawn(key, name):
    before = torch.get_rng_state()
    checked(key, name)
    assert torch.equal(torch.get_rng_state(), before)


def test_parts_are_those_that_the_partitioner_gave():
    given = [federation(tiny(partitioner=f"{__name__}:{name}")) for name in ("plain_lists", "numpy_numbers")]
    pool = np.setdiff1d(np.arange(len(given[0].dataset.train_labels)), given[0].server)
    for holdings in given:
        for client, part in enumerate(holdings.parts):
            np.testing.assert_array_equal(part, pool[client::6])


@pytest.mark.parametrize("training", [True, False])
def test_a_look_at_a_model_leaves_it_as_it_was(training):
    model = of_ten(*DIGITS).train(training)
    models.check_takes(model, "own", torch.zeros(3, 1, 8, 8), 10)
    assert model.training == training
    with pytest.raises(ValueError, match=r"model 'own' makes \(3, 10\) of 3 images; .* \(3, 9\)"):
        models.check_takes(model, "own", torch.zeros(3, 1, 8, 8), 9)
    assert model.training == training
