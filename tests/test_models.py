import numpy as np
import pytest
import torch
from torch import nn

from fedwsa.config import Config
from fedwsa.models import CNN, MLP, MODELS, VGG8, build, of_config, resnet8, resnet20
from fedwsa.models.initialisation import SCHEMES

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 9, 13)]


def linear(input_shape, num_classes, bias=True):
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(input_shape)), num_classes, bias=bias))


def not_a_module(input_shape, num_classes):
    return input_shape


def for_sixteen(*, num_classes):
    """As torchvision's: told no shape."""
    return nn.Sequential(nn.Unflatten(3, (1, 16)), nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))


def tables(input_shape, num_classes):
    return nn.ParameterList([torch.ones(3, 3)])


NAMES = [*MODELS, f"{__name__}:linear"]
CHAINS = ["mlp", "cnn", "vgg8"]


def equal(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "input_shape", "expected"),
    [
        ("mlp", (1, 28, 28), 784 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10),  # 199,210 of McMahan et al.
        ("mlp", (1, 8, 8), 64 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10),
        ("cnn", (1, 28, 28), 1_663_370),  # of McMahan et al.
        ("cnn", (1, 8, 8), (25 + 1) * 32 + (32 * 25 + 1) * 64 + (64 * 2 * 2 + 1) * 512 + 513 * 10),
        ("cnn", (3, 32, 32), (3 * 25 + 1) * 32 + (32 * 25 + 1) * 64 + (64 * 8 * 8 + 1) * 512 + 513 * 10),
        ("vgg8", (3, 32, 32), 28 * 64 + 577 * 128 + 1153 * 256 + 2305 * 512 + 4609 * 512 + 513 * (512 + 512 + 10)),
        ("vgg8", (1, 28, 28), 10 * 64 + 577 * 128 + 1153 * 256 + 2305 * 512 + 4609 * 512 + 513 * (512 + 512 + 10)),
        ("vgg8", (1, 64, 64), 10 * 64 + 577 * 128 + 1153 * 256 + 2305 * 512 + 4609 * 512 + 513 * 522 + 2049 * 512),
        ("resnet20", (3, 32, 32), 269_722),  # 0.27 M in table 6 of He et al.
        (
            "resnet8",
            (3, 32, 32),
            27 * 16 + 2 * 2304 + 4608 + 9216 + 18432 + 36864 + 2 * (3 * 16 + 2 * 32 + 2 * 64) + 650,
        ),
    ],
)
def test_parameter_counts_by_hand(name, input_shape, expected):
    model = build(name, input_shape, 10, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("input_shape", SHAPES)
def test_logits_have_one_column_a_class(name, input_shape):
    logits = build(name, input_shape, 7, seed=0)(torch.randn(5, *input_shape))
    assert (logits.shape, logits.dtype) == ((5, 7), torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_alone_decides_the_weights(name):
    torch.manual_seed(1)
    one = build(name, (1, 8, 8), 10, seed=5).state_dict()
    torch.manual_seed(2)
    assert equal(build(name, (1, 8, 8), 10, seed=5).state_dict(), one)
    other = build(name, (1, 8, 8), 10, seed=6).state_dict()
    assert not any(torch.equal(other[key], one[key]) for key in one if "norm" not in key)


@pytest.mark.parametrize("name", NAMES)
def test_the_global_generator_is_left_as_it_was(name):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build(name, (1, 8, 8), 10, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_gpu_generator_is_seeded(monkeypatch):
    def refuse(seed):
        raise AssertionError("seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    build("mlp", (1, 8, 8), 10, seed=0)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_uniform_in_one_over_root_fan_in(name):
    for tensor_name, tensor in build(name, (1, 28, 28), 10, seed=0).state_dict().items():
        if tensor.ndim > 1:
            bound = tensor[0].numel() ** -0.5
            assert tensor.abs().max() <= bound, tensor_name
            four_sigma = 4 * (0.2 / tensor.numel()) ** 0.5  # of a uniform sample's σ, relative: (κ + 2)/4n, κ = −1.2
            assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=four_sigma), tensor_name


@pytest.mark.parametrize("name", CHAINS)
def test_the_state_dict_is_a_chain_of_weight_and_bias_in_forward_order(name):
    model = build(name, (1, 8, 8), 10, seed=0)
    called = []
    for module_name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, module_name=module_name: called.append(module_name))
    model(torch.randn(2, 1, 8, 8))
    assert list(model.state_dict()) == [f"{layer}.{kind}" for layer in called for kind in ("weight", "bias")]


def test_mlp_computes_its_formula():
    model = build("mlp", (1, 2, 2), 3, seed=0, hidden=(5,))
    w1, b1, w2, b2 = (tensor.numpy().astype(float) for tensor in model.state_dict().values())
    images = torch.randn(6, 1, 2, 2)
    expected = np.maximum(images.numpy().reshape(6, 4) @ w1.T + b1, 0) @ w2.T + b2
    np.testing.assert_allclose(model(images).detach(), expected, atol=1e-6)


def test_cnn_computes_its_formula():
    model = build("cnn", (2, 5, 6), 3, seed=0)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def convolve(maps, layer):  # maps [C, H, W], one output pixel after the other
        weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]
        padded = nn.functional.pad(maps, (2, 2, 2, 2))
        height, width = maps.shape[1:]
        pixels = [
            [(weight * padded[:, y : y + 5, x : x + 5]).sum((1, 2, 3)) + bias for x in range(width)]
            for y in range(height)
        ]
        return torch.stack([torch.stack(row, -1) for row in pixels], 1).clamp(min=0)

    def pool(maps):
        height, width = maps.shape[1] // 2, maps.shape[2] // 2
        return maps[:, : 2 * height, : 2 * width].reshape(-1, height, 2, width, 2).amax((2, 4))

    image = torch.randn(2, 5, 6)
    units = pool(convolve(pool(convolve(image.double(), "conv1")), "conv2")).flatten()
    units = (state["fc1.weight"] @ units + state["fc1.bias"]).clamp(min=0)
    expected = state["fc2.weight"] @ units + state["fc2.bias"]
    torch.testing.assert_close(model(image[None])[0].double(), expected, rtol=0, atol=1e-5)


def test_options_reach_the_model():
    assert [tuple(w.shape) for w in build("mlp", (1, 8, 8), 10, seed=0, hidden=[7]).parameters() if w.ndim > 1] == [
        (7, 64),
        (10, 7),
    ]
    assert list(build("mlp", (1, 8, 8), 10, seed=0, hidden=()).state_dict()) == ["layers.0.weight", "layers.0.bias"]
    assert len(build(f"{__name__}:linear", (1, 8, 8), 10, seed=0, bias=False).state_dict()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mpl"}, "unknown model 'mpl'.*registered are cnn, mlp, resnet20, resnet8, vgg8"),
        ({"name": "mlp", "hiden": (3,)}, "model 'mlp' does not take .* unexpected keyword argument 'hiden'"),
        ({"name": "mlp", "hidden": (3, 0)}, r"hidden widths must be >= 1, got \(3, 0\)"),
        ({"name": "math:pi"}, "model 'math:pi' does not take .*: it is a float, not a callable"),
        ({"name": f"{__name__}:not_a_module"}, r"must be a torch\.nn\.Module, got tuple"),
        ({"name": "cnn", "input_shape": (1, 3, 8)}, "images of 4×4 or larger, got 3×8"),
        ({"name": "resnet8", "norm": "layer"}, 'norm must be "batch" or "group", got \'layer\''),
        ({"name": "mlp", "init": "he"}, "unknown init 'he': allowed are default, kaiming-normal, .*, orthogonal"),
        ({"name": f"{__name__}:tables", "init": "orthogonal"}, "init = orthogonal: the model has no linear, "),
        ({"name": "torchvision.models:mobilenet_v2"}, "takes images of 3 channels, these have 1; allowed are other"),
        ({"name": "builtins:max"}, "model 'builtins:max' does not take .*: no signature found for builtin"),
        (
            {"name": "torchvision.models:ResNet"},
            r"does not take \(num_classes=…, .*missing a required argument: 'block'",
        ),
        ({"name": f"{__name__}:for_sixteen", "input_shape": (3, 8, 8)}, r"does not take images \(3, 8, 8\): "),
    ],
)
def test_what_can_not_be_built_is_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        build(**({"input_shape": (1, 8, 8), "num_classes": 10, "seed": 0} | arguments))
    assert "\n" not in str(error.value)


