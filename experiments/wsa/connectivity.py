"""The pairs of PLAN.md: `python -m experiments.wsa.connectivity` trains and compares what is missing.

Every model is VGG-8 with an eighth of its width and He's initial weights, trained on Fashion-MNIST for 5 epochs by a
plain loop: SGD, learning rate 0.05, momentum 0.9, batches of 50, gradient clipped to norm 10. Of a pair A is this base;
B begins at the same or at other weights, sees its samples in another order, and differs in one thing more. The term's
target, where there is one, is what He's scheme would give (`targets.init_scheme`), the same for all. Each is done three
times from other seeds. What is kept is `pairs.json`, beside this file.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from experiments.barrier_view import curves_of
from fedwsa import data, merging, models, targets
from fedwsa.evaluation import evaluate
from fedwsa.files import replace as write
from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.scope import WeightScope, fuse, kl_divergence, measure
from fedwsa.seeding import torch_generator

HERE = Path(__file__).parent
REPEATS = (0, 1, 2)
STRENGTH = 10.0
EPOCHS, FIRST = 5, 2
POINTS = [index / 10 for index in range(11)]
TREATMENTS = {"none": 0, "all epochs": EPOCHS, "first epochs": FIRST}  # epochs with the term
INITIAL = {"same": 0, "other": 1}

State = dict[str, Tensor]
Job = TypeVar("Job")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model is made. part: of how many equal parts of the shuffled training split it sees which."""

    repeat: int
    treatment: str
    initial: int = 0
    order: int = 0
    optimizer: str = "SGD"
    learning_rate: float = 0.05
    weight_decay: float = 0.0
    batch_size: int = 50
    part: tuple[int, int] = (0, 1)

    def path(self, folder: Path) -> Path:
        """Where the model is."""
        of, parts = self.part
        name = (
            f"{self.treatment.replace(' ', '-')}-{self.initial}-{self.order}-{self.optimizer}-{self.learning_rate:g}"
            f"-{self.weight_decay:g}-{self.batch_size}-{of}of{parts}-repeat-{self.repeat}.safetensors"
        )
        return folder / name


DIFFERENCES: dict[str, dict[str, Any]] = {
    "order of the samples": {},
    "optimiser (Adam, 0.001)": {"optimizer": "Adam", "learning_rate": 0.001},
    "learning rate (0.01)": {"learning_rate": 0.01},
    "weight decay (0.001)": {"weight_decay": 0.001},
    "batch size (200)": {"batch_size": 200},
    "half of the samples": {"part": (1, 2)},
}


def pairs() -> Iterator[tuple[str, str, Recipe, Recipe]]:
    """(initial weights, difference, A, B)."""
    for repeat in REPEATS:
        for treatment in TREATMENTS:
            for initial, number in INITIAL.items():
                for difference, changes in DIFFERENCES.items():
                    a = Recipe(repeat, treatment, part=(0, 2) if "part" in changes else (0, 1))
                    yield initial, difference, a, replace(a, initial=number, order=1, **changes)


def train(
    model: nn.Module, recipe: Recipe, epochs: int, target: WeightScope, aligned: int, stage: int = 0
) -> nn.Module:
    """In place, for `epochs`, the first `aligned` of them with the term."""
    images, labels = _training_split()
    seed = 1000 * recipe.repeat + 10 * recipe.order + stage
    everything = torch.randperm(len(labels), generator=torch_generator(recipe.repeat, "client"))
    own = everything.tensor_split(recipe.part[1])[recipe.part[0]]
    generator = torch_generator(seed, "client", 1)
    parameters = list(model.parameters())
    options: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    options |= {"momentum": 0.9} if recipe.optimizer == "SGD" else {}
    optimizer = getattr(torch.optim, recipe.optimizer)(parameters, **options)
    regularizer = WeightScopeRegularizer(model.named_parameters(), target, strength=STRENGTH)
    model.train()
    for epoch in range(epochs):
        for batch in torch.split(own[torch.randperm(len(own), generator=generator)], recipe.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 10.0)
            if epoch < aligned:
                regularizer.add_gradient()
            optimizer.step()
    return model


def make(recipe: Recipe, folder: Path) -> None:
    """Train the model, unless it is there."""
    if recipe.path(folder).exists():
        return
    torch.set_num_threads(1)
    model = fresh(recipe.repeat, recipe.initial)
    target = targets.init_scheme(model, "kaiming-normal")
    train(model, recipe, EPOCHS, target, TREATMENTS[recipe.treatment])
    write(recipe.path(folder), save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))


def fresh(repeat: int, initial: int = 0) -> nn.Module:
    """VGG-8-narrow with initial weights of its own."""
    model = models.build("vgg8", (1, 28, 28), 10, 100 * repeat + initial, width=0.125, init="kaiming-normal")
    return models.placed(model, torch.device("cpu"))


