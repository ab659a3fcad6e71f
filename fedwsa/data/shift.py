"""Feature shift: what makes one client's images look unlike another's, whatever the labels that they hold.

A shift is a function `(pixels, amount, rng) -> pixels` of float32 [n, C, H, W], pixel / scale (0 is black, 1 white),
that returns a new array; nothing is clipped. Client k of K has amount = strength · k / (K − 1): client 0 none, the last
one all of it. To add a shift: one function and one line in `SHIFTS` (or none: the config takes an import path too).

Noise that grows with the client's number is of Li et al., 2102.02079; that the standard deviation and not the variance
grows linearly, and that client 0 has none, is ours, as is everything about rotation and contrast.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedwsa.data.dataset import Pixels
from fedwsa.seeding import generator

Shift = Callable[[Pixels, float, np.random.Generator], Pixels]


def noise(pixels: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    """Add independent Gaussian noise; amount: its standard deviation, where 1 is the whole range of a pixel."""
    return pixels + np.float32(amount) * rng.standard_normal(pixels.shape, np.float32)


def rotation(pixels: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    """Turn about the middle, counter-clockwise, bilinear, black outside; amount: in full turns, 0.25 is 90°."""
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    height, width = pixels.shape[2:]
    cos, sin = math.cos(2 * math.pi * amount), math.sin(2 * math.pi * amount)
    # Where in the input a pixel of the output comes from; both sides are −1 … 1 long, whatever the image's.
    turn = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]])
    grid = affine_grid(turn[None], [1, 1, height, width], align_corners=False)
    images = torch.from_numpy(pixels)
    turned: Pixels = grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=False).numpy()
    return turned


def contrast(pixels: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    """Draw each image towards its own mean; amount: the share of the contrast lost, 1 is grey, 2 the negative."""
    mean: Pixels = pixels.mean((1, 2, 3), keepdims=True)
    return mean + np.float32(1 - amount) * (pixels - mean)


SHIFTS: dict[str, Shift] = {"noise": noise, "rotation": rotation, "contrast": contrast}


@dataclass(frozen=True, slots=True)
class FeatureShift:
    """One shift over `num_clients` clients; what a client's is depends on (seed, client) alone, not on the round."""

    shift: Shift
    strength: float
    num_clients: int
    seed: int

    def amount(self, client: int) -> float:
        """strength · k / (K − 1) for client k = 0 … K − 1; a single client has none."""
        return self.strength * client / max(self.num_clients - 1, 1)

    def change(self, client: int, purpose: str) -> Callable[[Pixels], Pixels] | None:
        """What is done to this client's images, the same at each call; None: nothing.

        purpose: a stream of `fedwsa.seeding`, one for the training images and one for the validation images.
        """
        amount = self.amount(client)
        if amount == 0:
            return None
        return lambda pixels: self.shift(pixels, amount, generator(self.seed, purpose, partition_id=client))
