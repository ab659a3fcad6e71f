"""FedProx against exact local solutions of quadratic losses, and its term against autograd."""

import numpy as np
import pytest
import torch
from federations import ask, initial_model, tiny
from flwr.serverapp.strategy import FedProx as FlowersFedProx
from quadratics import clients_of, play, point

from clients.federation import federation
from fedwsa import messages, models
from fedwsa.seeding import torch_generator
from strategies import FedAvg
from strategies.fedprox import FedProx

CURVATURES, CENTRES = (1.0, 4.0), ([1.0, -2.0], [3.0, 0.5])


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("examples", [(1, 1), (30, 10)])
def test_fixed_point_with_exact_local_solutions(mu, examples):
    """x* = Σ p_k h_k c_k/(h_k+μ) ÷ Σ p_k h_k/(h_k+μ)."""
    app = clients_of(CURVATURES, CENTRES, examples=examples)
    found = play(FedProx(2, mu=mu, seed=0), app, 2, 60, point(5.0, 5.0))
    shares = np.array(examples) / sum(examples)
    weights = shares * np.array(CURVATURES) / (np.array(CURVATURES) + mu)
    np.testing.assert_allclose(found, weights @ np.array(CENTRES) / weights.sum(), rtol=1e-9)


def test_one_round_by_hand():
    """(h c + μ x)/(h + μ) at each client: (1·1 + 1·5)/2 = 3 and (4·3 + 1·5)/5 = 3.4, mean 3.2."""
    found = play(FedProx(2, mu=1.0, seed=0), clients_of(CURVATURES, ([1.0], [3.0])), 2, 1, point(5.0))
    np.testing.assert_allclose(found, [3.2], rtol=1e-12)


def test_mu_zero_is_fedavg_bit_for_bit():
    app = clients_of(CURVATURES, CENTRES, steps=7)
    plain, ours = (play(s, app, 2, 3, point(5.0, 5.0)) for s in (FedAvg(2, seed=0), FedProx(2, mu=0.0, seed=0)))
    assert plain.tobytes() == ours.tobytes()


def test_flowers_fedprox_is_understood():
    app = clients_of(CURVATURES, CENTRES)
    theirs = play(FlowersFedProx(proximal_mu=1.0, fraction_evaluate=0.0), app, 2, 3, point(5.0, 5.0))
    np.testing.assert_allclose(theirs, play(FedProx(2, mu=1.0, seed=0), app, 2, 3, point(5.0, 5.0)), rtol=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_term_is_the_gradient_of_the_penalty(optimizer):
    """Our client against a plain loop in which autograd differentiates μ/2 ‖w − x‖²."""
    config = tiny(learning_rate=0.01, optimizer=optimizer, local_epochs=2)
    settings = {messages.OBJECTIVE: "fedprox", messages.PROXIMAL_MU: 3.0}
    state, _ = ask(config, client=2, server_round=4, start=initial_model(1), settings=settings)

    model = models.placed(models.build("mlp", (1, 8, 8), 10, seed=1), torch.device("cpu"))
    start = [each.detach().clone() for each in model.parameters()]
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    theirs = kind(model.parameters(), lr=0.01)
    images, labels = federation(config).training_tensors(2)
    generator = torch_generator(config.seed[0], "client", 4, 2)
    for _ in range(2):
        for batch in torch.split(torch.randperm(len(labels), generator=generator), config.batch_size):
            theirs.zero_grad()
            distance = sum((w - x).square().sum() for w, x in zip(model.parameters(), start, strict=True))
            (torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]) + 1.5 * distance).backward()
            theirs.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)