def compare(job: tuple[str, str, Recipe, Recipe], folder: Path) -> dict[str, Any]:
    """What is counted of a pair, on the test split."""
    initial, difference, a, b = job
    torch.set_num_threads(1)
    model = fresh(0)
    names = list(model.state_dict())
    loaded = [load_file(recipe.path(folder)) for recipe in (a, b)]
    ends = [{name: state[name] for name in names} for state in loaded]
    scopes = [measure(end) for end in ends]
    target = targets.init_scheme(model, "kaiming-normal")
    curves = {}
    for path, end in {
        "plain": ends[1],
        "permuted": merging.align(ends[1], ends[0], merging.chain_permutations(ends[0])),
    }.items():
        (line,) = curves_of(path, model, (ends[0], end), len(POINTS), {"test": _test_split()}, ())
        middle = merging.align_scopes(merging.average([ends[0], end]), fuse(scopes, [1.0, 1.0])).state
        curves[path] = {
            "loss": line.losses,
            "accuracy": line.accuracies,
            "rescaled": test(model, middle),
        }
    return {
        "initial": initial,
        "difference": difference,
        "treatment": a.treatment,
        "repeat": a.repeat,
        "divergence": kl_divergence(scopes[0], scopes[1]).sum().item(),
        "from_target": [kl_divergence(scope, target).sum().item() for scope in scopes],
        "curves": curves,
    }


def test(model: nn.Module, state: State) -> tuple[float, float]:
    """Loss (nats a sample) and accuracy on the test split."""
    model.load_state_dict(state)
    return evaluate(model, *_test_split())


STAGED = {"none": None, "pre-defined target": "init-scheme", "fused target": "fused"}


def staged(job: tuple[str, int], folder: Path) -> dict[str, Any]:
    """Four models of a quarter of the samples each, merged in two stages; training goes on between them.

    From the same initial weights each trains for 5 epochs; neighbours are averaged; the two averages train for 2 epochs
    on the samples of both their parents; the average of these is the result. The target of the second stage is what the
    first had (He's scheme) or the fusion of the four models' scopes.
    """
    treatment, repeat = job
    torch.set_num_threads(1)
    kind = STAGED[treatment]
    target = targets.init_scheme(fresh(repeat), "kaiming-normal")
    aligned = 0 if kind is None else EPOCHS
    quarters = []
    for quarter in range(4):
        recipe = Recipe(repeat, "none", order=quarter, part=(quarter, 4))
        quarters.append(_state(train(fresh(repeat), recipe, EPOCHS, target, aligned)))
    if kind == "fused":
        target = fuse([measure(state) for state in quarters], [1.0] * 4)
    halves, middles = [], []
    for half in range(2):
        model = fresh(repeat)
        middles.append(merging.average(quarters[2 * half : 2 * half + 2]))
        model.load_state_dict(middles[-1])
        recipe = Recipe(repeat, "none", order=half, part=(half, 2))
        halves.append(_state(train(model, recipe, 2, target, aligned, stage=1)))
    model = fresh(repeat)
    return {
        "treatment": treatment,
        "repeat": repeat,
        "quarters": [test(model, state) for state in quarters],
        "averages of two": [test(model, state) for state in middles],
        "halves": [test(model, state) for state in halves],
        "result": test(model, merging.average(halves)),
        "average of four": test(model, merging.average(quarters)),
    }


def _state(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@lru_cache(maxsize=1)
def _training_split() -> tuple[Tensor, Tensor]:
    dataset = data.load("fashion-mnist")
    return dataset.train_tensors(torch.arange(len(dataset.train_labels)).numpy())


@lru_cache(maxsize=1)
def _test_split() -> tuple[Tensor, Tensor]:
    return data.load("fashion-mnist").test_tensors()


def _all(function: Callable[[Job, Path], Found], jobs: Iterable[Job], folder: Path) -> list[Found]:
    jobs = list(jobs)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return list(pool.map(function, jobs, [folder] * len(jobs)))


def main() -> None:
    """Make what is missing, then write pairs.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/wsa-pairs"))
    folder = parser.parse_args().runs
    folder.mkdir(parents=True, exist_ok=True)
    jobs = list(pairs())
    _all(make, dict.fromkeys(recipe for _, _, a, b in jobs for recipe in (a, b)), folder)
    content = {
        "pairs": _all(compare, jobs, folder),
        "staged": _all(staged, [(treatment, repeat) for repeat in REPEATS for treatment in STAGED], folder),
    }
    write(HERE / "pairs.json", (json.dumps(content) + "\n").encode())


if __name__ == "__main__":
    main()
