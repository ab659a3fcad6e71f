"""Augmentation: images that are changed at random each time that a training step takes them.

An augmentation is a function `(images, generator) -> images` of tensors [n, C, H, W] that returns a new tensor on the
same device; it draws from the generator, which is the CPU's, so that every device changes the images alike. To add
one: one function and one line in `AUGMENTATIONS` (or none: the config takes an import path too).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability ½."""
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its height and width, every way alike likely, and `flip` it.

    What comes in from outside is 0, the mean colour of normalised images. As He et al., 1512.03385, crop from images
    with 4 pixels of padding; that it is an eighth, which is 4 of 32, is ours, for images of other sizes.
    """
    count, _, height, width = images.shape
    down, right = height // 8, width // 8
    top = torch.randint(2 * down + 1, (count, 1), generator=generator)
    left = torch.randint(2 * right + 1, (count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns, image = (each.to(images.device) for each in (rows, columns, torch.arange(count)))
    padded = F.pad(images, (right, right, down, down))
    return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


AUGMENTATIONS: dict[str, Augmentation] = {"flip": flip, "crop-flip": crop_flip}


class Augmented:
    """Stands for the images in a training loop: `images[batch]` is a batch, changed; each step draws anew.

    images: [N, C, H, W]. generator: of one client's training in one round, so that a step's change depends on that and
    on the steps before it.
    """

    def __init__(self, images: Tensor, augment: Augmentation, generator: torch.Generator) -> None:
        self._images, self._augment, self._generator = images, augment, generator

    def __getitem__(self, batch: Tensor) -> Tensor:
        return self._augment(self._images[batch], self._generator)
