"""The regulariser in plain PyTorch loops: every optimiser, mixed precision, clipping, accumulation."""

import inspect
from functools import partial

import pytest
import torch
from test_regularizer import NETWORK_TARGET, assert_same_weights, network, penalty_of, task_loss, train_both
from torch import nn

from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.scope import measure, proximal_coefficients

SPARSE_ONLY, CLOSURE_ONLY = {"SparseAdam"}, {"LBFGS"}
MATRICES_ONLY = {"Muon"}
OPTIMIZERS = {
    name: each
    for name, each in vars(torch.optim).items()
    if inspect.isclass(each) and issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer
    if name not in SPARSE_ONLY | CLOSURE_ONLY
}


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [each for each in model.parameters() if each.ndim == 2 or name not in MATRICES_ONLY]
    return OPTIMIZERS[name](parameters, lr=0.01)


def test_the_common_ones_are_among_them():
    assert {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "RAdam"} <= OPTIMIZERS.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_mode_is_training_on_the_penalised_loss(name):
    reference, aligned = train_both(partial(optimizer_of, name), steps=4)
    tolerance = 1e-2 if name in MATRICES_ONLY else 1e-7  # Muon computes in bfloat16
    assert_same_weights(aligned, reference, tolerance)
    assert not torch.equal(aligned[0].weight, network()[0].weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_proximal_mode_is_the_optimisers_step_and_the_map(name):
    reference, aligned = network(), network()
    reference_optimizer, optimizer = optimizer_of(name, reference), optimizer_of(name, aligned)
    WeightScopeRegularizer(aligned.named_parameters(), NETWORK_TARGET, strength=3.0, mode="proximal").attach(optimizer)
    for _ in range(3):
        for model, own in ((reference, reference_optimizer), (aligned, optimizer)):
            own.zero_grad()
            task_loss(model).backward()
            own.step()
        layers = [reference[0].weight, reference[3].weight]
        scope = measure(dict(reference.named_parameters()))
        maps = proximal_coefficients(scope, NETWORK_TARGET, [layer.numel() for layer in layers], 0.01 * 3.0)
        for weights, a, b in zip(layers, *maps, strict=True):
            weights.data = a + b * weights.data
    assert_same_weights(aligned, reference, 1e-2 if name in MATRICES_ONLY else 1e-7)


def test_lbfgs_takes_the_proximal_mode():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    regularizer = WeightScopeRegularizer(model.named_parameters(), NETWORK_TARGET, strength=1e9, mode="proximal")
    regularizer.attach(optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = task_loss(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert regularizer.penalty() == pytest.approx(0, abs=1e-9)


def test_accumulated_gradients_get_the_term_once():
    whole, parts = network(), network()
    inputs, labels = (
        torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        torch.arange(16) % 3,
    )
    for model, batches in ((whole, 1), (parts, 4)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        WeightScopeRegularizer(model.named_parameters(), NETWORK_TARGET).attach(optimizer)
        for some, their_labels in zip(inputs.chunk(batches), labels.chunk(batches), strict=True):
            (nn.functional.cross_entropy(model(some), their_labels) / batches).backward()
        optimizer.step()
    assert_same_weights(parts, whole, 1e-12)
    assert not torch.equal(whole[0].weight, network()[0].weight)


def test_clipping_bounds_the_task_and_not_the_term():
    model, original = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    WeightScopeRegularizer(model.named_parameters(), NETWORK_TARGET, strength=2.0).attach(optimizer)
    task_loss(model).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    optimizer.step()
    (term,) = torch.autograd.grad(2 * penalty_of(original), original[0].weight)
    torch.testing.assert_close(model[0].weight, original[0].weight - 0.1 * term, rtol=0, atol=1e-6)
    assert term.norm() > 1e-3


@pytest.mark.parametrize("mode", ["loss", "proximal"])
def test_autocast_trains_and_the_scope_moves_to_the_target(mode):
    model = network().float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    regularizer = WeightScopeRegularizer(model.named_parameters(), NETWORK_TARGET, strength=20.0, mode=mode)
    regularizer.attach(optimizer)
    before, inputs = regularizer.penalty(), torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(inputs), torch.arange(32) % 3)
        loss.backward()
        optimizer.step()
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())
    assert regularizer.penalty() < 0.1 * before


def test_a_gradient_scaler_unscales_before_the_term_is_added():
    plain, scaled = network().float(), network().float()
    for model, scale in ((plain, None), (scaled, 1024.0)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        WeightScopeRegularizer(model.named_parameters(), NETWORK_TARGET).attach(optimizer)
        loss = nn.functional.cross_entropy(model(torch.ones(3, 6)), torch.arange(3))
        if scale is None:
            loss.backward()
            optimizer.step()
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
    assert_same_weights(scaled, plain, 1e-6)
    assert not torch.equal(plain[0].weight, network().float()[0].weight)
