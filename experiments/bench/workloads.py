"""The workloads that every contestant runs: same samples, model, optimiser and cohort."""

import sys
import time
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedwsa import models
from fedwsa.data import fashion_mnist, idx
from fedwsa.models import MLP

BATCH, LEARNING_RATE = 50, 0.05
MEAN, STD = 0.286, 0.353  # of the training pixels / 255
WORKERS = 2  # clients that compute at the same time, one thread each
ON_A_CARD = 4  # the same on a CUDA card
LARGEST = 3000  # samples of a client of `unequal`

Indices = NDArray[np.int64]


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
    """Clients with shards of Fashion-MNIST, one local epoch of plain SGD each.

    samples: of each client, or of a client on average where the shards are unequal.
    """

    model: str
    clients: int
    cohort: int
    samples: int
    partitioner: str = "equal"
    device: str = "cpu"

    @property
    def workers(self) -> int:
        """Clients that compute at the same time."""
        return WORKERS if self.device == "cpu" else ON_A_CARD

    def build(self) -> nn.Module:
        """A new model, the same for every contestant."""
        return models.build(self.model, (1, 28, 28), 10, seed=0)

    def by_class(self) -> nn.Module:
        """A model as a user's script makes one: its initial weights are by the global generator."""
        classes: dict[str, type[MLP | SmallCNN]] = {"mlp": MLP, CNN: SmallCNN}
        return classes[self.model]((1, 28, 28), 10)

    def shard(self, client: int) -> slice:
        """A client's samples where the shards are equal; beyond the last they begin again (`bare`)."""
        start = client % (60_000 // self.samples) * self.samples
        return slice(start, start + self.samples)


CNN = "experiments.bench.workloads:SmallCNN"
WORKLOADS = {
    "mlp": Workload("mlp", 100, 10, 600),
    "cnn": Workload(CNN, 100, 10, 600),
    "tiny": Workload("mlp", 1000, 100, 60),
    "many": Workload("mlp", 10_000, 100, 6),
    "few": Workload("mlp", 100, 100, 6),  # what `many` is compared with
    "unequal": Workload(CNN, 20, 20, 600, "unequal"),
    "card-mlp": Workload("mlp", 100, 10, 600, device="cuda"),
    "card-cnn": Workload(CNN, 100, 10, 600, device="cuda"),
}


def equal(labels: Indices, num_clients: int, min_size: int, *, rng: np.random.Generator) -> list[Indices]:
    """`Workload.shard` as a partitioner."""
    workload = Workload("", num_clients, num_clients, min_size)
    shards = [workload.shard(client) for client in range(num_clients)]
    return [np.arange(shard.start, shard.stop) for shard in shards]


def unequal(labels: Indices, num_clients: int, *, rng: np.random.Generator) -> list[Indices]:
    """Contiguous shards of `client_sizes`."""
    ends = np.cumsum(client_sizes(num_clients, WORKLOADS["unequal"].samples, rng))
    return np.split(np.arange(len(labels)), ends)[:-1]


def client_sizes(num_clients: int, mean: int, rng: np.random.Generator) -> Indices:
    """Proportions drawn from Dir(½, …, ½) of `mean` samples a client, clipped to 1 … LARGEST; the total may differ."""
    proportions = rng.dirichlet(np.full(num_clients, 0.5))
    return np.clip(np.rint(proportions * mean * num_clients), 1, LARGEST).astype(np.int64)


def load() -> tuple[Tensor, Tensor]:
    """Read all training images, normalised, and labels: as a user's script does, without the cache of our data sets."""
    images, labels = idx.read_split(*fashion_mnist.find_files(None)[:2])
    pixels = torch.from_numpy(images.astype(np.float32))
    return (pixels / 255 - MEAN) / STD, torch.from_numpy(labels)


tensors = cache(load)


def local_epoch(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """What PyTorch's documentation would have a user write."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for batch in torch.split(torch.randperm(len(images), device=images.device), BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def arguments() -> tuple[str, int, str]:
    """Name of the workload, number of rounds, and what the contestant takes besides, from the command line."""
    name, rounds, *rest = sys.argv[1:]
    return name, int(rounds), rest[0] if rest else ""


class Stopwatch:
    """Says on standard output how long each round took, when it has ended: `lap 0.123`, seconds."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """A round begins now."""
        self.last = time.perf_counter()

    def lap(self) -> None:
        """A round has ended, and the next one begins."""
        self.say(time.perf_counter() - self.last)
        self.restart()

    def say(self, seconds: float) -> None:
        """A round has ended that took so long."""
        print(f"lap {seconds:.6f}", flush=True)
