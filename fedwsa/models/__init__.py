"""Models that clients train.

A model is made by a callable `(input_shape, num_classes, **options) -> nn.Module`. To add one: one file, one line in
`MODELS` (or none: `build` takes an import path too). Merging reads the hidden units off the order of the state dict,
so keep it a chain where you can: weight and bias of each layer, in the order in which forward uses them.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedwsa.config import Config
from fedwsa.models.cnn import CNN
from fedwsa.models.initialisation import initialise
from fedwsa.models.linear import hasten
from fedwsa.models.mlp import MLP
from fedwsa.models.resnet import resnet8, resnet20
from fedwsa.models.vgg import VGG8
from fedwsa.registry import check_call, lookup, signature_of

__all__ = ["CNN", "MLP", "MODELS", "VGG8", "build", "check_takes", "of_config", "placed", "resnet8", "resnet20"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "vgg8": VGG8,
    "resnet8": resnet8,
    "resnet20": resnet20,
}

OPTIONS = ("width", "norm")  # keys of the config that reach a factory with a parameter of that name

WAY = "(input_shape, num_classes, **options)"  # how a factory is called

Shape = tuple[int, int, int]


def of_config(config: Config, input_shape: Shape, num_classes: int, seed: int) -> nn.Module:
    """The model that a config names, with its `width` and `norm` where the factory takes them, and its `init`.

    Otherwise as `build`; also raises ValueError where such a key is set and the factory does not take it.
    """
    taken = _factory(config.model)[1].parameters
    options = {}
    for key in OPTIONS:
        value, default = getattr(config, key), Config.model_fields[key].default
        if key in taken:
            options[key] = value
        elif value != default:
            raise ValueError(f"{key} = {value!r}: model {config.model!r} has no such option; allowed is {default!r}")
    return build(config.model, input_shape, num_classes, seed, config.init, **options)


def build(
    name: str, input_shape: Shape, num_classes: int, seed: int, init: str = "default", **options: Any
) -> nn.Module:
    """Make a model by its registered name, or by an import path "package.module:factory"; on the CPU.

    A factory that takes no shape, and num_classes by keyword, as torchvision's do, will do too.
    input_shape: channels, height, width. options: what the model's own factory takes besides.
    seed: decides the initial weights, and nothing else does; the global generator is left as it was.
    init: a scheme of `initialisation.SCHEMES`, or "default" for the numbers that the model itself begins with.
    Raises ValueError for an unknown name or scheme, options that the model does not take, or images that it does not.
    """
    factory, signature = _factory(name)
    shapeless = _is_shapeless(signature)
    arguments = () if shapeless else (input_shape, num_classes)
    keywords = {"num_classes": num_classes, **options} if shapeless else options
    check_call(factory, f"model {name!r}", "(num_classes=…, **options)" if shapeless else WAY, *arguments, **keywords)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU's generator too
        model = factory(*arguments, **keywords)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} must be a torch.nn.Module, got {type(model).__name__}")
    if shapeless:
        _check_channels(model, name, input_shape[0])
        check_takes(model, name, torch.zeros(1, *input_shape), num_classes)
    if init != "default":
        initialise(model, init, seed)
    return model


def _factory(name: str) -> tuple[Callable[..., nn.Module], inspect.Signature]:
    factory = lookup(MODELS, name, "model")
    return factory, signature_of(factory, f"model {name!r}", WAY)


def _is_shapeless(signature: inspect.Signature) -> bool:
    """Whether a factory takes num_classes by keyword: it is named so elsewhere than second, or there is no place."""
    parameters: Mapping[str, inspect.Parameter] = signature.parameters
    if "num_classes" in parameters:
        return list(parameters).index("num_classes") != 1
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    return all(parameter.kind in by_keyword for parameter in parameters.values())


def _check_channels(model: nn.Module, name: str, channels: int) -> None:
    """A factory that is told no shape may have made a model for others."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.in_channels != channels:
        raise ValueError(
            f"model {name!r} takes images of {first.in_channels} channels, these have {channels}; "
            "allowed are other data, or a factory (input_shape, num_classes) of your own around it"
        )


@torch.no_grad()
def check_takes(model: nn.Module, name: str, images: Tensor, num_classes: int) -> None:
    """Raise ValueError, in one line, unless the model, called `name`, makes logits [n, num_classes] of the images.

    images: float32 [n, C, H, W]. One forward pass in eval mode; the global generator is left as it was.
    """
    training = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            logits: object = model.eval()(images)
    except Exception as error:  # whatever a module says to images that it is not made for
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model {name!r} does not take images {tuple(images.shape[1:])}: {reason}") from error
    finally:
        model.train(training)
    wanted = (len(images), num_classes)
    if not isinstance(logits, Tensor) or logits.shape != wanted:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"model {name!r} makes {found} of {len(images)} images; allowed is a tensor [images, classes], {wanted}"
        )


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """The module on a device, in place, laid out for speed there.

    Convolutions run channels last; large linear layers by oneDNN where that is faster (`fedwsa.models.linear`).
    """
    hasten(model)
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
    return model.to(device)
