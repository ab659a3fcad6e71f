"""Augmentation: what may come out, how likely it is, and what decides it."""

import itertools

import pytest
import torch
from federations import DIGITS, ask, digest, initial_model, tiny
from hypothesis import given
from hypothesis import strategies as st

from clients.client_app import app as client_app
from clients.training import train
from fedwsa import models
from fedwsa.data.augmentation import AUGMENTATIONS, Augmented, crop_flip, flip
from fedwsa.seeding import torch_generator
from fedwsa.simulation import open_engine, simulate
from strategies.server_app import make_app


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(count, channels, height, width) -> torch.Tensor:
    """Images in which no two pixels are alike and none is 0."""
    return torch.arange(1, count * channels * height * width + 1).float().reshape(count, channels, height, width)


SIZES = (st.integers(1, 5), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))


def possible(image: torch.Tensor) -> list[torch.Tensor]:
    """Every crop of the padded image, and its mirror image."""
    _, height, width = image.shape
    down, right = height // 8, width // 8
    padded = torch.zeros(len(image), height + 2 * down, width + 2 * right)
    padded[:, down : down + height, right : right + width] = image
    crops = [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * down + 1)
        for left in range(2 * right + 1)
    ]
    return crops + [crop.flip(2) for crop in crops]


@pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
@given(size=st.tuples(*SIZES), seed=st.integers(0, 2**32))
def test_shape_and_kind_stay_and_the_input_is_left_alone(augment, size, seed):
    images = numbered(*size)
    before = images.clone()
    out = augment(images, seeded(seed))
    assert (out.dtype, out.shape) == (images.dtype, images.shape)
    assert torch.equal(images, before)


@given(size=st.tuples(*SIZES), seed=st.integers(0, 2**32))
def test_each_image_is_itself_or_its_mirror_image(size, seed):
    images = numbered(*size)
    for image, out in zip(images, flip(images, seeded(seed)), strict=True):
        assert torch.equal(out, image) or torch.equal(out, image.flip(2))


@given(size=st.tuples(*SIZES), seed=st.integers(0, 2**32))
def test_each_image_is_one_of_its_crops(size, seed):
    images = numbered(*size)
    for image, out in zip(images, crop_flip(images, seeded(seed)), strict=True):
        assert any(torch.equal(out, crop) for crop in possible(image))


def test_all_crops_are_alike_likely():
    """Eighteen of an 8×8 image: 9 places, mirrored or not."""
    image, count = numbered(1, 1, 8, 8), 9000
    crops = {tuple(crop.flatten().tolist()) for crop in possible(image[0])}
    seen = [tuple(out) for out in crop_flip(image.expand(count, 1, 8, 8), seeded()).flatten(1).tolist()]
    expected = count / len(crops)
    chi_squared = sum((seen.count(crop) - expected) ** 2 / expected for crop in crops)
    assert len(crops) == 18
    assert chi_squared < 40.8  # 0.1 % of the distribution with 17 degrees of freedom


def test_half_of_the_images_are_mirrored():
    images = numbered(1, 1, 1, 2).expand(10000, 1, 1, 2)
    assert abs((flip(images, seeded())[:, 0, 0, 0] == 2).sum() - 5000) < 165  # 3.3 standard deviations


def test_each_step_draws_anew_and_the_seed_decides_all():
    images = numbered(64, 1, 8, 8)

    def steps(seed):
        augmented = Augmented(images, crop_flip, seeded(seed))
        return [augmented[torch.arange(64)] for _ in range(4)]

    assert all(torch.equal(a, b) for a, b in zip(steps(3), steps(3), strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise([*steps(3), *steps(4)]))


def test_a_batch_is_of_the_images_asked_for():
    images, batch = numbered(9, 1, 8, 8), torch.tensor([4, 4, 0])
    out = Augmented(images, flip, seeded(1))[batch]
    assert torch.equal(out, flip(images[batch], seeded(1)))


# ---- in a client


def bits(state) -> str:
    return digest({name: tensor.numpy() for name, tensor in state.items()})


def reply(client=2, server_round=3, **changes):
    return bits(ask(tiny(partitioner="iid", **changes), client, server_round, start=initial_model())[0])


def test_the_client_trains_on_augmented_images():
    assert len({reply(), reply(augmentation="flip"), reply(augmentation="crop-flip")}) == 3


def test_augmentation_is_a_stream_of_its_own_for_each_seed_round_and_client(monkeypatch):
    """On equal images: what differs is what is drawn."""
    drawn = {}
    monkeypatch.setitem(AUGMENTATIONS, "flip", lambda images, generator: _note(drawn, images, generator))
    for seed, server_round, client in ((0, 3, 2), (1, 3, 2), (0, 4, 2), (0, 3, 1), (0, 3, 2)):
        drawn[key := (seed, server_round, client)] = []
        drawn["now"] = drawn[key]
        reply(client, server_round, seed=seed, augmentation="flip")
        if key == (0, 3, 2):
            assert drawn.setdefault("first", drawn[key]) == drawn[key]
    del drawn["now"], drawn["first"]
    assert len({tuple(numbers) for numbers in drawn.values()}) == 4
    numbers = [number for numbers in drawn.values() for number in numbers]
    assert len(set(numbers)) == len(numbers)  # steps, too, differ


def _note(drawn, images, generator):
    drawn["now"].append(torch.rand((), generator=generator).item())
    return images


def test_augmentation_leaves_the_order_of_the_samples_alone(monkeypatch):
    monkeypatch.setitem(
        AUGMENTATIONS, "flip", lambda images, generator: images + 0 * torch.rand(1, generator=generator)
    )
    assert reply(augmentation="flip") == reply()


def test_validation_images_are_not_augmented():
    losses = {ask(tiny(augmentation=name), 1, kind="evaluate")[1]["loss"] for name in ("", "flip", "crop-flip")}
    assert len(losses) == 1


def test_training_on_augmented_images_by_hand():
    images, labels = torch.randn(20, 1, 8, 8, generator=seeded()), torch.arange(20) % 10
    ours, by_hand = (models.build("mlp", *DIGITS, seed=0) for _ in range(2))
    config = tiny(batch_size=8)
    train(ours, Augmented(images, crop_flip, seeded(5)), labels, config, torch_generator(0, "client"))
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=config.learning_rate)
    draws = seeded(5)
    for batch in torch.split(torch.randperm(20, generator=torch_generator(0, "client")), 8):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(by_hand(crop_flip(images[batch], draws)), labels[batch]).backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(RuntimeError, match="unknown augmentation 'mixup': registered are crop-flip, flip"):
        ask(tiny(augmentation="mixup"))


@pytest.mark.process
def test_two_workers_give_the_bits_of_this_process(tmp_path):
    config = tiny(augmentation="crop-flip", feature_shift="noise", strategies=("fedavg",))
    finals = []
    for name, options in (("inprocess", {}), ("ray", {"workers": 2})):
        with open_engine(name, **options) as engine:
            app = make_app(tmp_path / name)
            simulate(app, client_app, config.num_clients, engine=engine, run_config=config.to_run_config())
        finals.append((tmp_path / name / "fedavg" / "final.safetensors").read_bytes())
    assert finals[0] == finals[1]
