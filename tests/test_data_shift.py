"""Feature shift: what is done to a client's images, and to nobody else's."""

import numpy as np
import pytest
import torch
from federations import ask, digest, initial_model, tiny
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as theirs

from clients.federation import federation
from fedwsa.data.shift import SHIFTS, FeatureShift, contrast, noise, rotation

PIXELS = np.random.default_rng(0).random((6, 3, 9, 9), np.float32)
IMAGES = arrays(
    np.float32,
    st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    elements=st.floats(0, 1, width=32),
)


def rng(seed=0):
    return np.random.default_rng(seed)


# ---- every shift


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
@given(pixels=IMAGES, amount=st.floats(0, 2))
def test_shape_and_kind_stay_and_the_input_is_left_alone(shift, pixels, amount):
    before = pixels.copy()
    shifted = shift(pixels, amount, rng())
    assert (shifted.dtype, shifted.shape) == (np.float32, pixels.shape)
    assert not np.shares_memory(shifted, pixels)
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
def test_no_amount_is_no_shift(shift):
    np.testing.assert_allclose(shift(PIXELS, 0.0, rng()), PIXELS, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
def test_an_image_is_shifted_whatever_its_neighbours_are(shift):
    """But for the noise, which is drawn in one go: there the first images are the same."""
    np.testing.assert_allclose(shift(PIXELS[:2], 0.3, rng()), shift(PIXELS, 0.3, rng())[:2], rtol=0, atol=1e-6)


# ---- noise


def test_noise_is_gaussian_with_the_standard_deviation_asked_for():
    grey = np.full((50, 1, 28, 28), 0.5, np.float32)
    added = noise(grey, 0.2, rng()) - grey
    assert stats.kstest(added.ravel() / 0.2, "norm").pvalue > 1e-3
    assert not np.array_equal(noise(grey, 0.2, rng(1)), noise(grey, 0.2, rng(2)))


# ---- rotation


@pytest.mark.parametrize("quarter", [0, 1, 2, 3, 4])
def test_quarter_turns_are_counter_clockwise_and_exact(quarter):
    np.testing.assert_allclose(
        rotation(PIXELS, quarter / 4, rng()), np.rot90(PIXELS, quarter, (2, 3)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(2, 3, 9, 9), (2, 1, 8, 12), (2, 1, 11, 6)])
@pytest.mark.parametrize("degrees", [10, 45, 120, 200, 359])
def test_torchvision_turns_images_alike(shape, degrees):
    pixels = rng().random(shape, np.float32)
    expected = theirs.rotate(torch.from_numpy(pixels), degrees, InterpolationMode.BILINEAR)
    np.testing.assert_allclose(rotation(pixels, degrees / 360, rng()), expected, rtol=0, atol=1e-4)


# ---- contrast


def test_torchvision_changes_the_contrast_of_grey_images_alike():
    pixels = PIXELS[:, :1]
    expected = torch.stack([theirs.adjust_contrast(image, 0.7) for image in torch.from_numpy(pixels)])
    np.testing.assert_allclose(contrast(pixels, 0.3, rng()), expected, rtol=0, atol=1e-6)


def test_contrast_by_hand():
    pixels = np.array([[[[0.0, 1.0]], [[0.5, 0.5]]]], np.float32)
    np.testing.assert_allclose(contrast(pixels, 0.5, rng()), [[[[0.25, 0.75]], [[0.5, 0.5]]]])
    np.testing.assert_allclose(contrast(pixels, 1.0, rng()), [[[[0.5, 0.5]], [[0.5, 0.5]]]])
    np.testing.assert_allclose(contrast(pixels, 2.0, rng()), 1 - pixels)


# ---- which client gets how much


def test_the_amount_grows_from_none_at_the_first_client_to_all_at_the_last():
    shift = FeatureShift(noise, 0.4, num_clients=5, seed=0)
    np.testing.assert_allclose([shift.amount(client) for client in range(5)], [0, 0.1, 0.2, 0.3, 0.4])
    assert shift.change(0, "shift-training") is None
    assert FeatureShift(noise, 0.4, num_clients=1, seed=0).change(0, "shift-training") is None
    grey = np.zeros((9, 1, 30, 30), np.float32)
    stds = [shift.change(client, "shift-training")(grey).std() for client in range(1, 5)]
    np.testing.assert_allclose(stds, [0.1, 0.2, 0.3, 0.4], rtol=0.05)


def test_noise_follows_the_seed_the_client_and_the_split_and_stays_from_round_to_round():
    grey = np.zeros((3, 1, 4, 4), np.float32)

    def drawn(seed=0, client=2, purpose="shift-training"):
        return FeatureShift(noise, 1.0, 9, seed).change(client, purpose)(grey) / FeatureShift(noise, 1.0, 9, 0).amount(
            client
        )

    np.testing.assert_array_equal(drawn(), drawn())
    others = [drawn(seed=1), drawn(client=3), drawn(purpose="shift-validation")]
    assert all(np.abs(drawn() - other).max() > 0.1 for other in others)


# ---- in a federation


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("partitioner", ["iid", "dirichlet"])
def test_clients_images_are_shifted_and_nothing_else(shift, partitioner):
    plain = federation(tiny(partitioner=partitioner))
    shifted = federation(tiny(partitioner=partitioner, feature_shift=shift, shift_strength=0.3))
    for part in ("training", "validation"):
        for client in range(6):
            ours, labels = getattr(shifted, f"{part}_tensors")(client)
            expected, expected_labels = getattr(plain, f"{part}_tensors")(client)
            assert torch.equal(labels, expected_labels)
            assert torch.equal(ours, expected) == (client == 0)
            assert torch.equal(getattr(shifted, f"{part}_tensors")(client)[0], ours)
    for ours, expected in zip(shifted.dataset.test_tensors(), plain.dataset.test_tensors(), strict=True):
        assert torch.equal(ours, expected)
    assert np.array_equal(shifted.server, plain.server)
    assert np.array_equal(shifted.label_counts(), plain.label_counts())


def test_a_shift_is_of_pixels_and_normalisation_comes_after():
    holdings = federation(tiny(feature_shift="contrast", shift_strength=0.5))
    data, last = holdings.dataset, 5
    pixels = data.train_images[holdings.training[last]] / data.scale
    mean = pixels.mean((1, 2, 3), keepdims=True)
    expected = ((pixels + mean) / 2 - data.mean[0]) / data.std[0]
    np.testing.assert_allclose(holdings.training_tensors(last)[0], expected, rtol=0, atol=1e-5)


def test_without_a_shift_the_tensors_are_those_of_the_data_set():
    holdings = federation(tiny())
    for part in ("training", "validation"):
        ours, _ = getattr(holdings, f"{part}_tensors")(3)
        assert torch.equal(ours, holdings.dataset.train_tensors(getattr(holdings, part)[3])[0])


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_clients_train_and_evaluate_on_the_shifted_images(kind):
    def reply(client, **changes):
        state, metrics = ask(tiny(**changes), client, kind=kind, start=initial_model())
        return digest({name: tensor.numpy() for name, tensor in state.items()}), metrics["loss"]

    shifted = {"feature_shift": "rotation", "shift_strength": 0.5}
    assert reply(4, **shifted) == reply(4, **shifted) != reply(4)
    assert reply(0, **shifted) == reply(0)


def upside_down(pixels, amount, rng):
    return pixels[:, :, ::-1].copy()


def in_doubles(pixels, amount, rng):
    return pixels.astype(np.float64) + amount


def smaller(pixels, amount, rng):
    return pixels[:, :, 1:]


def test_a_users_shift_may_give_doubles_but_no_other_shape():
    images, _ = federation(tiny(feature_shift=f"{__name__}:in_doubles")).training_tensors(2)
    assert images.dtype == torch.float32
    with pytest.raises(ValueError, match=r"the feature shift made .* of .*; allowed is the same"):
        federation(tiny(feature_shift=f"{__name__}:smaller")).training_tensors(2)


def test_a_shift_may_be_named_by_import_path_and_an_unknown_one_is_refused():
    plain, shifted = federation(tiny()), federation(tiny(feature_shift=f"{__name__}:upside_down"))
    ours, expected = shifted.training_tensors(2)[0], plain.training_tensors(2)[0].flip(2)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="unknown feature shift 'blur': registered are contrast, noise, rotation"):
        federation(tiny(feature_shift="blur"))
