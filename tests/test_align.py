"""Weight matching: the function stays, the distance falls, permutations are recovered."""

from itertools import pairwise, permutations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis.strategies import booleans, integers, lists

from fedwsa.merging import UnitEntry, UnitGroup, align, chain_permutations

seeds = integers(0, 2**32 - 1)


def mlp(sizes, generator, bias=True):
    state = {}
    for layer, (inputs, outputs) in enumerate(pairwise(sizes)):
        state[f"{layer}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        if bias:
            state[f"{layer}.bias"] = torch.randn(outputs, generator=generator)
    return state


def mlp_outputs(state, x):
    layers = [name for name in state if name.endswith("weight")]
    for name in layers:
        x = F.linear(x, state[name], state.get(name.replace("weight", "bias")))
        x = x if name == layers[-1] else x.relu()
    return x


def conv_net(generator):
    """Two convolutions on 1×8×8, pooled to 3×2×2, then two linear layers; 3 channels are 12 columns of fc1."""
    shapes = {"conv1": (6, 1, 3, 3), "conv2": (3, 6, 3, 3), "fc1": (7, 12), "fc2": (4, 7)}
    state = {}
    for layer, shape in shapes.items():
        state[f"{layer}.weight"] = torch.randn(shape, generator=generator) / (shape[1] * 3) ** 0.5
        state[f"{layer}.bias"] = torch.randn(shape[0], generator=generator)
    return state


def conv_outputs(state, x):
    x = F.max_pool2d(F.conv2d(x, state["conv1.weight"], state["conv1.bias"], padding=1).relu(), 2)
    x = F.max_pool2d(F.conv2d(x, state["conv2.weight"], state["conv2.bias"], padding=1).relu(), 2)
    x = F.linear(x.flatten(1), state["fc1.weight"], state["fc1.bias"]).relu()
    return F.linear(x, state["fc2.weight"], state["fc2.bias"])


def shuffle(state, generator):
    """The units of every group in a random order, by plain indexing: an independent way to permute."""
    state = dict(state)
    for group in chain_permutations(state):
        order = torch.randperm(group.size, generator=generator).tolist()
        for name, axis, block in group.entries:
            parts = state[name].split(block, dim=axis)
            state[name] = torch.cat([parts[i] for i in order], dim=axis)
    return state


def squared_distance(a, b):
    return sum((a[name].double() - b[name].double()).square().sum().item() for name in a)


def assert_equal(a, b):
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


NETWORKS = {
    "mlp": (lambda g: mlp((40, 24, 16, 5), g), mlp_outputs, (9, 40)),
    "conv": (conv_net, conv_outputs, (9, 1, 8, 8)),
}
networks = pytest.mark.parametrize(("build", "outputs", "shape"), NETWORKS.values(), ids=NETWORKS)


def test_a_chain_groups_each_layer_with_the_next():
    assert chain_permutations(conv_net(torch.Generator())) == [
        UnitGroup(6, (UnitEntry("conv1.weight", 0), UnitEntry("conv1.bias", 0), UnitEntry("conv2.weight", 1))),
        UnitGroup(3, (UnitEntry("conv2.weight", 0), UnitEntry("conv2.bias", 0), UnitEntry("fc1.weight", 1, 4))),
        UnitGroup(7, (UnitEntry("fc1.weight", 0), UnitEntry("fc1.bias", 0), UnitEntry("fc2.weight", 1))),
    ]


def test_biases_are_optional_and_one_layer_has_no_hidden_units():
    assert chain_permutations(mlp((4, 3, 2), torch.Generator(), bias=False)) == [
        UnitGroup(3, (UnitEntry("0.weight", 0), UnitEntry("1.weight", 1)))
    ]
    assert chain_permutations({"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}) == []


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"0.weight": (4, 3), "1.weight": (4,), "1.bias": (4,), "2.weight": (2, 4)}, r"1\.weight \(4,\)"),
        ({"0.weight": (4, 3), "0.running_mean": (4,)}, r"0\.running_mean \(4,\)"),
        ({"0.weight": (4, 3), "0.bias": (5,)}, r"0\.bias \(5,\)"),
        ({"0.bias": (5,)}, r"0\.bias \(5,\)"),
        ({"0.weight": (4, 3), "1.weight": (2, 5)}, r"1\.weight \(2, 5\) does not take the 4 outputs of 0\.weight"),
        ({"0.weight": (4, 3), "1.weight": (2, 8)}, r"1\.weight \(2, 8\)"),  # blocks only behind a convolution
        ({"0.weight": (4, 1, 3, 3), "1.weight": (2, 6)}, r"1\.weight \(2, 6\)"),
        ({"0.weight": (4, 1, 3, 3), "1.weight": (2, 8, 3, 3)}, r"1\.weight \(2, 8, 3, 3\)"),
        ({"0.weight": (4, 3), "1.weight": (2, 4, 3, 3)}, r"1\.weight \(2, 4, 3, 3\)"),
        ({"0.weight": (4, 3, 3)}, r"0\.weight \(4, 3, 3\)"),
    ],
)
def test_what_is_no_chain_is_refused_with_the_remedy(shapes, reason):
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=f"{reason}.*pass `groups`"):
        chain_permutations(state)


