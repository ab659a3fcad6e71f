"""The one workload that every contestant runs: same samples, model, optimiser and cohort."""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedwsa import data, models

BATCH, LEARNING_RATE = 50, 0.05


class SmallCNN(nn.Module):
    """Two 5×5 convolutions (32, 64) with pooling, 128 hidden units: 454,922 parameters on 28×28 images."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 5, padding=2), nn.Conv2d(32, 64, 5, padding=2)
        self.fc1, self.fc2 = nn.Linear(64 * 7 * 7, 128), nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 1, 28, 28]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


@dataclass(frozen=True)
class Workload:
    """Clients with equal shards of Fashion-MNIST, one local epoch of plain SGD each."""

    model: str
    clients: int
    cohort: int
    samples: int

    def build(self) -> nn.Module:
        """A new model, the same for every contestant."""
        return models.build(self.model, (1, 28, 28), 10, seed=0)

    def shard(self, client: int) -> slice:
        """A client's samples; shards are used again where there are more clients than shards."""
        start = client % (60_000 // self.samples) * self.samples
        return slice(start, start + self.samples)


CNN = "experiments.bench.workloads:SmallCNN"
WORKLOADS = {
    "mlp": Workload("mlp", 100, 10, 600),
    "cnn": Workload(CNN, 100, 10, 600),
    "tiny": Workload("mlp", 1000, 100, 60),
    "many": Workload("mlp", 10_000, 100, 60),
}


def shards(labels: NDArray[np.int64], num_clients: int, *, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """The workload's shards as a partitioner; `many` clients share samples, which a real partition never does."""
    workload = next(w for w in WORKLOADS.values() if w.clients == num_clients)
    return [np.arange(len(labels))[workload.shard(client)] for client in range(num_clients)]


@cache
def tensors() -> tuple[Tensor, Tensor]:
    """All training images, normalised, and labels."""
    dataset = data.load("fashion-mnist")
    return dataset.train_tensors(np.arange(len(dataset.train_labels)))


def local_epoch(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """What PyTorch's documentation would have a user write."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for batch in torch.split(torch.randperm(len(images)), BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def arguments() -> tuple[Workload, int]:
    """Workload and number of rounds from the command line."""
    return WORKLOADS[sys.argv[1]], int(sys.argv[2])


class Stopwatch:
    """Round times, the first apart; says on standard output when the first round has ended."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.last = time.perf_counter()

    def lap(self) -> None:
        """A round has ended."""
        now = time.perf_counter()
        self.times.append(now - self.last)
        self.last = now
        if len(self.times) == 1:
            print("first round", flush=True)

    def report(self) -> None:
        """Median of the rounds after the first, in seconds."""
        print(json.dumps({"median_round_s": statistics.median(self.times[1:]), "rounds": len(self.times)}), flush=True)
