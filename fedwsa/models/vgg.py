"""A small VGG without normalisation."""

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

WIDTHS = (64, 128, 256, 512, 512)
CLASSIFIER = 512


class VGG8(nn.Module):
    """Five 3×3 convolutions (64, 128, 256, 512, 512 channels), then linear layers 512, 512, C; logits out.

    ReLU after each but the last; 2×2 max-pooling after each convolution while both sides have two pixels or more, so
    that 32×32 images end as 1×1. In the manner of Simonyan & Zisserman, arXiv 1409.1556, without dropout; this depth
    and these widths are ours.
    width: > 0, a factor for the channels and the hidden units, rounded, at least 1 each.
    Initialisation is that of torch.nn.Conv2d and Linear: weights and biases uniform in ±1/√fan_in, from the global
    generator (`build` seeds it).
    """

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        channels, height, columns = input_shape
        self.convolutions = nn.ModuleList()
        for out in WIDTHS:
            self.convolutions.append(nn.Conv2d(channels, scaled(out, width), kernel_size=3, padding=1))
            channels = scaled(out, width)
            if min(height, columns) > 1:
                height, columns = height // 2, columns // 2
        hidden = scaled(CLASSIFIER, width)
        self.fc1 = nn.Linear(channels * height * columns, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, num_classes] of images [n, C, H, W]."""
        maps = images
        for convolution in self.convolutions:
            maps = torch.relu(convolution(maps))
            if min(maps.shape[2:]) > 1:
                maps = max_pool2d(maps, 2)
        units = torch.relu(self.fc1(maps.flatten(1)))
        logits: Tensor = self.fc3(torch.relu(self.fc2(units)))
        return logits


def scaled(size: int, width: float) -> int:
    """A number of channels or units times a width factor."""
    return max(1, round(size * width))
