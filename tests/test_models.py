import numpy as np
import pytest
import torch
from torch import nn

from fedwsa.models import CNN, MLP, MODELS, build

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 9, 13)]


def linear(input_shape, num_classes, bias=True):
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(input_shape)), num_classes, bias=bias))


def not_a_module(input_shape, num_classes):
    return input_shape


NAMES = [*MODELS, f"{__name__}:linear"]


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
    assert not any(torch.equal(other[key], one[key]) for key in one)


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
            assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), tensor_name


@pytest.mark.parametrize("name", MODELS)
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
        ({"name": "mpl"}, "unknown model 'mpl'.*registered are cnn, mlp"),
        ({"name": "mlp", "hiden": (3,)}, "model 'mlp' does not take .* unexpected keyword argument 'hiden'"),
        ({"name": "mlp", "hidden": (3, 0)}, r"hidden widths must be >= 1, got \(3, 0\)"),
        ({"name": "math:pi"}, "model 'math:pi' does not take .* not a callable"),
        ({"name": f"{__name__}:not_a_module"}, r"must be a torch\.nn\.Module, got tuple"),
        ({"name": "cnn", "input_shape": (1, 3, 8)}, "images of 4×4 or larger, got 3×8"),
    ],
)
def test_what_can_not_be_built_is_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        build(**({"input_shape": (1, 8, 8), "num_classes": 10, "seed": 0} | arguments))
    assert "\n" not in str(error.value)


def test_classes_are_importable():
    assert MODELS == {"mlp": MLP, "cnn": CNN}
