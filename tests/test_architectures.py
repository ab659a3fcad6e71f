"""The architectures of the WSA paper, small: each trains a round in which every layer has a target."""

import math

import numpy as np
import pytest
import torch
from federations import lines, run, spying, tiny
from safetensors.torch import load_file
from torchvision.models import VisionTransformer

from clients.federation import federation
from fedwsa import models
from fedwsa.data import Dataset
from fedwsa.scope import measure
from fedwsa.seeding import torch_seed

SIDE, CLASSES = 16, 4


def colours(data_dir):
    """Noisy images, each class of a colour of its own."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % CLASSES
    means = rng.integers(40, 200, (CLASSES, 3, 1, 1))
    images = np.clip(means[labels] + rng.normal(0, 30, (64, 3, SIDE, SIDE)), 0, 255).astype(np.uint8)
    return Dataset("colours", images[:48], labels[:48], images[48:], labels[48:], CLASSES, 255.0)


def vit(input_shape, num_classes):
    """Vision Transformer (Dosovitskiy et al., arXiv 2010.11929), two layers of four 8×8 patches."""
    return VisionTransformer(
        input_shape[1], patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=num_classes
    )


ARCHITECTURES = {
    "vgg": {"model": "vgg8", "width": 0.125},
    "resnet": {"model": "resnet8"},
    "resnet, group norm": {"model": "resnet8", "norm": "group"},
    "wide resnet": {"model": "resnet8", "width": 4.0},
    "mobilenet-v2": {"model": "torchvision.models:mobilenet_v2"},
    "vit": {"model": f"{__name__}:vit"},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trains_a_round_with_a_target_for_every_layer(name, tmp_path):
    config = tiny(
        **ARCHITECTURES[name],
        data=f"{__name__}:colours",
        partitioner="iid",
        num_clients=2,
        cohort=2,
        evaluation_cohort=2,
        server_samples=0,
        rounds=1,
        batch_size=11,
        local_epochs=2,
        strategies=("fedavg", "fedavg-wsa"),
        wsa={"strength": 5.0},
    )
    assert [len(part) for part in federation(config).training] == [22, 22]  # BatchNorm needs two in a batch
    seen = []
    run(config, tmp_path, spying(seen))
    start = models.of_config(config, (3, SIDE, SIDE), CLASSES, torch_seed(0, "model")).state_dict()
    scope = measure(start)
    aligned = [message for message in seen if message.alignment]
    assert len(aligned) == 2
    assert all(message.alignment.target == scope for message in aligned)
    for strategy in config.strategies:
        event = next(each for each in lines(tmp_path / strategy / "metrics.jsonl") if each["phase"] == "train")
        assert (event["num_failed"], event["layers"]) == (0, list(scope.names))
        assert math.isfinite(event["metrics"]["loss"])
        assert all(map(math.isfinite, event["scope_distance"]))
    plain, wsa = (load_file(tmp_path / strategy / "final.safetensors") for strategy in config.strategies)
    assert wsa.keys() == start.keys()
    for layer in scope.names:
        assert wsa[layer].isfinite().all()
        assert not torch.equal(wsa[layer], start[layer]), layer
    assert any(not torch.equal(wsa[layer], plain[layer]) for layer in scope.names)
