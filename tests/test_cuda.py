"""On a card the numbers are the CPU's, but for rounding. Skipped where there is none."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from federations import DIGITS, finals, holdout, run, tiny
from safetensors.torch import load
from torch import Tensor, nn

from clients.optimizers import OPTIMIZERS, step_of
from clients.training import mean_gradient, train
from fedwsa import models
from fedwsa.evaluation import evaluate
from fedwsa.merging import align, align_scopes, average, interpolate, np_merge, recalibrate
from fedwsa.messages import Alignment
from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.scope import WeightScope, measure
from strategies import STRATEGIES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SHAPES = {"dense": (20, 30), "shifted": (7, 11), "kernel": (4, 3, 5, 5)}
COMBINATIONS = [  # divergence, mode
    ("forward-kl", "loss"),
    ("forward-kl", "proximal"),
    ("reverse-kl", "loss"),
    ("wasserstein", "loss"),
    ("wasserstein", "proximal"),
]


def weights_of(device: torch.device | str) -> dict[str, nn.Parameter]:
    """Three layers, one of them far from 0, with a gradient each."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, shape in SHAPES.items():
        values = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) + 3.0 * (name == "shifted")
        layers[name] = nn.Parameter(values.to(device, torch.float32))
        layers[name].grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, torch.float32)
    return layers


def target_of(granularity: str) -> WeightScope:
    """Not where the weights are."""
    layers = {name: 1.5 * tensor.detach() + 0.02 for name, tensor in weights_of("cpu").items()}
    return measure(layers, granularity=granularity)


def digits(device: torch.device | str, count: int = 100) -> tuple[Tensor, Tensor]:
    samples = holdout(count)
    return samples.images.to(device), samples.labels.to(device)


