"""The clients' optimisers are torch.optim's, with the config's numbers."""

import pytest
import torch
from federations import tiny
from torch import nn

from clients.optimizers import OPTIMIZERS, check, step_of

WITHOUT_DECAY = {"rprop"}
WITH_MOMENTUM = {"sgd", "rmsprop"}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_steps_are_those_of_pytorch(name):
    """Five steps with the same gradients, by the class itself and by the config."""
    options = {"lr": 0.02}
    options |= {} if name in WITHOUT_DECAY else {"weight_decay": 0.3}
    options |= {"momentum": 0.6} if name in WITH_MOMENTUM else {}
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(shape, generator=generator) for shape in ((4, 3), (4,))]
    ours, theirs = ([nn.Parameter(each.clone()) for each in start] for _ in range(2))
    config = tiny(
        optimizer=name,
        learning_rate=0.02,
        weight_decay=options.get("weight_decay", 0.0),
        momentum=options.get("momentum", 0.0),
    )
    step, optimizer = step_of(ours, config), OPTIMIZERS[name](theirs, **options)
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        step()
        optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("key", ["momentum", "weight_decay"])
def test_what_an_optimizer_does_not_have_is_refused(key):
    name = {"momentum": "adam", "weight_decay": "rprop"}[key]
    with pytest.raises(
        ValueError, match=f'{key.replace("_", "-")} = 0.5: optimizer "{name}" has none; allowed .* is 0'
    ):
        check(tiny(optimizer=name, **{key: 0.5}))
