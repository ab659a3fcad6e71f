"""The client's optimiser: any of torch.optim by name, made anew for each training."""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from fedwsa.config import Config
from fedwsa.registry import check_call, lookup, signature_of

Step = Callable[[], None]
Build = Callable[..., torch.optim.Optimizer]

OTHER_NEEDS = {"LBFGS", "SparseAdam", "Muon"}  # a closure, sparse gradients, matrices alone
OPTIMIZERS: dict[str, Build] = {
    name.lower(): getattr(torch.optim, name)
    for name in torch.optim.__all__
    if inspect.isclass(getattr(torch.optim, name)) and name not in {"Optimizer", *OTHER_NEEDS}
}

WAY = "(parameters, lr=…), and momentum and weight_decay where it names them"  # how an optimiser is called


def options_of(config: Config) -> tuple[Build, dict[str, Any]]:
    """What makes the optimiser of a config, and with which options besides the parameters.

    Raises ValueError for an unknown optimiser, what is no callable, and for a momentum or weight decay that it does not
    have.
    """
    build = lookup(OPTIMIZERS, config.optimizer, "optimizer")
    taken = signature_of(build, f"optimizer {config.optimizer!r}", WAY).parameters
    options: dict[str, Any] = {"lr": config.learning_rate}
    for name, value in (("momentum", config.momentum), ("weight_decay", config.weight_decay)):
        if name in taken:
            options[name] = value
        elif value:
            key = name.replace("_", "-")
            raise ValueError(f'{key} = {value:g}: optimizer "{config.optimizer}" has none; allowed with it is 0')
    return build, options


def check(config: Config) -> None:
    """Raise ValueError, in one line, as `options_of`, and where a user's own optimiser makes no step."""
    build, options = options_of(config)
    if config.optimizer in OPTIMIZERS:
        return
    check_call(build, f"optimizer {config.optimizer!r}", WAY, [], **options)
    parameters = [torch.zeros(2, 2, requires_grad=True), torch.zeros(2, requires_grad=True)]  # a layer's
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        with torch.random.fork_rng(devices=[]):
            build(parameters, **options).step()
    except Exception as error:  # whatever it says to what it is not made for
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"optimizer {config.optimizer!r} makes no step: {reason}; allowed is one whose step() takes no arguments, "
            "as in torch.optim"
        ) from error


def step_of(parameters: list[Tensor], config: Config) -> Step:
    """A function that makes one step with the gradients that are there; its state begins anew."""
    if config.optimizer == "sgd":
        return _SGD(parameters, config).step
    build, options = options_of(config)
    return cast(Step, build(parameters, **options).step)


class _SGD:
    """PyTorch's, in its functional form: building a `torch.optim.Optimizer` imports its compiler, a second."""

    def __init__(self, parameters: list[Tensor], config: Config) -> None:
        self.parameters = parameters
        self.buffers: list[Tensor | None] = [None] * len(parameters)
        self.config = config

    @torch.no_grad()
    def step(self) -> None:
        config = self.config
        used = [(i, each, each.grad) for i, each in enumerate(self.parameters) if each.grad is not None]
        weights, gradients = [weight for _, weight, _ in used], [gradient for _, _, gradient in used]
        if config.momentum == 0 and config.weight_decay == 0:  # what PyTorch's would do too, without its overhead
            torch._foreach_add_(weights, gradients, alpha=-config.learning_rate)
            return
        momenta = [self.buffers[i] for i, _, _ in used]
        sgd(
            weights,
            gradients,
            momenta,
            foreach=True,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            lr=config.learning_rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        for (i, _, _), momentum in zip(used, momenta, strict=True):
            self.buffers[i] = momentum