def model_on(device: torch.device | str, name: str = "mlp") -> nn.Module:
    return models.placed(models.build(name, *DIGITS, seed=0), torch.device(device))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_alike(card: dict[str, Tensor], cpu: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    assert card.keys() == cpu.keys()
    for name, tensor in cpu.items():
        torch.testing.assert_close(card[name].detach().cpu(), tensor.detach(), rtol=rtol, atol=atol)


# ---- the term


@pytest.mark.parametrize("granularity", ["layer", "channel", "model"])
@pytest.mark.parametrize(("divergence", "mode"), COMBINATIONS)
def test_the_term_is_the_same_on_a_card(divergence, mode, granularity):
    after = []
    for device in ("cuda", "cpu"):
        layers = weights_of(device)
        options = {"strength": 2.0, "mode": mode, "divergence": divergence, "granularity": granularity}
        term = WeightScopeRegularizer(layers.items(), target_of(granularity), **options)
        term.fix_strength(0.5, learning_rate=0.05)
        term.attach(torch.optim.SGD(layers.values(), lr=0.05))
        penalty, strength = term.penalty(), term.strength
        term.add_gradient()
        term.proximal_step(0.05)
        term.descend(0.05)
        gradients = {f"{name}.grad": tensor.grad for name, tensor in layers.items()}
        after.append(({**layers, **gradients}, penalty, strength))
    (card, *numbers), (cpu, *same) = after
    assert all(tensor.device.type == "cuda" for tensor in card.values())
    assert_alike(card, cpu)
    assert numbers == pytest.approx(same, rel=1e-5)


@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_millions_of_weights_are_measured_accurately_on_a_card(mode):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(2000, 2000, generator=generator) + 0.5
    target = WeightScope(("w",), torch.tensor([0.1], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64))
    changed = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        weights = nn.Parameter(values.clone().to(device, dtype))
        term = WeightScopeRegularizer([("w", weights)], target, strength=10.0 * weights.numel(), mode=mode)
        term.add_gradient()
        term.proximal_step(0.1)
        changed.append((weights.detach() if weights.grad is None else weights.grad).cpu().double())
    assert (changed[0] - changed[1]).norm() < 1e-5 * changed[1].norm()


@pytest.mark.parametrize("mode", ["loss", "proximal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_scaled_gradients_pulls_as_single_precision_does(mode, dtype):
    images, labels = digits("cuda")
    ends = []
    for mixed in (True, False):
        model = model_on("cuda")
        target = measure({name: 0.5 * tensor for name, tensor in model.named_parameters() if tensor.ndim > 1})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        WeightScopeRegularizer(model.named_parameters(), target, strength=1.0, mode=mode).attach(optimizer)
        scaler = torch.amp.GradScaler("cuda", enabled=mixed and dtype == torch.float16)
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype, enabled=mixed):
                loss = F.cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        ends.append(measure({name: tensor for name, tensor in model.named_parameters() if tensor.ndim > 1}))
    assert (ends[0].variances / ends[1].variances - 1).abs().max() < 0.05
    assert (ends[0].means - ends[1].means).abs().max() < 2e-3


# ---- clients


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_makes_the_step_that_it_makes_on_the_cpu(name):
    ends = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        layers = weights_of(device)
        step = step_of(list(layers.values()), tiny(optimizer=name, learning_rate=0.01))
        step()
        step()
        ends.append(layers)
    assert_alike(*ends, rtol=1e-3)


@pytest.mark.parametrize("mode", ["loss", "proximal"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_clients_training_is_the_same_on_a_card(mode, momentum):
    config = tiny(momentum=momentum, local_epochs=2, clip_norm=1.0)
    ends = []
    for device in ("cuda", "cpu"):
        model = model_on(device)
        target = measure({name: 0.9 * tensor for name, tensor in model.named_parameters() if tensor.ndim > 1})
        generator, alignment = torch.Generator().manual_seed(3), Alignment(target, 1.0, mode, "sum")
        seen = train(model, *digits(device), config, generator, alignment)
        gradient = mean_gradient(model, *digits(device), config, 5)
        ends.append((state_of(model), gradient, seen.loss, evaluate(model, *digits("cpu"))))
    card, cpu = ends
    assert_alike(card[0], cpu[0], rtol=1e-3, atol=1e-4)
    assert_alike(card[1], cpu[1], rtol=1e-2, atol=1e-4)
    assert card[2] == pytest.approx(cpu[2], rel=1e-3)
    assert card[3][0] == pytest.approx(cpu[3][0], rel=1e-3)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_trains_clients_on_a_card(tmp_path: Path, name: str):
    """In this process, two rounds; the server computes on the CPU."""
    ends, heard = [], []
    for gpus in (1.0, 0.0):
        config = tiny(strategies=name, gpus_per_client=gpus, on_client_failure="fail")
        run(config, tmp_path / str(gpus), events=heard)
        ends.append(load(finals(tmp_path / str(gpus), config)[name]))
    assert_alike(*ends, rtol=1e-2, atol=1e-3)
    assert not any(event.get("num_failed") for _, event in heard)


@pytest.mark.parametrize("model", ["cnn", "resnet8"])
def test_convolutions_give_the_same_bits_again(tmp_path: Path, model: str):
    """cuDNN is free to add up gradients in any order, unless it is told otherwise."""
    config = tiny(strategies="fedavg", model=model, gpus_per_client=1.0)
    ends = []
    for number in range(3):
        run(config, tmp_path / str(number))
        ends.append(finals(tmp_path / str(number), config))
    assert ends[0] == ends[1] == ends[2]


# ---- merging


def pair(device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two networks, the second with its hidden units in another order and a little noise."""
    a = {name: tensor.to(device) for name, tensor in state_of(models.build("mlp", *DIGITS, seed=0)).items()}
    b = {name: tensor.to(device) for name, tensor in state_of(models.build("mlp", *DIGITS, seed=1)).items()}
    return a, b


def merge_np(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    device = next(iter(a.values())).device
    model, (images, labels) = model_on(device), digits(device)

    def loss(state: dict[str, Tensor], step: int) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, state, images), labels)

    return np_merge(a, b, loss, steps=5).state


MERGES = {
    "average": lambda a, b: average([a, b], [1.0, 3.0]),
    "interpolate": lambda a, b: interpolate(a, b, 0.3),
    "align": lambda a, b: align(b, a),
    "align_scopes": lambda a, b: align_scopes(a, measure({n: 1.5 * t for n, t in b.items() if t.ndim > 1})).state,
    "np_merge": merge_np,
}


@pytest.mark.parametrize("name", MERGES)
def test_models_on_a_card_are_merged_there(name):
    card, cpu = MERGES[name](*pair("cuda")), MERGES[name](*pair("cpu"))
    assert {tensor.device.type for tensor in card.values()} == {"cuda"}
    assert_alike(card, cpu, rtol=1e-3, atol=1e-5)


def test_batch_norm_is_recalibrated_on_a_card():
    images, _ = digits("cpu")
    ends = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8)).to(device)
        recalibrate(model, [part.to(device) for part in images.split(25)])
        ends.append(state_of(model))
    assert_alike(*ends, rtol=1e-3)