def test_classes_are_importable():
    classes = {"mlp": MLP, "cnn": CNN, "vgg8": VGG8, "resnet8": resnet8, "resnet20": resnet20}
    assert classes == MODELS


# ---- the larger ones


@pytest.mark.parametrize(("side", "poolings"), [(8, 3), (9, 3), (32, 5), (70, 5)])
def test_vgg8_computes_its_formula(side, poolings):
    model = build("vgg8", (2, side, side), 3, seed=0, width=0.03)
    widths = [2, 4, 8, 15, 15]
    weights = list(model.parameters())
    assert [tuple(weight.shape[:1]) for weight in weights[:10:2]] == [(width,) for width in widths]
    image = torch.randn(4, 2, side, side)
    units = image
    for layer in range(5):
        units = nn.functional.conv2d(units, weights[2 * layer], weights[2 * layer + 1], padding="same").clamp(min=0)
        if layer < poolings:
            height = units.shape[2] // 2
            units = units[:, :, : 2 * height, : 2 * height].unflatten(2, (height, 2)).unflatten(4, (height, 2))
            units = units.amax((3, 5))
    units = units.flatten(1)
    for layer in range(5, 8):
        units = units @ weights[2 * layer].T + weights[2 * layer + 1]
        units = units.clamp(min=0) if layer < 7 else units
    torch.testing.assert_close(model(image), units, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("training", [True, False])
def test_resnet8_computes_its_formula(side, training):
    model = build("resnet8", (2, side, side), 3, seed=0, width=0.5).train(training)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    image = torch.randn(4, 2, side, side)

    def convolved(maps, path, stride=1):
        weight = state[f"{path}.weight"]
        padded = nn.functional.pad(maps, (1, 1, 1, 1))
        patches = nn.functional.unfold(padded, 3, stride=stride)
        return (weight.flatten(1) @ patches).unflatten(2, (-(-maps.shape[2] // stride), -1))

    def normalised(maps):  # weights 1 and biases 0, statistics 0 and 1: of a new model
        mean, variance = (0.0, 1.0)
        if training:
            mean = maps.mean((0, 2, 3), keepdim=True)
            variance = maps.var((0, 2, 3), correction=0, keepdim=True)
        return (maps - mean) / (variance + 1e-5) ** 0.5

    maps = normalised(convolved(image.double(), "conv")).clamp(min=0)
    for block, stride in enumerate((1, 2, 2)):
        residue = normalised(convolved(maps, f"blocks.{block}.conv1", stride)).clamp(min=0)
        residue = normalised(convolved(residue, f"blocks.{block}.conv2"))
        passed = torch.zeros_like(residue)
        passed[:, : maps.shape[1]] = maps[:, :, ::stride, ::stride]
        maps = (passed + residue).clamp(min=0)
    expected = maps.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(image).double(), expected, rtol=0, atol=1e-5)


def test_resnet_without_batch_statistics():
    model = build("resnet8", (1, 8, 8), 10, seed=0, norm="group")
    groups = {module.num_groups for module in model.modules() if isinstance(module, nn.GroupNorm)}
    assert groups == {8}
    assert not list(model.buffers())
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))  # no sample sees another
    odd = build("resnet8", (1, 8, 8), 10, seed=0, norm="group", width=0.75)  # 12, 24, 48 channels
    assert [module.num_groups for module in odd.modules() if isinstance(module, nn.GroupNorm)][:4] == [4, 4, 4, 8]


@pytest.mark.parametrize("name", ["vgg8", "resnet8", "resnet20"])
def test_width_is_a_factor_for_every_hidden_layer(name):
    shapes = [
        [weight.shape[0] for weight in build(name, (1, 8, 8), 10, 0, width=width).parameters() if weight.ndim > 1]
        for width in (1.0, 0.25, 1e-9)
    ]
    assert shapes[1][:-1] == [width // 4 for width in shapes[0][:-1]]
    assert shapes[2] == [1] * (len(shapes[0]) - 1) + [10]


# ---- initial weights by name


def fans(weight):
    field = weight[0][0].numel() if weight.ndim > 2 else 1
    return weight.shape[1] * field, weight.shape[0] * field


@pytest.mark.parametrize("name", ["mlp", "vgg8", "resnet8"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_standard_deviation_of_a_scheme(scheme, name):
    model = build(name, (3, 8, 8), 10, seed=3, init=scheme)
    for path, weight in model.named_parameters():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.full_like(weight, "norm" in path and path.endswith("weight"))), path
            continue
        n, (fan_in, fan_out) = weight.numel(), fans(weight)
        rows = weight.detach().flatten(1).double()
        if scheme == "orthogonal":
            rows = rows if len(rows) <= rows.shape[1] else rows.T
            torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=1e-5)
            assert rows.square().mean() ** 0.5 == pytest.approx(rows.shape[1] ** -0.5, rel=1e-6)
            continue
        std = (2 / fan_in) ** 0.5 if scheme.startswith("kaiming") else (2 / (fan_in + fan_out)) ** 0.5
        kurtosis = -1.2 if scheme.endswith("uniform") else 0
        assert rows.std() == pytest.approx(std, rel=4.5 * ((kurtosis + 2) / (4 * n)) ** 0.5), path
        assert abs(rows.mean()) < 4.5 * std / n**0.5, path
        assert (rows.abs().max() <= 3**0.5 * std * 1.000001) == scheme.endswith("uniform"), path


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_depends_on_the_seed_alone(scheme):
    one, again, other = (build("mlp", (1, 8, 8), 10, seed, scheme).state_dict() for seed in (5, 5, 6))
    assert equal(one, again)
    assert not any(torch.equal(one[key], other[key]) for key in one if key.endswith("weight"))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build("mlp", (1, 8, 8), 10, 5, scheme)
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_is_initialised_too():
    model = build(f"{__name__}:attending", (1, 8, 8), 10, seed=0, init="xavier-uniform")
    weight = model[1].in_proj_weight
    assert weight.detach().std() == pytest.approx((2 / (8 + 24)) ** 0.5, rel=0.2)
    assert not model[1].in_proj_bias.any()
    assert not model[1].out_proj.bias.any()


def attending(input_shape, num_classes):
    model = nn.ModuleList([nn.Linear(8, 8), nn.MultiheadAttention(8, 2)])
    nn.init.ones_(model[1].in_proj_bias)
    return model


# ---- by a config


def test_options_of_a_config_reach_those_that_take_them():
    weight = of_config(Config(model="vgg8", width=0.5), (1, 8, 8), 10, 0).state_dict()["convolutions.0.weight"]
    assert len(weight) == 32
    model = of_config(Config(model="resnet8", norm="group", width=2.0), (1, 8, 8), 10, 0)
    assert isinstance(model.norm, nn.GroupNorm)
    assert len(model.conv.weight) == 32


@pytest.mark.parametrize("name", NAMES)
def test_a_config_without_options_gives_the_model_as_it_is(name):
    made = of_config(Config(model=name), (1, 8, 8), 10, 5).state_dict()
    assert equal(made, build(name, (1, 8, 8), 10, 5).state_dict())
    weights = [key for key in made if key.endswith("weight") and made[key].ndim > 1]
    drawn = of_config(Config(model=name, init="xavier-normal"), (1, 8, 8), 10, 5).state_dict()
    assert not any(torch.equal(made[key], drawn[key]) for key in weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "mlp", "width": 0.5}, r"width = 0.5: model 'mlp' has no such option; allowed is 1.0"),
        ({"model": "vgg8", "norm": "group"}, r"norm = 'group': model 'vgg8' has no such option; allowed is 'batch'"),
    ],
)
def test_option_that_a_model_does_not_take(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        of_config(Config(**options), (1, 8, 8), 10, 0)


@pytest.mark.parametrize("name", ["mobilenet_v2", "MobileNetV2", "resnet18"])
def test_factories_that_take_the_classes_by_keyword(name):
    model = build(f"torchvision.models:{name}", (3, 32, 32), 7, seed=0)
    assert model.training
    assert all(module.training for module in model.modules())
    assert model(torch.randn(2, 3, 40, 40)).shape == (2, 7)