@networks
@settings(max_examples=20)
@given(seed=seeds)
def test_the_aligned_network_computes_the_same_function(build, outputs, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = build(generator), build(generator)
    aligned = align(b, a)
    x = torch.randn(shape, generator=generator)
    torch.testing.assert_close(outputs(aligned, x), outputs(b, x), rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(aligned[name], b[name]) for name in b)  # two drawn networks never lie in order


@networks
@pytest.mark.parametrize("seed", range(20))
def test_a_permuted_network_is_recovered_bit_for_bit(build, outputs, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    a = build(generator)
    permuted = shuffle(a, generator)
    assert squared_distance(permuted, a) > 1
    assert_equal(align(permuted, a), a)


@networks
@settings(max_examples=20)
@given(seed=seeds, max_sweeps=integers(0, 3))
def test_the_distance_never_grows(build, outputs, shape, seed, max_sweeps):
    generator = torch.Generator().manual_seed(seed)
    a, b = build(generator), build(generator)
    distances = [squared_distance(align(b, a, max_sweeps=sweeps), a) for sweeps in range(max_sweeps + 2)]
    assert distances[0] == squared_distance(b, a)
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(distances))


@settings(max_examples=20)
@given(seed=seeds, units=integers(1, 5), bias=booleans())
def test_one_hidden_layer_gets_the_best_of_all_permutations(seed, units, bias):
    generator = torch.Generator().manual_seed(seed)
    a, b = (mlp((3, units, 2), generator, bias) for _ in range(2))

    def ordered(order):
        hidden = {name: tensor[list(order)] for name, tensor in b.items() if name.startswith("0.")}
        return {**b, **hidden, "1.weight": b["1.weight"][:, list(order)]}

    best = min(squared_distance(ordered(order), a) for order in permutations(range(units)))
    assert squared_distance(align(b, a), a) == pytest.approx(best, rel=1e-9)


@networks
@pytest.mark.parametrize("ties", [False, True])
@settings(max_examples=15)
@given(seed=seeds)
def test_an_aligned_network_stays_as_it_is(build, outputs, shape, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = build(generator), build(generator)
    if ties:  # one bit a weight: many orders are as good, save for float64's rounding of 0.1 · 0.1
        a, b = ({name: 0.1 * tensor.double().sign() for name, tensor in state.items()} for state in (a, b))
    aligned = align(b, a)
    assert_equal(align(aligned, a), aligned)


def test_the_result_shares_no_memory():
    b = {"weight": torch.ones(3, 2), "steps": torch.tensor(5)}
    aligned = align(b, b, [UnitGroup(3, (UnitEntry("weight", 0),))])
    for tensor in aligned.values():
        tensor.zero_()
    assert (b["weight"].sum().item(), b["steps"].item()) == (6.0, 5)


@networks
def test_alignment_is_deterministic(build, outputs, shape):
    generator = torch.Generator().manual_seed(3)
    a, b = build(generator), build(generator)
    assert_equal(align(b, a), align(b, a))


@settings(max_examples=30)
@given(seed=seeds, sizes=lists(integers(1, 9), min_size=2, max_size=5))
def test_equal_networks_stay_as_they_are(seed, sizes):
    a = mlp(sizes, torch.Generator().manual_seed(seed))
    assert_equal(align(a, a), a)


def test_ties_keep_the_order():
    a = {name: torch.full_like(tensor, 0.1) for name, tensor in mlp((5, 33, 17, 2), torch.Generator()).items()}
    b = {**a, "0.bias": torch.arange(33.0), "1.bias": torch.arange(17.0)}
    a["0.bias"], a["1.bias"] = torch.zeros(33), torch.zeros(17)  # b's units differ only where a is zero
    assert_equal(align(b, a), b)


def test_a_spec_reaches_what_no_chain_can_show():
    generator = torch.Generator().manual_seed(0)

    def build():
        return {
            "conv.weight": torch.randn(8, 2, 3, 3, generator=generator),
            "norm.weight": torch.rand(8, generator=generator),
            "norm.bias": torch.randn(8, generator=generator),
            "norm.running_mean": torch.randn(8, generator=generator),
            "norm.running_var": torch.rand(8, generator=generator) + 0.5,
            "norm.num_batches_tracked": torch.tensor(4),
            "head.weight": torch.randn(3, 8 * 36, generator=generator),
        }

    def outputs(state, x):
        x = F.conv2d(x, state["conv.weight"])
        statistics = (state[f"norm.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.linear(F.batch_norm(x, *statistics).relu().flatten(1), state["head.weight"])

    a, b = build(), build()
    with pytest.raises(ValueError, match="pass `groups`"):
        align(b, a)
    entries = [UnitEntry(name, 0) for name in a if not name.startswith("head") and a[name].ndim]
    aligned = align(b, a, [UnitGroup(8, (*entries, UnitEntry("head.weight", 1, 36)))])
    x = torch.randn(5, 2, 8, 8, generator=generator)
    torch.testing.assert_close(outputs(aligned, x), outputs(b, x), rtol=1e-5, atol=1e-5)
    assert squared_distance(aligned, a) < squared_distance(b, a)


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ([UnitGroup(3, (UnitEntry("9.weight", 0),))], "lacks: '9.weight'"),
        ([UnitGroup(4, (UnitEntry("0.weight", 0),))], "does not fit"),
        ([UnitGroup(3, (UnitEntry("0.weight", 2),))], "does not fit"),
        ([UnitGroup(3, (UnitEntry("0.weight", 0),)), UnitGroup(3, (UnitEntry("0.weight", 0),))], "twice"),
        ([UnitGroup(3, (UnitEntry("1.weight", 0), UnitEntry("1.weight", 1)))], "two axes of one tensor"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(groups, reason):
    a = mlp((2, 3, 3), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=reason):
        align(a, a, groups)


def test_unlike_or_broken_networks_are_refused():
    a = mlp((2, 3, 2), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"\['1\.bias'\]"):
        align({name: tensor for name, tensor in a.items() if name != "1.bias"}, a)
    with pytest.raises(ValueError, match=r"finite to be aligned.*\['0\.bias'\]"):
        align({**a, "0.bias": torch.tensor([0.0, float("nan"), 1.0])}, a)
