"""FedDyn against its algorithm by hand, the stationary point of quadratic losses, and autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federations import DIGITS, holdout, initial_model, tiny, train_one
from quadratics import EXACT, clients_of, kept, play, point, watch

from clients.federation import federation
from fedwsa import messages, models
from fedwsa.arrays import pack, unpack
from fedwsa.seeding import torch_generator
from strategies import FedAvg, FedDyn, build

CURVATURES, CENTRES = (1.0, 4.0), ([1.0, -2.0], [3.0, 0.5])
OPTIMUM = np.array(CURVATURES) @ np.array(CENTRES) / sum(CURVATURES)
GRADIENTS = "feddyn-gradient"
NAMES = ("feddyn", "feddyn-wsa")


def feddyn(cohort=2, num_clients=2, **options):
    return FedDyn(cohort, num_clients=num_clients, **{"seed": 0, **options})


# ---- rounds by hand: f_1 = ½(w − 1)², f_2 = 2(w − 3)², x = 5, α = 1, exact local minima


def test_two_rounds_by_hand():
    """Round 1: (1 + 5)/2 = 3, (12 + 5)/5 = 3.4, mean 3.2; g = 2, 1.6; h = 1.8; x = 3.2 − 1.8 = 1.4.

    Round 2: 2 w = 1 + 2 + 1.4, 5 w = 12 + 1.6 + 1.4, so 2.2 and 3, mean 2.6; g = 1.2, 0; h = 0.6; x = 2.6 − 0.6 = 2.
    """
    app, strategy = clients_of(CURVATURES, ([1.0], [3.0])), feddyn(alpha=1.0)
    expected = [(1.4, [2.0, 1.6], 1.8), (2.0, [1.2, 0.0], 0.6)]
    for (x, grid), (server, own, h) in zip(watch(strategy, app, 2, 2, point(5.0)), expected, strict=True):
        np.testing.assert_allclose(x, [server], rtol=1e-9)
        np.testing.assert_allclose(kept(grid, GRADIENTS, 1)[:, 0], own, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(strategy.h["w"], [h], rtol=1e-9)


def test_one_of_four_clients_moves_h_by_a_quarter():
    """It goes to w = (c + 2 · 5)/3 with α = 2; h = −2/4 (w − 5), x = w − h/2."""
    centres = np.array([1.0, 2.0, 3.0, 4.0])
    strategy = feddyn(1, 4, alpha=2.0)
    ((x, grid),) = watch(strategy, clients_of([1.0] * 4, centres[:, None].tolist()), 4, 1, point(5.0))
    (drawn,) = grid.states
    w = (centres[drawn] + 10) / 3
    np.testing.assert_allclose(strategy.h["w"], [-(w - 5) / 2], rtol=1e-9)
    np.testing.assert_allclose(x, [w + (w - 5) / 4], rtol=1e-9)


# ---- properties


@pytest.mark.parametrize("cohort", [5, 2])
def test_h_is_the_mean_of_all_clients_after_each_round(cohort):
    rng = np.random.default_rng(1)
    app = clients_of(
        rng.uniform(0.5, 3, 5), rng.normal(size=(5, 3)).tolist(), steps=(1, 2, 3, 5, 9), examples=(1, 10, 100, 3, 7)
    )
    strategy = feddyn(cohort, 5, alpha=0.5)
    for _, grid in watch(strategy, app, 5, 8, point(5.0, 5.0, 5.0)):
        gradients = kept(grid, GRADIENTS, 3)
        np.testing.assert_allclose(gradients.mean(0), strategy.h["w"], rtol=0, atol=1e-12)
        assert np.ptp(gradients, axis=0).min() > 0.01


@pytest.mark.parametrize("alpha", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("steps", [EXACT, 5, (12, 3)])
def test_the_optimum_of_the_plain_mean_is_reached(alpha, steps):
    """At Σ h_k c_k ÷ Σ h_k, whatever α, steps and numbers of examples; there g_k = ∇f_k and h = Σ g_k / N = 0."""
    app = clients_of(CURVATURES, CENTRES, steps=steps, examples=(1, 99))
    strategy = feddyn(alpha=alpha)
    *_, (found, grid) = watch(strategy, app, 2, 100 if steps == EXACT else 150, point(5.0, 5.0))
    np.testing.assert_allclose(found, OPTIMUM, rtol=0, atol=1e-6)
    gradients = np.array(CURVATURES)[:, None] * (OPTIMUM - np.array(CENTRES))
    np.testing.assert_allclose(kept(grid, GRADIENTS, 2), gradients, rtol=1e-5)
    np.testing.assert_allclose(strategy.h["w"], 0, atol=1e-6)


def test_so_it_is_with_partial_participation():
    app = clients_of([1.0, 2.0, 4.0], ([1.0], [3.0], [-1.0]), steps=20)
    found = play(feddyn(1, 3, alpha=1.0), app, 3, 300, point(5.0))
    np.testing.assert_allclose(found, [(1 + 6 - 4) / 7], rtol=1e-6)


def test_what_a_client_keeps_is_its_gradient_where_it_solves_exactly():
    """∇f(w) = g + α (x − w), which is the new g."""
    strategy, x = feddyn(alpha=0.5), np.array([5.0, 5.0])
    own = np.zeros((2, 2))
    for found, grid in watch(strategy, clients_of(CURVATURES, CENTRES), 2, 3, point(*x)):
        h, c = np.array(CURVATURES)[:, None], np.array(CENTRES)
        w = (h * c + own + 0.5 * x) / (h + 0.5)
        own, x = kept(grid, GRADIENTS, 2), found
        np.testing.assert_allclose(own, h * (w - c), rtol=1e-8)


# ---- our client


def test_terms_are_the_gradient_of_the_dynamic_regulariser():
    """Two rounds against a plain loop in which autograd differentiates − ⟨g, w⟩ + α/2 ‖w − x‖²."""
    config, alpha = tiny(learning_rate=0.01, momentum=0.5, local_epochs=2), 0.7
    settings = {messages.OBJECTIVE: "feddyn", messages.DYNAMIC_ALPHA: alpha}
    model, state = models.build("mlp", *DIGITS, 1), None
    gradient = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    images, labels = federation(config).training_tensors(2)
    for server_round in (1, 2):
        sent = {"arrays": pack({name: each.clone() for name, each in model.state_dict().items()})}
        reply, state = train_one(config, sent, settings, client=2, server_round=server_round, state=state)

        start = {name: each.detach().clone() for name, each in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
        generator = torch_generator(config.seed[0], "client", server_round, 2)
        for _ in range(2):
            for batch in torch.split(torch.randperm(len(labels), generator=generator), config.batch_size):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                for name, w in model.named_parameters():
                    loss = loss - (gradient[name] * w).sum() + alpha / 2 * (w - start[name]).square().sum()
                loss.backward()
                optimizer.step()
        for name, each in model.named_parameters():
            gradient[name] = (gradient[name] - alpha * (each - start[name])).detach()
            torch.testing.assert_close(unpack(reply["arrays"])[name], each.detach(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(unpack(state[GRADIENTS])[name], gradient[name], rtol=1e-4, atol=1e-6)
        assert set(reply) == {"arrays", "metrics"}


def test_what_stays_with_a_client_has_no_gradient():
    config = tiny(model="federations:NormNet", batch_norm="local")
    model = models.build("federations:NormNet", *DIGITS, 1)
    settings = {messages.OBJECTIVE: "feddyn", messages.DYNAMIC_ALPHA: 0.1}
    _, state = train_one(config, {"arrays": pack(model.state_dict())}, settings)
    assert set(state[GRADIENTS]) == {"1.weight", "1.bias", "4.weight", "4.bias"}


# ---- the server


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ValueError, match="alpha must be > 0 and finite, got"):
        feddyn(alpha=alpha)


def test_without_a_client_term_it_would_be_fedavg():
    """α → 0 on a first round: clients go where FedAvg's go, and the server goes twice as far."""
    app = clients_of(CURVATURES, CENTRES, steps=5)
    plain = play(FedAvg(2, seed=0), app, 2, 1, point(5.0, 5.0))
    found = play(feddyn(alpha=1e-9), app, 2, 1, point(5.0, 5.0))
    np.testing.assert_allclose(found, 2 * plain - 5, rtol=1e-6)


def test_config_reaches_the_strategy():
    one, default = (build("feddyn", each, holdout()) for each in (tiny(num_clients=9, feddyn={"alpha": 0.1}), tiny()))
    assert (one.num_clients, one.alpha) == (9, 0.1)
    assert (default.num_clients, default.alpha) == (6, 0.01)
    assert one.parameters == set(initial_model())
